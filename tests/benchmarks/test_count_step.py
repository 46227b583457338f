"""The count of a step's launches: the formula is what was executed, what was executed is right, the page says it."""

import json
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from marks import interpreted
from tiny_runs import step_of
from torch import Tensor

from benchmarks.count_gpu import GPU, PretendedGPU
from benchmarks.count_step import (
    BEGIN,
    END,
    KINDS,
    LARGE,
    LENGTH,
    PAGE,
    PLAN,
    PRODUCTS,
    RANK,
    SMALL,
    by_kind,
    differences,
    formula,
    of_large,
    told,
)
from benchmarks.feeds import random_batch
from benchmarks.harness import RESULTS, _rounded
from benchmarks.ledger import Cell, random_model, run_config
from benchmarks.shapes import projection_shapes, qlora_step_flops, shape
from benchmarks.table import between
from minilora.ahead import Ahead
from minilora.dispatch import entry_for
from minilora.fused import Keep
from minilora.train.setup import optimizer_for
from minilora.train.step import LossScale, StepResult, backward_of
from minilora.train.strategies import apply_strategy, trainable

CASES = [("grouped heads", keep) for keep in Keep] + [("as many key heads", keep) for keep in (Keep.INPUT, Keep.ALL)]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("name", "keep"), CASES)
def test_the_formula_is_the_count(name: str, keep: Keep) -> None:
    assert differences(name, keep) == []


@cache
def step(pretends: bool, n_steps: int = 1, ahead: Ahead | None = None) -> tuple[StepResult, list[Tensor], int]:
    """Of a small shape in float16: what it did, what it learnt and how many launches were seen."""
    sizes, rows, length, rank = SMALL["grouped heads"]
    run = run_config(Cell("", rows, length, "float16"), rank)
    torch.manual_seed(0)
    model = apply_strategy(random_model(sizes, torch.float16), run).train()
    for weight in trainable(model).values():
        torch.nn.init.normal_(weight, std=0.05)
    batch, scale = random_batch(rows, length, sizes.vocab_size), LossScale.of(torch.float16)
    gpu = PretendedGPU()
    with gpu if pretends else nullcontext():
        assert (model.device == GPU) == pretends
        optimizer = optimizer_for(trainable(model), run)
        backward = backward_of(model, optimizer, ahead=ahead)
        for _ in range(n_steps):
            done = step_of(model, optimizer, [batch], 1e-2, 0.0, scale, backward)
    assert model.device.type == "cpu"
    return done, [weight.detach().clone() for weight in trainable(model).values()], len(gpu.launches)


@interpreted
def test_what_is_counted_is_a_step() -> None:
    """The pretended GPU's loss, gradient and second update are the CPU's, but for 16-bit rounding."""
    (here, learnt, none), (there, counted, some) = step(False, 2), step(True, 2)
    assert (here.updated, there.updated, none) == (True, True, 0)
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    assert there.grad_norm == pytest.approx(here.grad_norm, rel=1e-2)
    # A first update is lr by the gradient's sign, so 2 lr apart where rounding turns it: 1 in 100, of weights of 0.05;
    # the second, of a running mean, turns no more.
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(learnt, counted, strict=True)) < 2 * 1e-2 / 0.05 * 0.1
    assert some > 100


@interpreted
@pytest.mark.slow
def test_weights_decoded_ahead_are_the_same_with_what_follows_them() -> None:
    """B's columns and A's rows, which each step casts anew."""
    ahead = Ahead(torch.device("cpu"))
    (done, learnt, _), (done_ahead, learnt_ahead, _) = step(True, 2), step(True, 2, ahead)
    sizes, *_, rank = SMALL["grouped heads"]
    shapes = {asked.shape for asked in ahead._order}
    assert {(sizes.hidden_dim, sizes.dim + rank), (sizes.hidden_dim + 2 * rank, sizes.dim)} <= shapes
    assert len(ahead._rooms) == 2
    assert done == done_ahead
    assert all(map(torch.equal, learnt, learnt_ahead))


@pytest.mark.parametrize("keep", Keep)
def test_launches_are_a_line_in_the_layers(keep: Keep) -> None:
    sizes = shape(LARGE)
    counts = [
        sum(part.launches for part in formula(sizes_of, 1, LENGTH, RANK, keep).values())
        for sizes_of in (type(sizes)(**vars(sizes) | {"n_layers": n}) for n in (1, 2, 32))
    ]
    assert counts[2] - counts[1] == 30 * (counts[1] - counts[0])


def test_flops_are_the_model_s_and_the_plan_s() -> None:
    """Keeping all, products and attention are `qlora_step_flops`, but that attention makes its scores again, and that
    products have the adapters' columns, forward's of B, and backward's of A, once a group of layers."""
    sums = by_kind(formula(shape(LARGE), 1, LENGTH, RANK, Keep.ALL))
    attention = sums["attention"].flops * 12 / 14
    columns = 2 * LENGTH * RANK * 32 * sum(out + in_ for out, in_ in projection_shapes(shape(LARGE)).values())
    assert sums["products"].flops - columns + attention == pytest.approx(
        qlora_step_flops(shape(LARGE), 1, LENGTH) - 2 * LENGTH * 4096 * 6144, rel=1e-3
    )  # the first block's q, k and v give no dx
    for name, planned in PLAN["gflop_per_token"].items():
        parts = formula(shape(LARGE), 1, LENGTH, RANK, Keep[name]).values()
        assert sum(part.flops for part in parts) / LENGTH / 1e9 == pytest.approx(planned, rel=0.01)


def test_so_many_rows_are_decoded_for_as_it_was_counted() -> None:
    entry = entry_for(90)
    assert {entry.way(LENGTH, *of, torch.bfloat16) for of in projection_shapes(shape(LARGE)).values()} == {"dequantize"}


def test_the_page_and_the_result_say_what_the_formula_says() -> None:
    result = json.loads((RESULTS / "count_step.json").read_text())
    assert result["counted"] == _rounded(of_large()), "run python -m benchmarks.count_step"
    assert result["differences"] == []
    page = PAGE.read_text()
    assert between(page, told(result["counted"]), BEGIN, END) == page, "run python -m benchmarks.count_step"
    outs = {name: out for name, (out, _) in projection_shapes(shape(LARGE)).items()}
    again = {"ALL": 0, "INPUT": sum(outs.values()) - outs["down_proj"]}
    shapes = projection_shapes(shape(LARGE))
    widths = sum(in_ for name, (_, in_) in shapes.items() if name not in ("k_proj", "v_proj", "up_proj"))
    assert f"onto dx {4 * 32 * widths / 1e6:.1f}" in page  # a product for each group of layers with one input
    for name, said in (("INPUT", "10.5 MB"), ("ALL", "5.5")):  # what the page says that y would take
        assert f"{4 * 32 * (sum(outs.values()) + again[name]) / 1e6:.1f}" == said.split()[0]
        assert said in page
        figures = result["counted"]["policies"][name]
        kinds = figures["kinds"]
        beside = sum(kinds[kind]["mb_per_token"] for kind in KINDS if kind not in PRODUCTS)
        assert beside == pytest.approx(figures["beside_mb_per_token"], rel=1e-4)
