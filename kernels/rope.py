"""The rotation of queries and keys: (a, b) -> (a cos - b sin, b cos + a sin) for the half-split pairs of each head.

A program takes one token and some of its heads, which share cos and sin. A thread takes eight pairs, so two loads and
two stores of 16 bytes in 16 bits. x may have strides: a slice of a wider product, or attention's heads before tokens.

Bytes moved a number of 16 bits: 2 read, 2 written. In float32, rounded once, where the definition rounds each product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_table import on
from minilora.kernels.norm import DTYPES, fitting, warps

PAIRS = 2048  # of a program, at most: 32 heads of 128


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rope.rotate` does, with the same arguments.

    Raises ValueError where x is not (N, H, Dh) with an even Dh, and as `fitting` and `on` do.
    """
    return _turn(x, cos, sin, 1.0, 0).view(x.shape)


def rotate_back(dx: Tensor, cos: Tensor, sin: Tensor, room: int = 0) -> Tensor:
    """What `rope.rotate_back` does, with the same arguments. Raises ValueError as `rotate` does."""
    return _turn(dx, cos, sin, -1.0, room)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, turn: float, room: int) -> Tensor:
    """(N, H * Dh + room)."""
    if x.dim() != 3 or 0 in x.shape or x.shape[2] % 2 or x.dtype not in DTYPES or x.layout != torch.strided:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}, {x.layout}; it must be (N, H, Dh) with an even Dh, float32, float16 or "
            "bfloat16, strided"
        )
    x = x.resolve_neg() if x.stride(2) == 1 else x.resolve_neg().contiguous()
    (n, heads, width), half = x.shape, x.shape[2] // 2
    out = torch.empty(n, heads * width + room, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(half)
    some = min(triton.next_power_of_2(heads), max(1, PAIRS // block))
    with on(x.device):
        rotate_kernel[(n, triton.cdiv(heads, some))](
            x=x,
            cos=fitting("cos", cos, (n, half), x.device),
            sin=fitting("sin", sin, (n, half), x.device),
            out=out[:, : heads * width],
            heads=heads,
            row_stride=x.stride(0),
            head_stride=x.stride(1),
            pitch=heads * width + room,
            turn=turn,
            HALF=half,
            HEADS=some,
            BLOCK=block,
            num_warps=warps(2 * some * block),
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    heads,
    row_stride,
    head_stride,
    pitch,
    turn,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x (n, heads, 2 * HALF) of any strides but the last, cos, sin (n, HALF) -> out (n, heads * 2 * HALF), turned
    `turn` = 1 or -1 times. pitch: from one row of out to the next."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (pair < HALF)
    at = row * row_stride + head * head_stride + pair
    a = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + row * HALF + pair, mask=pair < HALF, other=0).to(tl.float32)
    s = tl.load(sin + row * HALF + pair, mask=pair < HALF, other=0).to(tl.float32) * turn
    to = row * pitch + head * (2 * HALF) + pair
    tl.store(out + to, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)
