"""y = W' x for one or two vectors x, W in NF4: each weight is decoded where it is used, and full-size W' is never written.

A program takes some rows of W. A thread takes a 32-bit word, eight weights of a row, multiplies them by their x, and the
sum by their absmax, once: they lie in one block. So the loop needs few instructions a weight, which is what bounds it
on a GPU with much bandwidth: at 3 TB/s a weight's 0.516 bytes leave room for 4.9 (H100).

Sums are float32, in another order than the definition's; no product is rounded to 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import is_whole, load_absmax
from minilora.kernels.nf4_table import decode, table
from minilora.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, dynamic_map, levels

ROWS, WORDS, WARPS = 32, 32, 4  # of a tile: eight rows a thread, which share what x costs
MAX_VECTORS = 2


def matvec(x: Tensor, weight: NF4Tensor, shuffle: bool = False) -> Tensor:
    """x (M, K), M = 1 or 2, times the transpose of a weight (N, K) -> (M, N) in x's dtype.

    shuffle: look levels up by exchange between lanes, in PTX (`nf4_table`)

    Raises ValueError where x does not fit the weight, M is larger, a row is not whole blocks, or bytes are no whole words.
    """
    check_product(x, weight, MAX_VECTORS)
    n_rows, k = weight.shape
    y = torch.empty(len(x), n_rows, dtype=x.dtype, device=x.device)
    nested = weight.nested_absmax is not None
    matvec_kernel[(triton.cdiv(n_rows, ROWS),)](
        x.contiguous(),
        weight.packed.view(torch.int32),
        levels(x.device),
        weight.absmax,
        dynamic_map(x.device) if nested else None,
        weight.nested_absmax,
        weight.nested_offset,
        y,
        n_rows,
        k // 8,
        block_words=weight.block_size // 8,
        nested_block=NESTED_BLOCK_SIZE,
        is_nested=nested,
        M=len(x),
        ROWS=ROWS,
        WORDS=WORDS,
        SHUFFLE=shuffle,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return y


def check_product(x: Tensor, weight: NF4Tensor, most: int) -> None:
    """Raise ValueError unless x (M, K), 1 <= M <= `most`, can be multiplied by a weight (N, K) word by word."""
    if len(weight.shape) != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1] or not 1 <= len(x) <= most:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {weight.shape}, at most {most} rows"
        )
    if not x.is_floating_point() or x.device != weight.packed.device:
        raise ValueError(f"x is {x.dtype} on {x.device}; it must be floating point on {weight.packed.device}")
    if weight.shape[1] % weight.block_size:
        raise ValueError(f"rows of {weight.shape[1]} weights are not whole blocks of {weight.block_size}")
    if not is_whole(weight.packed):
        raise ValueError("the packed bytes do not begin at a multiple of four bytes")


@triton.jit
def matvec_kernel(
    x,
    packed,
    levels,
    absmax,
    dynamic_map,
    nested_absmax,
    nested_offset,
    y,
    n_rows,
    n_words,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """x (M, 8 * n_words), packed (n_rows, n_words) int32 -> y (M, n_rows)."""
    entries = table(levels, SHUFFLE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * n_words
    sums = tl.zeros((ROWS, WORDS), tl.float32)
    sums_2 = tl.zeros((ROWS, WORDS), tl.float32)
    for first in range(0, n_words, WORDS):
        column = first + tl.arange(0, WORDS)[None, :]
        inside = (row[:, None] < n_rows) & (column < n_words)
        word = tl.load(packed + at + column, mask=inside, other=0)
        scale = load_absmax(
            absmax,
            dynamic_map,
            nested_absmax,
            nested_offset,
            (at + column) // block_words,
            inside,
            nested_block,
            is_nested,
        )
        w = decode(entries, word, SHUFFLE)
        sums += dot8(w, x, column, n_words) * scale
        if M == 2:
            sums_2 += dot8(w, x + 8 * n_words, column, n_words) * scale
    tl.store(y + row, tl.sum(sums, axis=1).to(y.dtype.element_ty), mask=row < n_rows)
    if M == 2:
        tl.store(y + n_rows + row, tl.sum(sums_2, axis=1).to(y.dtype.element_ty), mask=row < n_rows)


@triton.jit
def dot8(w, x, column, n_words):
    """sum_j w[j] x[8 column + j], in float32."""
    v = vectors(x, column, n_words)
    total = w[0] * v[0]
    for j in tl.static_range(1, 8):
        total += w[j] * v[j]
    return total


@triton.jit
def vectors(x, column, n_words):
    """The eight parts (1, W) float32 of x that the words of `column` (1, W) are multiplied by."""
    at = tl.reshape(column, (column.shape[1], 1)) * 8 + tl.arange(0, 8)[None, :]
    values = tl.load(x + at, mask=at < n_words * 8, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (column.shape[1], 2, 2, 2)))
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0[None, :], v1[None, :], v2[None, :], v3[None, :], v4[None, :], v5[None, :], v6[None, :], v7[None, :]
