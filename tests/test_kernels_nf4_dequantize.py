"""The dequantize kernel against the definition, bit for bit: in Triton's interpreter, or on a GPU."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, DTYPES

from minilora.kernels.nf4_dequantize import dequantize
from minilora.nf4 import NF4Tensor, quantize_nf4

TILE = 8 * 128  # weights


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (7,), (8,), (63,), (64,), (65,), (5, 51), (3, 67), (16, 64), (TILE + 1,), (8 * TILE + 24,)]
)
def test_any_shape(shape: tuple[int, ...], double_quant: bool, dtype: torch.dtype) -> None:
    packed = quantize_nf4(weight(*shape), double_quant=double_quant)
    assert torch.equal(dequantize(packed, dtype), packed.dequantize(dtype))


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_any_block_size(block_size: int) -> None:
    packed = quantize_nf4(weight(2, 4096 + 96), block_size=block_size)
    assert torch.equal(dequantize(packed, torch.float32), packed.dequantize(torch.float32))


def test_many_nested_blocks() -> None:
    packed = quantize_nf4(weight(3, 256 * 64 + 640))
    assert packed.nested_absmax is not None
    assert len(packed.nested_absmax) > 3
    assert torch.equal(dequantize(packed, torch.float16), packed.dequantize(torch.float16))


def test_every_byte() -> None:
    """All pairs of codes at each place in a word, with an absmax for each block."""
    n = 4 * 256 * 2
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(4).to(DEVICE)
    tensor = NF4Tensor(packed, torch.linspace(0.01, 3, n // 64).to(DEVICE), (n,), torch.float32)
    assert torch.equal(dequantize(tensor), tensor.dequantize())


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_bytes_that_lie_anywhere(shift: int) -> None:
    """Such as a part of a file's buffer, which is no whole words."""
    whole = quantize_nf4(weight(4, 96))
    moved = torch.empty(len(whole.packed) + shift, dtype=torch.uint8, device=DEVICE)
    moved[shift:] = whole.packed
    tensor = replace(whole, packed=moved[shift:])
    assert torch.equal(dequantize(tensor, torch.float32), whole.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "rows", "n_in"), [(1, 6, 64), (24, 5, 51), (16, 3, 80), (1, 9, 4096), (16, 9, 4096), (24, 1, 8)]
)
def test_columns_behind_the_rows(rank: int, rows: int, n_in: int, dtype: torch.dtype) -> None:
    packed, columns = quantize_nf4(weight(rows, n_in)), weight(rows, rank, seed=1)
    expected = torch.cat([packed.dequantize(dtype), columns.to(dtype)], dim=1)
    assert torch.equal(dequantize(packed, dtype, columns=columns), expected)
    out = torch.full((rows + 2, n_in + rank), 7.0, dtype=dtype, device=DEVICE)
    dequantize(packed, out=out[1:-1], columns=columns.to(dtype))
    assert torch.equal(out[1:-1], expected)
    assert bool((out[[0, -1]] == 7).all())


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        (torch.ones(5, 4), "as many as the rows"),
        (torch.ones(6), "as many as the rows"),
        (torch.ones(6, 4, device="meta"), "as many as the rows"),
        (torch.ones(4, 6).T, "contiguous floating point"),
        (torch.ones(6, 4, dtype=torch.int32), "contiguous floating point"),
    ],
)
def test_columns_that_do_not_fit(columns: torch.Tensor, why: str) -> None:
    columns = columns if columns.is_meta else columns.to(DEVICE)
    with pytest.raises(ValueError, match=why):
        dequantize(quantize_nf4(weight(6, 64)), columns=columns)
    with pytest.raises(ValueError, match=r"out must be contiguous, \(6, 68\)"):
        dequantize(quantize_nf4(weight(6, 64)), out=weight(6, 64), columns=weight(6, 4))


def test_into_memory_that_is_there() -> None:
    packed = quantize_nf4(weight(6, 64))
    out = torch.full((8, 64), 7.0, device=DEVICE)
    assert dequantize(packed, out=out[1:7]).data_ptr() == out[1:7].data_ptr()
    assert torch.equal(out[1:7], packed.dequantize(torch.float32))
    assert bool((out[[0, 7]] == 7).all())


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(6, 65),
        torch.empty(64, 6).T,
        torch.empty(6, 64, device="meta"),
        torch.ones(6, 64, dtype=torch.int32),
        torch.ones(6, 64).to(torch.float8_e4m3fn),
        torch._neg_view(torch.zeros(6, 64)),
        torch.zeros(6, 64).to_sparse(),
    ],
)
def test_memory_that_cannot_be_written_to(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantize(quantize_nf4(weight(6, 64)), out=out)


def test_eight_bits_are_too_few() -> None:
    with pytest.raises(ValueError, match="floating point of 16 bits or more"):
        dequantize(quantize_nf4(weight(6, 64)), torch.float8_e4m3fn)


def test_autograd_knows_of_memory_that_was_written_to() -> None:
    packed = quantize_nf4(weight(6, 64))
    saved, x = torch.ones(6, 64, device=DEVICE), torch.ones(6, 64, device=DEVICE, requires_grad=True)
    product = (x * saved).sum()
    dequantize(packed, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match="requires a gradient"):
        dequantize(packed, out=x)
    with torch.no_grad():
        assert dequantize(packed, out=x) is x
    with torch.inference_mode():
        assert torch.equal(dequantize(packed, out=torch.empty_like(saved)), saved)


def test_no_weights() -> None:
    nothing = NF4Tensor(
        torch.empty(0, dtype=torch.uint8, device=DEVICE), torch.empty(0, device=DEVICE), (0, 64), torch.float32
    )
    assert dequantize(nothing).shape == (0, 64)


def test_parts_that_are_not_what_the_kernel_reads() -> None:
    """It would read memory that is another's, or numbers that are not there."""
    plain, nested = quantize_nf4(weight(8, 64), double_quant=False), quantize_nf4(weight(8, 64))
    for tensor, changes, name in (
        (plain, {"packed": plain.packed.repeat_interleave(2)[::2]}, "packed must be 256 contiguous torch.uint8"),
        (plain, {"packed": plain.packed[:-1]}, "packed must be 256"),
        (plain, {"packed": plain.packed.view(torch.int8)}, "packed must be 256"),
        (plain, {"absmax": plain.absmax.double()}, "absmax must be 8 contiguous torch.float32"),
        (plain, {"absmax": plain.absmax[:7]}, "absmax must be 8"),
        (plain, {"absmax": plain.absmax.to("meta")}, "on meta"),
        (plain, {"packed": plain.packed.view(-1, 1)}, r"flattened; it is \(256, 1\)"),
        (plain, {"packed": plain.packed.to_sparse()}, "torch.sparse_coo"),
        (plain, {"absmax": torch._neg_view(plain.absmax)}, "torch.float32 negated"),
        (plain, {"block_size": 0}, "block_size is 0"),
        (plain, {"block_size": 48}, "block_size is 48"),
        (nested, {"nested_offset": None}, "nested_absmax and nested_offset must both be there"),
        (nested, {"absmax": plain.absmax}, "absmax must be 8 contiguous torch.uint8"),
        (nested, {"nested_absmax": torch.ones(2, device=DEVICE)}, "nested_absmax must be 1"),
        (nested, {"nested_offset": torch.ones((), dtype=torch.float64, device=DEVICE)}, "nested_offset must be 1"),
    ):
        with pytest.raises(ValueError, match=name):
            dequantize(replace(tensor, **changes))
