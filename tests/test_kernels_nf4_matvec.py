"""The matvec kernel against a product in float64: in Triton's interpreter, or on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_product, random

from minilora.kernels import nf4_matvec
from minilora.kernels.nf4_matvec import check_product, matvec, warps_for
from minilora.nf4 import NF4Tensor, quantize_nf4


def assert_close(x: torch.Tensor, weight: NF4Tensor) -> None:
    """No weight is rounded before it is multiplied."""
    assert_product(matvec(x, weight), x, weight.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("shape", [(1, 64), (15, 64), (9, 256), (16, 1088), (5, 576)])
def test_any_shape(shape: tuple[int, int], m: int, double_quant: bool, dtype: torch.dtype) -> None:
    weight = quantize_nf4(0.02 * random(*shape), double_quant=double_quant)
    assert_close(random(m, shape[1], seed=1).to(dtype), weight)


@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_any_block_size(block_size: int) -> None:
    assert_close(random(2, 512, seed=1), quantize_nf4(random(24, 512), block_size=block_size))


def test_one_weight_at_a_time() -> None:
    """In each row one that is not zero, each in another column, and x of powers of two: their products have the bits of
    W', and those of a weight at another's place would be others."""
    at = torch.arange(64)
    codes = torch.full((64, 64), 7, dtype=torch.uint8)  # zero
    codes[at, at] = (at % 15 + (at % 15 >= 7)).to(torch.uint8)
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).flatten().to(DEVICE)
    weight = NF4Tensor(packed, random(64).abs(), (64, 64), torch.float32)
    x = torch.stack([2.0 ** (at - 32), 2.0**-at]).to(DEVICE)
    assert torch.equal(matvec(x, weight), (x[:, None] * weight.dequantize(torch.float32)).sum(2))


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("k", [64, 512, 3 * 256 + 64])
def test_warps_share_a_row(k: int, warps: int) -> None:
    """Whole steps of theirs and a rest, and warps that are left with nothing."""
    weight, x = quantize_nf4(random(9, k)), random(2, k, seed=1)
    assert_product(matvec(x, weight, warps=warps), x, weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("programs", "n_words", "warps"),
    [
        pytest.param(3584, 512, 1, id="the rows fill a GPU"),
        pytest.param(768, 512, 4, id="rows for some multiprocessors"),
        pytest.param(512, 1792, 4, id="long rows"),
        pytest.param(512, 256, 2, id="a row has words for two"),
        pytest.param(1, 8, 1, id="a row has not words for one"),
    ],
)
def test_warps_of_an_h100(programs: int, n_words: int, warps: int) -> None:
    assert warps_for(programs, n_words, 132) == warps


def huge() -> NF4Tensor:
    """2^14 x 2^20 weights, of no memory."""
    n = 1 << 34
    packed = torch.empty(n // 2, dtype=torch.uint8, device="meta")
    return NF4Tensor(packed, torch.empty(n // 64, device="meta"), (1 << 14, 1 << 20), torch.float32)


def test_strides() -> None:
    weight = quantize_nf4(random(8, 128))
    x = random(128, 2, seed=1)
    assert torch.equal(matvec(x.T, weight), matvec(x.T.contiguous(), weight))


@pytest.mark.parametrize("shape", [(0, 64), (8, 0)])
def test_no_weights(shape: tuple[int, int]) -> None:
    """As torch has it, the sum of nothing is zero."""
    packed = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    nothing = NF4Tensor(packed, torch.empty(0, device=DEVICE), shape, torch.float32)
    assert torch.equal(matvec(random(2, shape[1]), nothing), torch.zeros(2, shape[0], device=DEVICE))


def test_a_negated_view() -> None:
    weight, x = quantize_nf4(random(8, 128)), random(2, 128, seed=1)
    assert torch.equal(matvec(torch._neg_view(x), weight), matvec(-x, weight))


def test_what_does_not_fit() -> None:
    weight = quantize_nf4(random(8, 128))
    for x in (random(3, 128), random(1, 64), random(128), random(0, 128)):
        with pytest.raises(ValueError, match="does not fit a weight of shape"):
            matvec(x, weight)
    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        matvec(torch.ones(1, 128, dtype=torch.int64, device=DEVICE), weight)
    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        matvec(random(1, 128).double(), weight)
    with pytest.raises(ValueError, match=r"x is torch\.float32, torch\.sparse_coo"):
        matvec(random(1, 128).to_sparse(), weight)
    with pytest.raises(ValueError, match="packed must be 512 contiguous"):
        matvec(random(1, 128), replace(weight, packed=weight.packed.repeat_interleave(2)[::2]))
    with pytest.raises(ValueError, match="more than 32 bits can count"):
        check_product(torch.empty(1, 1 << 20, device="meta"), huge(), 1)
    with pytest.raises(ValueError, match="on meta"):
        matvec(torch.ones(1, 128, device="meta"), weight)
    with pytest.raises(ValueError, match="not whole blocks of 64"):
        matvec(random(1, 96), quantize_nf4(random(8, 96)))
    moved = torch.empty(len(weight.packed) + 4, dtype=torch.uint8, device=DEVICE)[2:-2]
    with pytest.raises(ValueError, match="multiple of four bytes"):
        matvec(random(1, 128), replace(weight, packed=moved))
    for warps in (0, 3, 8):
        with pytest.raises(ValueError, match=f"warps is {warps}, but must be one of"):
            matvec(random(1, 128), weight, warps=warps)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="the interpreter knows no PTX"):
            matvec(random(1, 128), weight, shuffle=True)


@pytest.mark.parametrize("wrong", [(), ("look-up",), ("product",)])
def test_the_shuffle_is_held_against_the_plain_look_up(wrong: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins that look up plainly, and are off where they should shuffle."""
    plain_product, plain_look_up = nf4_matvec.matvec, nf4_matvec.decode_kernel

    def product(x: torch.Tensor, weight: NF4Tensor, shuffle: bool) -> torch.Tensor:
        return plain_product(x, weight) + (shuffle and "product" in wrong)

    def look_up(*arguments: Any, SHUFFLE: bool, **options: Any) -> None:
        plain_look_up[(2,)](*arguments, SHUFFLE=False, **options)
        arguments[2].add_(SHUFFLE and "look-up" in wrong)

    monkeypatch.setattr(nf4_matvec, "matvec", product)
    monkeypatch.setattr(nf4_matvec, "decode_kernel", {(2,): look_up})
    assert nf4_matvec.shuffle_is_right.__wrapped__(DEVICE) == (not wrong)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter knows no PTX")
def test_the_shuffle_on_a_gpu() -> None:
    assert nf4_matvec.shuffle_is_right(DEVICE)
