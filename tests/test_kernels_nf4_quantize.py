"""The quantize kernel against the definition, byte for byte: in Triton's interpreter, or on a GPU."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE

from minilora import nf4
from minilora.errors import UserError
from minilora.kernels.nf4_quantize import quantize_nf4

TILE = 4096


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    made = torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE)


def assert_same(values: torch.Tensor, block_size: int = 64, double_quant: bool = True) -> None:
    ours, theirs = (make(values, block_size, double_quant) for make in (quantize_nf4, nf4.quantize_nf4))
    for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
        mine, defined = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (defined is None)
        assert mine is None or torch.equal(mine, defined), name
    assert (ours.shape, ours.dtype, ours.block_size) == (theirs.shape, theirs.dtype, theirs.block_size)


SHAPES = [(1,), (2,), (7,), (63,), (64,), (65,), (129,), (5, 51), (16, 64), (TILE - 1,), (2 * TILE + 33,)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*product(SHAPES, [torch.float32]), *product([(5, 51), SHAPES[-1]], [torch.float16, torch.bfloat16])],
)
def test_any_shape(shape: tuple[int, ...], double_quant: bool, dtype: torch.dtype) -> None:
    assert_same(weight(*shape, dtype=dtype), double_quant=double_quant)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_any_block_size(block_size: int) -> None:
    assert_same(weight(2, 4096 + 97), block_size)


def test_many_nested_blocks() -> None:
    assert_same(weight(34, 1024))


def test_on_and_beside_every_threshold() -> None:
    """A tie goes to the lower code."""
    thresholds = nf4.thresholds()
    beside = [torch.nextafter(thresholds, torch.tensor(side)) for side in (-2.0, 2.0)]
    values = torch.cat([torch.ones(1), thresholds, *beside, nf4.levels(), torch.zeros(2)])
    assert len(values) == 64
    for scale in (1.0, 0.5, 3.0):
        assert_same((values * scale).to(DEVICE))


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 1e-37, 1e30, 3e38])
def test_the_ends_of_the_numbers(scale: float) -> None:
    values = torch.linspace(-1, 1, 200)
    assert_same((values * scale).to(DEVICE), double_quant=scale < 1e38)  # else the sum of the absmax is infinite


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_eight_bits(dtype: torch.dtype) -> None:
    assert_same(weight(3, 67).abs().to(dtype))


def test_a_negated_view() -> None:
    assert_same(torch._neg_view(weight(3, 67)))


def test_absmax_whose_sum_overflows() -> None:
    for make in (quantize_nf4, nf4.quantize_nf4):
        # The interpreter is numpy, which warns of inf / inf.
        with np.errstate(invalid="ignore"), pytest.raises(UserError, match="too large for double quantization"):
            make(torch.full((128,), 3e38, device=DEVICE))


def test_strides() -> None:
    assert_same(weight(64, 96).T)
    assert_same(weight(64, 96)[:, 1:66])
    assert_same(weight(96)[::2])


@pytest.mark.parametrize(("at", "bad"), [(0, float("nan")), (100, float("inf")), (4999, -float("inf"))])
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_no_number_is_refused_by_its_place(at: int, bad: float, double_quant: bool) -> None:
    values = weight(5000)
    values[at] = bad
    # The interpreter is numpy, which warns of inf * 0.
    with np.errstate(invalid="ignore"), pytest.raises(UserError, match=rf"element {at} \(counted flat\) is {bad}"):
        quantize_nf4(values, double_quant=double_quant)


def test_what_is_no_number_is_told_before_a_sum_that_overflows() -> None:
    values = torch.full((256,), 3e38, device=DEVICE)
    values[70] = float("nan")
    for make in (quantize_nf4, nf4.quantize_nf4):
        with np.errstate(invalid="ignore", over="ignore"), pytest.raises(UserError, match="element 70 "):
            make(values)


@pytest.mark.parametrize(
    ("values", "block_size"),
    [
        (torch.ones(4, dtype=torch.int32), 64),
        (torch.ones(0), 64),
        (torch.ones(64), 48),
        (torch.eye(8).to_sparse(), 64),
        (torch.ones(64, device="meta"), 64),
    ],
)
@pytest.mark.parametrize("make", [quantize_nf4, nf4.quantize_nf4])
def test_what_is_no_weight(make: Any, values: torch.Tensor, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"cannot quantize|block_size is"):
        make(values, block_size)
