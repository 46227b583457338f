"""A prefix in the model: what sees it, generation with the cache, padding and packing, its gradients."""

import dataclasses

import pytest
import torch
from tiny_runs import TINY, tiny_model
from torch import Tensor

from minilora.config import LoraConfig, PrefixConfig
from minilora.errors import UserError
from minilora.fast_block import fuse
from minilora.generation import generate, stream
from minilora.lora import adapters_off, add_lora
from minilora.model import Block, Mistral
from minilora.prefix import add_prefix


def with_prefix(n_tokens: int, window: int | None = 12) -> Mistral:
    model = tiny_model(config=dataclasses.replace(TINY, sliding_window=window))
    torch.manual_seed(1)
    return add_prefix(model, PrefixConfig(n_tokens))


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(14, TINY.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def test_it_is_drawn_as_peft_draws_it() -> None:
    prefix = with_prefix(5).prefix
    torch.manual_seed(1)
    assert prefix is not None
    assert torch.equal(prefix.prompt_embeddings, torch.nn.Embedding(5, 2 * 2 * 2 * 16).weight)


@pytest.mark.parametrize(("n_tokens", "window"), [(3, None), (3, 1), (3, 5), (20, 12), (1, 12)])
@pytest.mark.parametrize("length", [1, 8, 20])
@torch.no_grad()
def test_greedy_is_the_naive_loop(n_tokens: int, window: int | None, length: int) -> None:
    """Without a cache, token by token, also where prefix and prompt are longer than the window."""
    model = with_prefix(n_tokens, window)
    expected = prompt(length)
    for _ in range(20):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert generate(model, prompt(length), 20).equal(expected)


def test_padding_at_the_left_is_never_seen() -> None:
    model, lengths = with_prefix(4), [3, 17, 1, 8]
    alone = [generate(model, prompt(n, n), 20)[0, n:].tolist() for n in lengths]
    padded = torch.full((4, 17), 300)
    for row, n in enumerate(lengths):
        padded[row, 17 - n :] = prompt(n, n)
    steps = torch.stack(list(stream(model, padded, 20, n_padding=torch.tensor([17 - n for n in lengths]))), dim=1)
    assert steps.tolist() == alone


@pytest.mark.parametrize("window", [None, 6, 100])
@torch.no_grad()
def test_every_sample_of_a_packed_row_sees_it(window: int | None) -> None:
    model, lengths = with_prefix(4, window), [9, 1, 14]
    samples = [prompt(n, n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    packed = model(torch.cat(samples, dim=1), positions, segments)
    torch.testing.assert_close(packed, torch.cat([model(s) for s in samples], dim=1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_is_switched_off_with_the_adapters() -> None:
    model, tokens = with_prefix(4), prompt(9)
    tuned = model(tokens)
    with adapters_off(model):
        assert torch.equal(model(tokens), tiny_model()(tokens))
    assert torch.equal(model(tokens), tuned)
    assert (tuned - tiny_model()(tokens)).abs().max() > 0.1


def test_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, ran = with_prefix(4).train(), list[int]()
        model.activation_checkpointing = checkpointing
        model.layers[0].mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        model(prompt(9)).logsumexp(-1).sum().backward()
        assert model.prefix is not None
        assert model.prefix.prompt_embeddings.grad is not None
        gradients.append(model.prefix.prompt_embeddings.grad)
        assert len(ran) == (2 if checkpointing else 1)  # again in backward
    assert gradients[0].abs().min() > 0
    assert torch.equal(gradients[1], gradients[0])


def test_the_fast_block_is_not_for_it() -> None:
    model = with_prefix(4)
    model.activation_checkpointing = True
    assert not fuse(model)
    assert all(type(block) is Block for block in model.layers)
    assert model.activation_checkpointing


def test_one_thing_is_added_at_a_time() -> None:
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(with_prefix(2), LoraConfig(rank=2))
    with pytest.raises(UserError, match="has adapters already"):
        add_prefix(add_lora(tiny_model(), LoraConfig(rank=2)), PrefixConfig(2))
