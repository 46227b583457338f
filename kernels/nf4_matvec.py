"""y = W' x for one or two vectors x, W in NF4, decoded where it is used: full-size W' is never written.

A program takes eight rows of W. A thread takes four 32-bit words of each, 32 weights, which lie in one block: it
multiplies them by their x, which serves all eight rows, and their sum by the block's absmax, once. So the loop needs
few instructions a weight, which would bound it on a GPU with much bandwidth: at 3 TB/s a weight's 0.516 bytes leave
room for 5.0 (H100). With the shuffle it has 3.8 for one vector and 5.1 for two, without 6.7 and 8.1.

In the loop nothing goes through shared memory, so no warp waits for another: while one waits for memory, the others
multiply. That is why what is loaded has one dimension, a row by itself: Triton gives a thread the same columns of each
then, and has nothing to exchange. (So it is of x in 16 bits and rows of whole 128 weights, as Mistral's are; else loads
are narrower, and what they bring is exchanged.)

Where the rows are too few to fill a GPU, more warps take a row's weights between them: their sums meet in the end, in
a fixed order, so the same input gives the same bits, which atomics would not.

Sums are float32, in another order than the definition's; no product is rounded to 16 bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import check_nf4, is_whole, levels_and_absmax, load_absmax
from minilora.kernels.nf4_table import apart, decode, decode_kernel, joined, on, table
from minilora.nf4 import NF4Tensor, levels

ROWS = 8  # of a program; `joined` holds as many
WORDS = 4  # of a row in a thread's hands: 16 bytes, the widest load; no block is shorter
WARPS = (1, 2, 4)
MAX_VECTORS = 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BUSY = 16  # warps wanted on each multiprocessor: each loads 4 KB at a time, and 20 KB under way keep its memory busy


def matvec(x: Tensor, weight: NF4Tensor, shuffle: bool = False, warps: int | None = None) -> Tensor:
    """x (M, K), M = 1 or 2, times the transpose of a weight (N, K) -> (M, N) in x's dtype.

    shuffle: look levels up by exchange between lanes, in PTX (`nf4_table`)
    warps: 1, 2 or 4, which take a row's weights between them; None is as many as keep the device busy

    Absmax come after the sum of 32, so x of about 1e38 can give infinities where the definition gives numbers.

    Raises ValueError where x does not fit the weight, M is larger, a row is not whole blocks, bytes are no words, or of
    other warps; for shuffle in the interpreter; and as `check_nf4` and `on` do.
    """
    check_product(x, weight, MAX_VECTORS, shuffle)
    if warps is not None and warps not in WARPS:
        raise ValueError(f"warps is {warps!r}, but must be one of {WARPS}")
    n_rows, k = weight.shape
    if weight.n == 0:
        return x.new_zeros(len(x), n_rows)
    y = x.new_empty(len(x), n_rows)
    programs = triton.cdiv(n_rows, ROWS)
    lanes = 32 * (warps or warps_for(programs, k // 8, multiprocessors(x.device)))
    with on(x.device):
        matvec_kernel[(programs,)](
            x=x.resolve_neg().contiguous(),
            packed=weight.packed.view(torch.int32),
            **levels_and_absmax(weight),
            y=y,
            n_rows=n_rows,
            n_words=k // 8,
            M=len(x),
            LANES=lanes,
            EVEN=k // 8 % (WORDS * lanes) == 0,
            SHUFFLE=shuffle,
            num_warps=lanes // 32,
            enable_fp_fusion=True,
        )
    return y


def warps_for(programs: int, n_words: int, n_multiprocessors: int) -> int:
    """Of each program: as few as keep a GPU busy, so that each goes on for long; no more than a row has words for."""
    for warps in WARPS:
        if warps * programs >= BUSY * n_multiprocessors or 2 * warps * 32 * WORDS > n_words:
            break
    return warps


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


def check_product(x: Tensor, weight: NF4Tensor, most: int, shuffle: bool = False) -> None:
    """Raise ValueError unless x (M, K), 1 <= M <= `most`, can be multiplied by a weight (N, K) word by word, so looked
    up."""
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
    y,
    n_rows,
    n_words,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """x (M, 8 * n_words), packed (n_rows, n_words) int32 -> y (M, n_rows).

    LANES: threads of a program; EVEN: a row is whole steps of four words a thread
    """
    entries = table(levels, SHUFFLE)
    first_row = tl.program_id(0) * 8
    sums = tl.zeros((LANES, 8 * M), tl.float32)
    for first in range(0, n_words, 4 * LANES):
        column = first + 4 * tl.arange(0, LANES)  # a thread's first word
        inside = (column < n_words) | EVEN
        every = first + tl.arange(0, 4 * LANES)
        v = thirty_two(x, column, inside)
        v_2 = thirty_two(x + (M - 1) * 8 * n_words, column, inside)  # where M is 1, the same
        products = ()
        for r in tl.static_range(8):
            # Rows beyond the last are read as the last, so that the loop needs no mask for them.
            at = tl.minimum(first_row + r, n_rows - 1) * n_words
            words = tl.load(packed + at + every, mask=(every < n_words) | EVEN, other=0)
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
            w = decode_four(entries, words, SHUFFLE)
            product = dot32(w, v) * scale
            if M == 2:
                product = tl.join(product, dot32(w, v_2) * scale)
            products = products + (product,)  # type: ignore[assignment] # noqa: RUF005 - Triton knows no star
        sums += tl.reshape(joined(products), (LANES, 8 * M))
    at = tl.arange(0, 8 * M)
    row = first_row + at % 8
    tl.store(y + at // 8 * n_rows + row, tl.sum(sums, axis=0).to(y.dtype.element_ty), mask=row < n_rows)


@triton.jit
def thirty_two(x, column, inside):
    """The numbers of x, float32, that four words from `column` (T,) on are multiplied by: (T,) each, eight a word."""
    return (
        eight(x, column, inside),
        eight(x, column + 1, inside),
        eight(x, column + 2, inside),
        eight(x, column + 3, inside),
    )


@triton.jit
def eight(x, column, inside):
    at = 8 * column[:, None] + tl.arange(0, 8)[None, :]
    values = tl.load(x + at, mask=inside[:, None], other=0).to(tl.float32)
    return apart(tl.reshape(values, (column.shape[0], 2, 2, 2)))


@triton.jit
def decode_four(entries, words, SHUFFLE: tl.constexpr):
    """Levels of the codes of words (4 T,): as `thirty_two` has x."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (
        decode(entries, first, SHUFFLE),
        decode(entries, second, SHUFFLE),
        decode(entries, third, SHUFFLE),
        decode(entries, fourth, SHUFFLE),
    )


@triton.jit
def dot32(w, v):
    """(T,): the sum of the products of 32."""
    total = dot8(w[0], v[0])
    for word in tl.static_range(1, 4):
        total += dot8(w[word], v[word])
    return total


@triton.jit
def dot8(w, v):
    total = w[0] * v[0]
    for j in tl.static_range(1, 8):
        total += w[j] * v[j]
    return total
