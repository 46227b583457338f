"""The fast block in the plain one's place: when it applies, and that nothing else changes."""

import copy

import pytest
import torch
from test_fused import SHAPES, adapted, batch, gradients
from tiny_runs import tiny_model

from minilora.config import LoraConfig, PrefixConfig
from minilora.fast_block import fuse
from minilora.fused import Keep
from minilora.model import Block
from minilora.prefix import add_prefix


def test_a_last_norm_that_comes_to_learn_gets_its_gradient() -> None:
    model = adapted(SHAPES[0])
    assert fuse(model)
    model.norm.weight.requires_grad_()
    assert "norm.weight" in gradients(model)[1]


@pytest.mark.parametrize("why", ["dropout", "a norm learns", "the base learns"])
def test_it_refuses_what_it_does_not_say(why: str) -> None:
    model = adapted(SHAPES[0], LoraConfig(rank=4, dropout=0.1 if why == "dropout" else 0.0), nf4=False)
    if why == "a norm learns":
        model.layers[1].post_attention_layernorm.weight.requires_grad_()
    if why == "the base learns":
        model.layers[0].mlp.up_proj.base.weight.requires_grad_()
    assert not fuse(model)
    assert all(type(block) is Block for block in model.layers)


def test_checkpointing_is_the_fast_blocks_and_stays_so() -> None:
    model = adapted(SHAPES[1])
    model.activation_checkpointing = True
    for _ in range(2):
        assert fuse(model)
        assert [block.keep for block in model.layers] == [Keep.INPUT] * len(model.layers)
        assert not model.activation_checkpointing


def test_under_a_prefix_that_comes_later_blocks_are_plain() -> None:
    plain = tiny_model()
    fast = copy.deepcopy(plain)
    assert fuse(fast)
    tokens = torch.arange(20, 29)[None]
    for model in (plain, fast):
        torch.manual_seed(0)
        add_prefix(model, PrefixConfig(4)).train()
    assert torch.allclose(fast(tokens), plain(tokens), rtol=1e-5, atol=1e-5)  # the last norm sums in another order


def test_names_modes_and_inference_stay() -> None:
    plain = adapted(SHAPES[1])
    fast = copy.deepcopy(plain)
    keep = [Keep.INPUT] * len(fast.layers)
    assert [fuse(fast, keep), fuse(fast)] == [True, True]  # twice is once
    assert all(block.keep == Keep.INPUT for block in fast.layers)
    assert list(fast.state_dict()) == list(plain.state_dict())
    tokens = batch(plain.config, packed=False).tokens
    with torch.no_grad():
        assert torch.equal(fast(tokens), plain(tokens))
    assert all(not module.training for module in fast.eval().modules())
