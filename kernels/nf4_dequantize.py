"""NF4 to floating point: w'[i] = LEVELS[code[i]] * absmax[i // 64], in one launch.

A thread takes one 32-bit word of the packed bytes, eight weights, which lie in one block. It looks each code up in the
table of 16 levels, multiplies by the block's absmax in float32, rounds once, and writes all eight, 16 bytes of a 16-bit
dtype, with one instruction. Absmax in 8 bits is decoded on the way: MAP[code] * nested_absmax + offset.

Bytes moved a weight, to a 16-bit dtype: 1/2 + 1/64 (+ 4/16384) read, 2 written: 2.516, so the stores are what it costs.
A GPU that copies at 3 TB/s and issues 29e12 instructions a second has room for 24 instructions a weight meanwhile; the
look-up takes about ten, so the table may be read as plainly as it is here.

What shall follow each row of the weight, an adapter's B (`projections.py`), is copied there on the way.

Equal bit for bit to `NF4Tensor.dequantize`: float32 products, one rounding, no fused multiply-add.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.dynamic_8bit import dynamic_map
from minilora.kernels.nf4_table import decode, joined, on
from minilora.nf4 import NESTED_BLOCK_SIZE, NF4Tensor, check_block_size, levels

WORDS = 128  # a tile's, one a thread: eight neighbouring results a thread need no exchange between threads
TILES = 8  # a program's


def dequantize(
    weight: NF4Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """What `NF4Tensor.dequantize` does, with the same arguments; and `columns` (rows, r) behind the weight's own, where
    `out` is (rows, in + r).

    Raises ValueError where `out` is not contiguous, of another shape, on another device, a negated view, not floating
    point of 16 bits or more, or wants a gradient, where `columns` are not contiguous floating point on that device, as
    many as the weight has rows, and as `check_nf4` and `on` do.
    """
    check_nf4(weight)
    shape, device, row, rank = weight.shape, weight.packed.device, 0, 0
    if columns is not None:
        if len(shape) != 2 or columns.dim() != 2 or len(columns) != shape[0] or columns.device != device:
            raise ValueError(f"columns must be as many as the rows of {shape}, on {device}; they are {told(columns)}")
        if not is_plain(columns) or not columns.is_floating_point():
            raise ValueError(f"columns must be contiguous floating point; they are {told(columns)}")
        row, rank = shape[1], columns.shape[1]
        shape = (shape[0], row + rank)
    if out is None:
        out = torch.empty(shape, dtype=dtype or weight.dtype, device=device)
    fits = tuple(out.shape) == shape and out.device == device
    if not fits or not is_plain(out) or not out.is_floating_point() or out.itemsize < 2:
        raise ValueError(
            f"out must be contiguous, {shape}, floating point of 16 bits or more, on {device}; it is {told(out)}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires a gradient, and there is none through it")
    words = weight.packed.view(torch.int32) if is_whole(weight.packed) else weight.packed
    programs = triton.cdiv(weight.n, 8 * WORDS * TILES)
    n_columns = 0 if columns is None else columns.numel()
    with on(out.device):
        dequantize_kernel[(programs,)](
            packed=words,
            **levels_and_absmax(weight),
            out=out,
            n=weight.n,
            columns=columns if n_columns else None,
            n_columns=n_columns,
            row=row,
            rank=rank,
            SHARE=triton.next_power_of_2(triton.cdiv(n_columns, max(1, programs))) if n_columns else 0,
            is_whole=words.dtype == torch.int32,
            WORDS=WORDS,
            TILES=TILES,
            enable_fp_fusion=False,
        )
    torch.autograd.graph.increment_version(out)  # a kernel writes behind autograd's back
    return out


def check_nf4(weight: NF4Tensor) -> None:
    """Raise ValueError unless a weight's parts are what the kernels take them for: they read memory, not tensors."""
    check_block_size(weight.block_size)
    nested_absmax, nested_offset = weight.nested_absmax, weight.nested_offset
    if (nested_absmax is None) != (nested_offset is None):
        raise ValueError("nested_absmax and nested_offset must both be there or neither")
    n_blocks = -(-weight.n // weight.block_size)
    wanted = [
        ("packed", weight.packed, torch.uint8, (weight.n + 1) // 2),
        ("absmax", weight.absmax, torch.float32 if nested_absmax is None else torch.uint8, n_blocks),
    ]
    if nested_absmax is not None and nested_offset is not None:
        wanted += [
            ("nested_absmax", nested_absmax, torch.float32, -(-n_blocks // NESTED_BLOCK_SIZE)),
            ("nested_offset", nested_offset.reshape(-1), torch.float32, 1),
        ]
    for name, part, dtype, n in wanted:
        if part.dtype != dtype or part.shape != (n,) or not is_plain(part) or part.device != weight.packed.device:
            raise ValueError(
                f"{name} must be {n} contiguous {dtype} on {weight.packed.device}, flattened; it is {told(part)}"
            )


def levels_and_absmax(weight: NF4Tensor) -> dict[str, Any]:
    """What every kernel that decodes is handed of a weight beside its bytes, by the kernels' names for it."""
    device, nested = weight.packed.device, weight.nested_absmax is not None
    return {
        "levels": levels(device),
        "absmax": weight.absmax,
        "dynamic_map": dynamic_map(device) if nested else None,
        "nested_absmax": weight.nested_absmax,
        "nested_offset": weight.nested_offset,
        "block_words": weight.block_size // 8,
        "nested_block": NESTED_BLOCK_SIZE,
        "is_nested": nested,
    }


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie in memory in order and as they are."""
    return tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_neg()


def told(tensor: Tensor) -> str:
    strides = f"strides {tensor.stride()}" if tensor.layout == torch.strided else tensor.layout
    return f"{tuple(tensor.shape)} {tensor.dtype}{' negated' * tensor.is_neg()}, {strides}, on {tensor.device}"


def is_whole(packed: Tensor) -> bool:
    """Whether the bytes are 32-bit words: a view asks it of their number and offset, a load of their address."""
    return packed.numel() % 4 == 0 and int(packed.storage_offset()) % 4 == 0 and packed.data_ptr() % 4 == 0


@triton.jit
def dequantize_kernel(
    packed,
    levels,
    absmax,
    dynamic_map,
    nested_absmax,
    nested_offset,
    out,
    n,
    columns,
    n_columns,
    row: tl.constexpr,
    rank: tl.constexpr,
    SHARE: tl.constexpr,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
    is_whole: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    """out (n,) from packed, (ceil(n/8),) int32, or the same as bytes where they are no whole words.

    columns: None, or (rows, rank) to follow each row of `row` numbers; a program copies SHARE of them
    """
    first = tl.program_id(0).to(tl.int64) * (WORDS * TILES)
    for tile in tl.static_range(TILES):
        word_index = first + tile * WORDS + tl.arange(0, WORDS)
        inside = word_index * 8 < n
        word = tl.load(packed + word_index, mask=inside, other=0) if is_whole else load_bytes(packed, word_index, n)
        scale = load_absmax(
            absmax,
            dynamic_map,
            nested_absmax,
            nested_offset,
            word_index // block_words,
            inside,
            nested_block,
            is_nested,
        )
        values = tl.reshape(joined(decode(levels, word, False)), (WORDS, 8)) * scale[:, None]
        at = (first + tile * WORDS) * 8 + tl.arange(0, WORDS * 8)
        into = at + at // row * rank if rank else at
        tl.store(out + into, tl.reshape(values, (WORDS * 8,)).to(out.dtype.element_ty), mask=at < n)
    if columns is not None:
        at = tl.program_id(0).to(tl.int64) * SHARE + tl.arange(0, SHARE)
        copied = tl.load(columns + at, mask=at < n_columns, other=0).to(out.dtype.element_ty)
        tl.store(out + at + (at // rank + 1) * row, copied, mask=at < n_columns)


@triton.jit
def load_bytes(packed, word_index, n):
    """Words (W,) int32 of bytes one by one, zeros beyond the last."""
    word = tl.zeros_like(word_index).to(tl.int32)
    for i in tl.static_range(4):
        byte = tl.load(packed + word_index * 4 + i, mask=(word_index * 8 + 2 * i) < n, other=0)
        word |= byte.to(tl.int32) << (8 * i)
    return word


@triton.jit
def load_absmax(
    absmax,
    dynamic_map,
    nested_absmax,
    nested_offset,
    block,
    inside,
    nested_block: tl.constexpr,
    is_nested: tl.constexpr,
):
    """The absmax of blocks (W,), float32, decoded where they are stored in 8 bits. inside: a mask (W,), or None."""
    scale = load_inside(absmax + block, inside)
    if is_nested:
        nested = load_inside(nested_absmax + block // nested_block, inside)
        scale = tl.load(dynamic_map + scale.to(tl.int32)) * nested + tl.load(nested_offset)
    return scale


@triton.jit
def load_inside(at, inside):
    return tl.load(at) if inside is None else tl.load(at, mask=inside, other=0)
