"""y = x W'^T for some 3 to 256 rows of x, W in NF4, decoded within the loop over K: tensor cores, and no full-size W'.

    y^T (N, M) = W' (N, K) x^T (K, M)

W is the left operand, because the left one of a Hopper product may stay in registers, where it was decoded, and because
its rows are many whatever M is. A step of the loop takes 64 columns: one block of each row, so one absmax. Each weight
is rounded to x's dtype after its product with absmax, as dequantizing would; sums are float32.

Where that makes too few programs to fill a GPU, K is split between them, whose sums a second launch adds up: in a fixed
order, so the same input gives the same bits, which atomics would not.

In float32 there are no tensor cores: a weight costs a multiplication for each row of x, so tiles are small, and beyond
one of them decoding first is better (`dispatch`).

Bytes moved: 0.516 a weight for each BM rows of x. Bound by instructions: the decoding is done again for every BM rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import levels_and_absmax, load_absmax
from minilora.kernels.nf4_matvec import architecture, check_product, multiprocessors
from minilora.kernels.nf4_table import decode, joined, on, table
from minilora.nf4 import NF4Tensor

MAX_ROWS = 256
BN = 128
PROGRAMS = 2  # wanted on each multiprocessor
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


def matmul(x: Tensor, weight: NF4Tensor, shuffle: bool = False, splits: int | None = None) -> Tensor:
    """x (M, K), 1 <= M <= 256, times the transpose of a weight (N, K) -> (M, N) in x's dtype.

    shuffle: look levels up by exchange between lanes, in PTX (`nf4_table`)
    splits: parts of K in work at the same time, of whole tiles; None is as many as the device wants

    Raises ValueError as `nf4_matvec.matvec` does, where splits are less than one, and where not `is_exact`.
    """
    check_product(x, weight, MAX_ROWS, shuffle)
    if splits is not None and (not isinstance(splits, int) or splits < 1):
        raise ValueError(f"splits is {splits!r}, but must be a whole number from 1 on")
    m, (n, k), arch = len(x), weight.shape, architecture(x.device)
    if not is_exact(x.dtype, arch):
        raise ValueError(f"Triton below 3.8 rounds float32 on sm_{arch}; x must be float16 or bfloat16")
    if weight.n == 0:
        return x.new_zeros(m, n)
    bm, warps = tile(m, arch, x.itemsize)
    words = min(8, weight.block_size // 8)
    tiles = triton.cdiv(n, BN), triton.cdiv(m, bm)
    splits, part = split(k // 8, words, tiles[0] * tiles[1], multiprocessors(x.device), splits)
    sums = torch.empty(splits, m, n, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    with on(x.device):
        matmul_kernel[(*tiles, splits)](
            x=x.resolve_neg().contiguous(),
            packed=weight.packed.view(torch.int32),
            **levels_and_absmax(weight),
            sums=sums,
            m=m,
            n=n,
            n_words=k // 8,
            part=part,
            BM=bm,
            BN=BN,
            WORDS=words,
            SHUFFLE=shuffle,
            num_warps=warps,
            num_stages=3,
            enable_fp_fusion=False,
        )
    return sums[0] if splits == 1 else sums.sum(0).to(x.dtype)


def split(n_words: int, step: int, tiles: int, n_multiprocessors: int, splits: int | None = None) -> tuple[int, int]:
    """(parts that a row's words are done in, words of each): whole steps, four at least, so many parts that PROGRAMS
    programs come on a multiprocessor where `tiles` programs do all rows; or as many as asked for."""
    steps = triton.cdiv(n_words, step)
    if splits is None:
        splits = min(PROGRAMS * n_multiprocessors // tiles, steps // 4)
    part = triton.cdiv(steps, max(1, splits))
    return triton.cdiv(steps, part), part * step


def is_exact(dtype: torch.dtype, arch: int) -> bool:
    """Whether products are of numbers in `dtype` as they are: before 3.8, Triton has the tensor cores of sm_100 round
    float32 to ten bits, whatever its input_precision."""
    return dtype != torch.float32 or not 100 <= arch < 120 or TRITON >= (3, 8)


def tile(m: int, arch: int, itemsize: int) -> tuple[int, int]:
    """(rows of x in a program's tile, warps) for M rows: as many as can be held in registers, for W to be decoded once.

    arch: such as 90
    itemsize: bytes of a number of x
    """
    # At most, and with four warps. Tensor cores of Hopper and sm_100 read x from shared memory, others from registers.
    most, by_four = (32, 16) if itemsize == 4 else (256, 64) if 90 <= arch < 120 else (128, 32)
    bm = min(most, max(16, triton.next_power_of_2(m)))
    return bm, 4 if bm <= by_four else 8


@triton.jit
def matmul_kernel(
    x,
    packed,
    levels,
    absmax,
    dynamic_map,
    nested_absmax,
    nested_offset,
    sums,
    m,
    n,
    n_words,
    part,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WORDS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """x (m, 8 * n_words), packed (n, n_words) int32 -> sums (splits, m, n), each over `part` words of a row.

    WORDS: of a step, no more than a block has
    """
    entries = table(levels, SHUFFLE)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BM + tl.arange(0, BM)  # of y^T: a row of x
    # What lies beyond the last is read as the last, so that the loop needs no masks.
    w_row, x_row = tl.minimum(row, n - 1), tl.minimum(column, m - 1)
    word_at = w_row[:, None] * n_words + tl.arange(0, WORDS)[None, :]
    block = w_row * (n_words // block_words)
    x_at = x_row[None, :] * (8 * n_words) + tl.arange(0, 8 * WORDS)[:, None]
    y = tl.zeros((BN, BM), tl.float32)
    begin = tl.program_id(2) * part
    for first in range(begin, min(begin + part, n_words), WORDS):
        word = tl.load(packed + word_at + first)
        scale = load_absmax(
            absmax,
            dynamic_map,
            nested_absmax,
            nested_offset,
            block + first // block_words,
            None,
            nested_block,
            is_nested,
        )
        x_tile = tl.load(x + x_at + 8 * first)
        w = tl.reshape(joined(decode(entries, word, SHUFFLE)), (BN, 8 * WORDS)) * scale[:, None]
        y = tl.dot(w.to(x_tile.dtype), x_tile, y, input_precision="ieee")
    y_at = (tl.program_id(2).to(tl.int64) * m + column[None, :]) * n + row[:, None]
    tl.store(sums + y_at, y.to(sums.dtype.element_ty), mask=(row[:, None] < n) & (column[None, :] < m))
