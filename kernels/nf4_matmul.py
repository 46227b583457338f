"""y = x W'^T for some 3 to 256 rows of x, W in NF4, decoded within the loop over K: tensor cores, and no full-size W'.

    y^T (N, M) = W' (N, K) x^T (K, M)

W is the left operand, because the left one of a Hopper product may stay in registers, where it was decoded, and because
its rows are many whatever M is. A step of the loop takes 64 columns: one block of each row, so one absmax. Each weight
is rounded to x's dtype after its product with absmax, as dequantizing would; sums are float32.

Bytes moved: 0.516 a weight for each BM rows of x. Bound by instructions: the decoding is done again for every BM rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import load_absmax
from minilora.kernels.nf4_matvec import check_product
from minilora.kernels.nf4_table import decode, table
from minilora.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, dynamic_map, levels

MAX_ROWS = 256
BN = 128


def matmul(x: Tensor, weight: NF4Tensor, shuffle: bool = False) -> Tensor:
    """x (M, K), 1 <= M <= 256, times the transpose of a weight (N, K) -> (M, N) in x's dtype.

    shuffle: look levels up by exchange between lanes, in PTX (`nf4_table`)

    Raises ValueError as `nf4_matvec.matvec` does.
    """
    check_product(x, weight, MAX_ROWS)
    m, (n, k) = len(x), weight.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    nested = weight.nested_absmax is not None
    bm = min(128, max(16, triton.next_power_of_2(m)))
    matmul_kernel[(triton.cdiv(n, BN), triton.cdiv(m, bm))](
        x.contiguous(),
        weight.packed.view(torch.int32),
        levels(x.device),
        weight.absmax,
        dynamic_map(x.device) if nested else None,
        weight.nested_absmax,
        weight.nested_offset,
        y,
        m,
        n,
        k // 8,
        block_words=weight.block_size // 8,
        nested_block=NESTED_BLOCK_SIZE,
        is_nested=nested,
        BM=bm,
        BN=BN,
        WORDS=min(8, weight.block_size // 8),
        SHUFFLE=shuffle,
        num_warps=8 if bm > 64 else 4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return y


@triton.jit
def matmul_kernel(
    x,
    packed,
    levels,
    absmax,
    dynamic_map,
    nested_absmax,
    nested_offset,
    y,
    m,
    n,
    n_words,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WORDS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """x (m, 8 * n_words), packed (n, n_words) int32 -> y (m, n). WORDS: of a step, no more than a block has."""
    entries = table(levels, SHUFFLE)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BM + tl.arange(0, BM)  # of y^T: a row of x
    word_at = row.to(tl.int64)[:, None] * n_words + tl.arange(0, WORDS)[None, :]
    block = row.to(tl.int64) * (n_words // block_words)
    x_at = column.to(tl.int64)[None, :] * (8 * n_words) + tl.arange(0, 8 * WORDS)[:, None]
    sums = tl.zeros((BN, BM), tl.float32)
    for first in range(0, n_words, WORDS):
        word = tl.load(packed + word_at + first, mask=row[:, None] < n, other=0)
        scale = load_absmax(
            absmax,
            dynamic_map,
            nested_absmax,
            nested_offset,
            block + first // block_words,
            row < n,
            nested_block,
            is_nested,
        )
        x_tile = tl.load(x + x_at + 8 * first, mask=column[None, :] < m, other=0)
        v = decode(entries, word, SHUFFLE)
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
        w = tl.reshape(tl.join(even, odd), (BN, 8 * WORDS)) * scale[:, None]
        sums = tl.dot(w.to(x_tile.dtype), x_tile, sums, input_precision="ieee")
    y_at = column.to(tl.int64)[None, :] * n + row[:, None]
    tl.store(y + y_at, sums.to(y.dtype.element_ty), mask=(row[:, None] < n) & (column[None, :] < m))
