"""y = W' x for one or two vectors x, W in NF4, decoded where it is used: full-size W' is never written.

A program takes some rows of W. A thread takes a 32-bit word, eight weights of a row, multiplies them by their x, and
their sum by their absmax, once: they lie in one block. So the loop needs few instructions a weight, which is what
bounds it on a GPU with much bandwidth: at 3 TB/s a weight's 0.516 bytes leave room for 4.9 (H100).

Where the rows are too few to fill a GPU, K is split between programs too, whose sums a second launch adds up: in a
fixed order, so the same input gives the same bits, which atomics would not.

Sums are float32, in another order than the definition's; no product is rounded to 16 bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import check_nf4, is_whole, levels_and_absmax, load_absmax
from minilora.kernels.nf4_table import apart, decode, decode_kernel, on, table
from minilora.nf4 import NF4Tensor, levels

ROWS, WORDS, WARPS = 32, 32, 4  # of a tile: eight rows a thread, which share what x costs
MAX_VECTORS = 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROGRAMS = 8  # wanted on each multiprocessor: enough loads under way to keep its memory busy


def matvec(x: Tensor, weight: NF4Tensor, shuffle: bool = False, splits: int | None = None) -> Tensor:
    """x (M, K), M = 1 or 2, times the transpose of a weight (N, K) -> (M, N) in x's dtype.

    shuffle: look levels up by exchange between lanes, in PTX (`nf4_table`)
    splits: parts of K in work at the same time, of whole tiles; None is as many as the device wants

    Absmax come after the sum of eight, so x of about 1e38 can give infinities where the definition gives numbers.

    Raises ValueError where x does not fit the weight, M is larger, a row is not whole blocks, bytes are no words, or
    splits are less than one; for shuffle in the interpreter; and as `check_nf4` and `on` do.
    """
    check_product(x, weight, MAX_VECTORS, shuffle, splits)
    n_rows, k = weight.shape
    if weight.n == 0:
        return x.new_zeros(len(x), n_rows)
    tiles = triton.cdiv(n_rows, ROWS)
    splits, part = split(k // 8, WORDS, tiles, PROGRAMS, x.device, splits)
    sums = torch.empty(splits, len(x), n_rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    with on(x.device):
        matvec_kernel[(tiles, splits)](
            x=x.resolve_neg().contiguous(),
            packed=weight.packed.view(torch.int32),
            **levels_and_absmax(weight),
            sums=sums,
            n_rows=n_rows,
            n_words=k // 8,
            part=part,
            M=len(x),
            ROWS=ROWS,
            WORDS=WORDS,
            EVEN=k // 8 % WORDS == 0,
            SHUFFLE=shuffle,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return sums[0] if splits == 1 else sums.sum(0).to(x.dtype)


def split(
    n_words: int, step: int, tiles: int, wanted: int, device: torch.device, splits: int | None = None
) -> tuple[int, int]:
    """(parts that a row's words are done in, words of each): whole steps, four at least, so many parts that `wanted`
    programs come on a multiprocessor where `tiles` programs do all rows; or as many as asked for."""
    steps = triton.cdiv(n_words, step)
    if splits is None:
        splits = min(wanted * multiprocessors(device) // tiles, steps // 4)
    part = triton.cdiv(steps, max(1, splits))
    return triton.cdiv(steps, part), part * step


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter's CPU counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def architecture(device: torch.device) -> int:
    """Such as 90 for compute capability 9.0; the interpreter takes the way of a Hopper GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def shuffle_is_right(device: torch.device) -> bool:
    """Whether the exchange between lanes finds what the plain look-up finds: tried on the device, once, with each byte
    at each place of a word, and in the loop of a small matvec.

    What it rests on, that lanes keep apart what looks like one value to the compiler, no compiler promises.
    """
    n_words, rows = 256, 40
    packed = torch.arange(4 * n_words, device=device).remainder(256).to(torch.uint8).view(4, n_words).T.flatten()
    found = [torch.empty(8, n_words, device=device) for _ in range(2)]
    for shuffle, out in enumerate(found):
        with on(device):
            decode_kernel[(n_words // 128,)](
                packed.view(torch.int32),
                levels(device),
                out,
                n_words,
                WORDS=128,
                SHUFFLE=bool(shuffle),
                enable_fp_fusion=False,
            )
    absmax = torch.linspace(0.5, 1, rows * n_words // 8, device=device)
    weight = NF4Tensor(packed.repeat(rows), absmax, (rows, 8 * n_words), torch.float32)
    x = torch.linspace(-1, 1, 8 * n_words, device=device)[None]
    plain, shuffled = (matvec(x, weight, shuffle) for shuffle in (False, True))
    return torch.equal(*found) and torch.allclose(plain, shuffled, rtol=1e-4, atol=1e-3)


def check_product(x: Tensor, weight: NF4Tensor, most: int, shuffle: bool = False, splits: int | None = None) -> None:
    """Raise ValueError unless x (M, K), 1 <= M <= `most`, can be multiplied by a weight (N, K) word by word, so looked
    up and split."""
    if len(weight.shape) != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1] or not 1 <= len(x) <= most:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {weight.shape}, at most {most} rows"
        )
    if x.dtype not in DTYPES or x.layout != torch.strided or x.device != weight.packed.device:
        raise ValueError(
            f"x is {x.dtype}, {x.layout}, on {x.device}; it must be float32, float16 or bfloat16, strided, on "
            f"{weight.packed.device}"
        )
    check_nf4(weight)
    if weight.shape[1] % weight.block_size:
        raise ValueError(f"rows of {weight.shape[1]} weights are not whole blocks of {weight.block_size}")
    if weight.n >= 1 << 34 or x.numel() >= 1 << 31:
        raise ValueError(f"{weight.shape} weights or x of shape {tuple(x.shape)} are more than 32 bits can count")
    if not is_whole(weight.packed):
        raise ValueError("the packed bytes do not begin at a multiple of four bytes")
    if splits is not None and (not isinstance(splits, int) or splits < 1):
        raise ValueError(f"splits is {splits!r}, but must be a whole number from 1 on")
    if shuffle and x.device.type == "cpu":
        raise ValueError("the interpreter knows no PTX, so there is no shuffle on a CPU")


@triton.jit
def matvec_kernel(
    x,
    packed,
    levels,
    absmax,
    dynamic_map,
    nested_absmax,
    nested_offset,
    sums,
    n_rows,
    n_words,
    part,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """x (M, 8 * n_words), packed (n_rows, n_words) int32 -> sums (splits, M, n_rows), each over `part` words.

    EVEN: a row is whole steps of WORDS
    """
    entries = table(levels, SHUFFLE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the last are read as the last, so that the loop needs no mask for them.
    at = tl.minimum(row, n_rows - 1)[:, None] * n_words
    y = tl.zeros((ROWS, WORDS), tl.float32)
    y_2 = tl.zeros((ROWS, WORDS), tl.float32)
    begin = tl.program_id(1) * part
    for first in range(begin, min(begin + part, n_words), WORDS):
        column = first + tl.arange(0, WORDS)[None, :]
        inside = (column < n_words) | EVEN
        word = tl.load(packed + at + column, mask=inside, other=0)
        scale = load_absmax(
            absmax,
            dynamic_map,
            nested_absmax,
            nested_offset,
            (at + column).to(tl.uint32) // block_words,  # unsigned: a shift
            inside,
            nested_block,
            is_nested,
        )
        w = decode(entries, word, SHUFFLE)
        y += dot8(w, x, column, inside) * scale
        if M == 2:
            y_2 += dot8(w, x + 8 * n_words, column, inside) * scale
    at_y = tl.program_id(1).to(tl.int64) * (M * n_rows) + row
    tl.store(sums + at_y, tl.sum(y, axis=1).to(sums.dtype.element_ty), mask=row < n_rows)
    if M == 2:
        tl.store(sums + at_y + n_rows, tl.sum(y_2, axis=1).to(sums.dtype.element_ty), mask=row < n_rows)


@triton.jit
def dot8(w, x, column, inside):
    """sum_j w[j] x[8 column + j], in float32."""
    v = vectors(x, column, inside)
    total = w[0] * v[0]
    for j in tl.static_range(1, 8):
        total += w[j] * v[j]
    return total


@triton.jit
def vectors(x, column, inside):
    """The eight parts (1, W) float32 of x that the words of `column` (1, W) are multiplied by."""
    at = tl.reshape(column, (column.shape[1], 1)) * 8 + tl.arange(0, 8)[None, :]
    mask = tl.broadcast_to(tl.reshape(inside, (column.shape[1], 1)), at.shape)
    values = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    v0, v1, v2, v3, v4, v5, v6, v7 = apart(tl.reshape(values, (column.shape[1], 2, 2, 2)))
    return v0[None, :], v1[None, :], v2[None, :], v3[None, :], v4[None, :], v5[None, :], v6[None, :], v7[None, :]
