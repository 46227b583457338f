"""Floating point to NF4: absmax[b] = max |w| of block b, code[i] = number of thresholds below w[i] / absmax, packed.

A program takes some blocks whole, so that one pass reads the weights and writes all that is kept. The code is found by
halving: of the 15 rising thresholds compare with the eighth, then with the fourth of the half it falls into, and so on,
four look-ups without a branch. Absmax in 8 bits are coded likewise, eight look-ups into 255 midpoints, by a
second launch: their offset is a mean over all of them, so the first must have ended.

Bytes moved a weight, from a 16-bit dtype: 2 read, 1/2 + 4/64 written.

Whether NF4 can hold the numbers is asked last and once, when all is launched: there the CPU waits for the GPU, nowhere
before. The mean of the absmax is finite only if every weight is.

Equal bit for bit to `nf4.quantize_nf4`: a true division for the reciprocal, float32 products, no fused multiply-add.
"""

from math import isfinite

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.dynamic_8bit import dynamic_thresholds
from minilora.kernels.nf4_table import apart, on
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Tensor, check_absmax, check_weight, mean_absmax, thresholds

TILES = 4  # of a program
TILE = 1024  # weights: eight a thread, whose codes are packed without an exchange between threads
NESTED_TILE = 1024  # absmax of a program


def quantize_nf4(weight: Tensor, block_size: int = BLOCK_SIZE, double_quant: bool = True) -> NF4Tensor:
    """What `nf4.quantize_nf4` does, with the same arguments and errors, and those of `on`."""
    check_weight(weight, block_size)
    flat = weight.detach().resolve_neg().reshape(-1).contiguous()  # a strided vector stays one in reshape
    if flat.itemsize < 2:
        flat = flat.float()  # of the 8-bit floats, a GPU before Hopper knows some only
    n, device = flat.numel(), flat.device
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(triton.cdiv(n, block_size), dtype=torch.float32, device=device)
    blocks = max(1, TILE // block_size)
    with on(device):
        quantize_kernel[(triton.cdiv(len(absmax), blocks * TILES),)](
            flat,
            thresholds(device),
            packed,
            absmax,
            n,
            len(packed),
            block_size=block_size,
            blocks=blocks,
            TILES=TILES,
            enable_fp_fusion=False,
        )
    tensor = NF4Tensor(packed, absmax, tuple(weight.shape), weight.dtype, block_size)
    made = double_quantize(tensor, absmax.mean()) if double_quant else tensor
    # One number tells of all: the mean or, which cannot overflow, the largest.
    told = absmax.max() if made.nested_offset is None else made.nested_offset
    if not isfinite(told.item()):
        check_absmax(tensor, flat)
        mean_absmax(absmax)  # refuses a sum that overflows
    return made


def double_quantize(tensor: NF4Tensor, offset: Tensor) -> NF4Tensor:
    """The same weight with its absmax in 8 bits, as `nf4.double_quantize` has it. offset: (), their mean"""
    absmax, device = tensor.absmax, tensor.absmax.device
    codes = torch.empty(len(absmax), dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(triton.cdiv(len(absmax), NESTED_BLOCK_SIZE), dtype=torch.float32, device=device)
    blocks = NESTED_TILE // NESTED_BLOCK_SIZE
    with on(device):
        double_quantize_kernel[(triton.cdiv(len(nested_absmax), blocks),)](
            absmax,
            offset,
            dynamic_thresholds(device),
            codes,
            nested_absmax,
            len(absmax),
            block_size=NESTED_BLOCK_SIZE,
            blocks=blocks,
            enable_fp_fusion=False,
        )
    return NF4Tensor(tensor.packed, codes, tensor.shape, tensor.dtype, tensor.block_size, nested_absmax, offset)


@triton.jit
def quantize_kernel(
    weight,
    thresholds,
    packed,
    absmax,
    n,
    n_bytes,
    block_size: tl.constexpr,
    blocks: tl.constexpr,
    TILES: tl.constexpr,
):
    """weight (n,) -> packed (ceil(n/2),), absmax (ceil(n/block_size),) float32, not finite where a weight is not."""
    for tile in tl.static_range(TILES):
        block = (tl.program_id(0).to(tl.int64) * TILES + tile) * blocks + tl.arange(0, blocks)
        at = block[:, None] * block_size + tl.arange(0, block_size)[None, :]
        values = tl.load(weight + at, mask=at < n, other=0).to(tl.float32)
        # As integers, magnitudes keep their order, and what is no number is the largest; a float maximum passes it by.
        magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
        tl.store(absmax + block, largest, mask=block * block_size < n)
        scaled = values * tl.div_rn(1.0, divisor(largest))[:, None]
        byte = (tl.program_id(0).to(tl.int64) * TILES + tile) * (blocks * block_size // 2)
        byte += tl.arange(0, blocks * block_size // 2)
        tl.store(packed + byte, pack(thresholds, scaled), mask=byte < n_bytes)


@triton.jit
def double_quantize_kernel(
    absmax, offset, thresholds, codes, nested_absmax, n, block_size: tl.constexpr, blocks: tl.constexpr
):
    """absmax (n,) less offset () -> codes (n,) uint8 and nested_absmax (ceil(n/block_size),) float32."""
    block = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    at = block[:, None] * block_size + tl.arange(0, block_size)[None, :]
    values = tl.where(at < n, tl.load(absmax + at, mask=at < n, other=0) - tl.load(offset), 0.0)
    found, largest = encode_dynamic(thresholds, values)
    tl.store(nested_absmax + block, largest, mask=block * block_size < n)
    tl.store(codes + at, found, mask=at < n)


@triton.jit
def encode_dynamic(thresholds, values):
    """`dynamic_8bit.encode_dynamic`: of values (blocks, block_size) the codes, uint8, and the absmax (blocks,)."""
    largest = tl.max(tl.abs(values), axis=1)
    scaled = tl.div_rn(values, tl.broadcast_to(divisor(largest)[:, None], values.shape))
    return count_below(thresholds, scaled, 8).to(tl.uint8), largest


@triton.jit
def divisor(largest):
    """largest (blocks,), but at least 1e-38: below, the reciprocal would be infinite. A block of zeros stays zeros."""
    # A literal below 2^-126 is a float64 to Triton.
    return tl.maximum(largest, tl.full(largest.shape, 1e-38, tl.float32))


@triton.jit
def pack(thresholds, values):
    """values (blocks, block_size) -> their codes, packed, (blocks * block_size / 2,) uint8.

    Eight neighbours, which a thread holds, become eight tensors of one dimension, one number a thread. So what is
    looked up for them comes into the thread that wants it, by Triton 3.6, too.
    """
    eights = tl.reshape(values, (values.shape[0] * values.shape[1] // 8, 2, 2, 2))
    v0, v1, v2, v3, v4, v5, v6, v7 = apart(eights)
    even = tl.join(byte_of(thresholds, v0, v1), byte_of(thresholds, v4, v5))
    odd = tl.join(byte_of(thresholds, v2, v3), byte_of(thresholds, v6, v7))
    return tl.reshape(tl.join(even, odd), (values.shape[0] * values.shape[1] // 2,))


@triton.jit
def byte_of(thresholds, high, low):
    """The codes of two numbers."""
    return ((code(thresholds, high) << 4) | code(thresholds, low)).to(tl.uint8)


@triton.jit
def code(thresholds, values):
    """How many of the 15 rising thresholds are strictly below each value, int32.

    By halving. The thresholds of the first three steps are few enough to be chosen among; for the last it pays to load.
    """
    above = values > tl.load(thresholds + 7)
    count = tl.where(above, 8, 0)
    middle = tl.where(above, tl.load(thresholds + 11), tl.load(thresholds + 3))
    low = tl.where(above, tl.load(thresholds + 9), tl.load(thresholds + 1))
    high = tl.where(above, tl.load(thresholds + 13), tl.load(thresholds + 5))
    above = values > middle
    count += tl.where(above, 4, 0)
    count += tl.where(values > tl.where(above, high, low), 2, 0)
    return count + (values > tl.load(thresholds + count)).to(tl.int32)


@triton.jit
def count_below(thresholds, values, bits: tl.constexpr):
    """How many of the 2**bits - 1 rising thresholds are strictly below each value, int32."""
    count = tl.zeros_like(values).to(tl.int32)
    for i in tl.static_range(bits):
        step = 1 << (bits - 1 - i)
        threshold = tl.load(thresholds + count + (step - 1))
        count += tl.where(values > threshold, step, 0)
    return count
