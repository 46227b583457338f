"""Which weights learn, and the check that each of them moves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import TINY, MakeConfig, tiny_model
from torch import nn

from minilora.config import LoraConfig, TrainConfig
from minilora.errors import UserError
from minilora.fast_block import FusedBlock, fuse
from minilora.fused import Keep
from minilora.lora import add_lora
from minilora.model import Mistral
from minilora.train.strategies import MovementCheck, apply_strategy, learned_names, trainable


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


PARTIAL: list[tuple[dict[str, Any], set[str]]] = [
    ({"layers": 1}, {"layers.1"}),
    ({"layers": 2}, {"layers.0", "layers.1"}),
    ({"parameters": ("lm_head", "norm")}, {"lm_head", "norm"}),
    ({"parameters": ("layers.0.mlp.*",)}, {"layers.0.mlp"}),
    ({"parameters": ("layers.*.self_attn.q_proj.weight",)}, {f"layers.{i}.self_attn.q_proj" for i in (0, 1)}),
    ({"layers": 1, "parameters": ("embed_tokens",)}, {"layers.1", "embed_tokens"}),
]


@pytest.mark.parametrize(("which", "holders"), PARTIAL)
def test_partial_trains_what_is_named(make_config: MakeConfig, which: dict[str, Any], holders: set[str]) -> None:
    model = apply_strategy(
        tiny_model(), make_config(train__strategy="partial", **{f"train__{k}": v for k, v in which.items()})
    )
    expected = [n for n, _ in model.named_parameters() if any(n.startswith(f"{holder}.") for holder in holders)]
    assert list(trainable(model)) == expected
    assert 0 < len(expected) < len(list(model.parameters()))


def test_a_tied_head_learns_as_the_embedding() -> None:
    tied = replace(TINY, tied_embeddings=True)
    assert learned_names(tied, TrainConfig(strategy="partial", parameters=("embed_tokens",))) == {"embed_tokens.weight"}
    with pytest.raises(UserError, match=r"no parameter is called 'lm_head'"):
        learned_names(tied, TrainConfig(strategy="partial", parameters=("lm_head",)))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TrainConfig(strategy="partial", layers=3), "train.layers is 3, but the model has 2 layers"),
        (TrainConfig(strategy="full", reinit="top:3"), "train.reinit is 'top:3', but the model has 2 layers"),
        (TrainConfig(strategy="partial", parameters=("lm_hed",)), "no parameter is called 'lm_hed'; near: lm_head"),
        (
            TrainConfig(strategy="partial", parameters=("layers.2.mlp",)),
            "no parameter is called 'layers.2.mlp'; near: .*layers.1.mlp",
        ),
        (TrainConfig(strategy="partial", layers=1, reinit="top:2"), "train.reinit 'top:2' draws weights anew that"),
        (TrainConfig(strategy="partial", parameters=("layers.1.mlp",), reinit="top:1"), "train.reinit 'top:1' draws"),
    ],
)
def test_what_cannot_learn_is_refused(train: TrainConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learned_names(TINY, train)


@pytest.mark.parametrize(
    ("strategy", "reinit", "begun"),
    [
        ("full", "all", ("",)),
        ("full", "top:1", ("layers.1.",)),
        ("full", "none", ()),
        ("partial", "top:2", ("layers.0.", "layers.1.")),
    ],
)
def test_reinit_draws_as_a_new_model_is_drawn(
    make_config: MakeConfig, strategy: str, reinit: str, begun: tuple[str, ...]
) -> None:
    layers = 2 if strategy == "partial" else None
    config = make_config(train__strategy=strategy, train__reinit=reinit, train__seed=3, train__layers=layers)
    base = tiny_model()
    with torch.no_grad():
        base.layers[1].input_layernorm.weight.mul_(2)  # type: ignore[union-attr]
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = apply_strategy(base, config)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    matrices = {name for name, p in before.items() if p.dim() == 2 and name.startswith(begun)}
    assert moved == matrices | {name for name in ("layers.1.input_layernorm.weight",) if name.startswith(begun)}
    new = Mistral(TINY)
    new.init_weights(3)
    for name in moved:
        mine, fresh = model.get_parameter(name).detach(), new.get_parameter(name).detach()
        assert mine.dim() < 2 or float(mine.std()) == pytest.approx(float(fresh.std()), rel=0.2), name
        assert reinit != "all" or torch.equal(mine, fresh)
    again = apply_strategy(tiny_model(), config)
    assert all(torch.equal(model.get_parameter(name), again.get_parameter(name)) for name in moved)


def test_the_fast_block_is_plain_loras_alone(make_config: MakeConfig) -> None:
    def is_fast(**changes: Any) -> bool:
        return isinstance(apply_strategy(tiny_model(), make_config(**changes)).layers[0], FusedBlock)

    assert is_fast(train__strategy="lora")
    assert is_fast(train__strategy="lora", lora__rslora=True)
    assert not is_fast(train__strategy="lora", lora__dora=True)
    assert not is_fast(train__strategy="lora", lora__dropout=0.1)
    assert not is_fast(train__strategy="prefix")
    assert not is_fast(train__strategy="partial", train__layers=1)
    frozen = add_lora(tiny_model(), LoraConfig(rank=2, dora=True)).requires_grad_(False)
    assert not fuse(frozen), "not even where nothing learns"


def test_activation_checkpointing_is_set(make_config: MakeConfig) -> None:
    """Fast blocks see to it themselves."""
    for checkpointing, keep in ((False, Keep.ALL), (True, Keep.INPUT)):
        set_ = {"train__activation_checkpointing": checkpointing}
        plain = apply_strategy(tiny_model(), make_config(**set_, train__strategy="lora", lora__dora=True))
        assert plain.activation_checkpointing == checkpointing
        fast = apply_strategy(tiny_model(), make_config(**set_, train__strategy="lora"))
        assert not fast.activation_checkpointing
        assert all(block.keep == keep for block in fast.layers)


def test_numbers_that_move_up_and_down_alike_have_moved() -> None:
    """Half of a vector near 1 goes up and half down, by the same amount, as Adam's first step has it."""
    for seed in range(200):
        torch.manual_seed(seed)
        weight = nn.Parameter(1 + 0.4 * torch.rand(64))
        check = MovementCheck({"m": weight})
        weight.grad = torch.ones(64)
        with torch.no_grad():
            weight += 2e-5 * torch.tensor([1.0, -1.0]).repeat(32)[torch.randperm(64)]
        assert check.still(2, lr=2e-5) == []


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


@pytest.mark.parametrize("nothing", [None, torch.zeros(32, 2)])
def test_a_tensor_without_a_gradient_is_named_even_in_the_first_update(nothing: torch.Tensor | None) -> None:
    """Also where it has moved, by weight decay."""
    weights, check = checked()
    name = "layers.0.self_attn.o_proj.lora_B"
    weights[name].grad = nothing
    assert check.still(1, 1e-3) == [f"{name} (got no gradient)"]


def test_a_must_have_a_gradient_in_the_second_update() -> None:
    weights, check = checked()
    for p in weights.values():
        p.data += 0.1
    name = "layers.0.self_attn.o_proj.lora_A"
    weights[name].grad = torch.zeros_like(weights[name])
    assert check.still(1, 1e-3) == []
    assert check.still(2, 1e-3) == [f"{name} (got no gradient)"]


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
