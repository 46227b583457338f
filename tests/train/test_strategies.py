"""Which weights learn, and the check that each of them moves."""

import pytest
import torch
from tiny_runs import MakeConfig, tiny_model
from torch import nn

from minilora.config import LoraConfig
from minilora.lora import add_lora
from minilora.train.strategies import MovementCheck, apply_strategy, trainable


@pytest.mark.parametrize("strategy", ["qlora", "lora"])
def test_adapters_alone_learn(make_config: MakeConfig, strategy: str) -> None:
    config = make_config(train__strategy=strategy, lora__targets=("q_proj", "down_proj"))
    model = apply_strategy(tiny_model(), config)
    assert set(trainable(model)) == {
        f"layers.{i}.{part}.lora_{letter}"
        for i in (0, 1)
        for part in ("self_attn.q_proj", "mlp.down_proj")
        for letter in "AB"
    }


def test_full_trains_every_weight(make_config: MakeConfig) -> None:
    model = apply_strategy(tiny_model(), make_config(train__strategy="full"))
    assert list(trainable(model)) == [name for name, _ in model.named_parameters()]
    assert not any("lora" in name for name in trainable(model))


def test_activation_checkpointing_is_set(make_config: MakeConfig) -> None:
    assert not apply_strategy(tiny_model(), make_config()).activation_checkpointing
    assert apply_strategy(tiny_model(), make_config(train__activation_checkpointing=True)).activation_checkpointing


def checked() -> tuple[dict[str, nn.Parameter], MovementCheck]:
    """The adapters of one layer after a first update: gradients everywhere, only B has moved."""
    weights = trainable(add_lora(tiny_model(), LoraConfig(rank=2, targets=("o_proj",))))
    check = MovementCheck(weights)
    for name, p in weights.items():
        p.grad = torch.ones_like(p)
        if name.endswith("lora_B"):
            p.data += 0.1
    return weights, check


def test_a_may_stand_still_in_the_first_update_only() -> None:
    _, check = checked()
    assert check.still(1, 1e-3) == []
    assert check.still(2, 1e-3) == [f"layers.{i}.self_attn.o_proj.lora_A (did not move)" for i in (0, 1)]


def test_b_may_not() -> None:
    weights, check = checked()
    name = "layers.1.self_attn.o_proj.lora_B"
    weights[name].data.zero_()
    assert check.still(1, 1e-3) == [f"{name} (did not move)"]


def test_a_tensor_without_a_gradient_is_named_even_in_the_first_update() -> None:
    weights, check = checked()
    name = "layers.0.self_attn.o_proj.lora_A"
    weights[name].grad = None
    assert check.still(1, 1e-3) == [f"{name} (got no gradient)"]


def test_all_that_moved_passes() -> None:
    weights, check = checked()
    for p in weights.values():
        p.data += 0.1
    assert check.still(2, 1e-3) == []


def test_one_bit_of_one_number_is_a_movement() -> None:
    weights, check = checked()
    for p in weights.values():
        number = p.data.view(-1)[:1]
        number.copy_(number.nextafter(torch.ones(1)))
    assert check.still(2, 1e-3) == []


@pytest.mark.parametrize(("lr", "excused"), [(0.0, True), (1e-8, True), (1e-6, False)])
def test_excused_is_what_the_learning_rate_is_too_small_for(lr: float, excused: bool) -> None:
    """1 + 1e-8 is 1 in float32: the norms in the first updates of a long warm-up."""
    ones = nn.Parameter(torch.ones(3))
    check = MovementCheck({"norm.weight": ones})
    ones.grad = torch.ones(3)
    assert (check.still(1, lr) == []) == excused
