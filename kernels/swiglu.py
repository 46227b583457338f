"""h = silu(gate) * up and its backward, number by number.

A thread takes eight neighbours of each tensor, 16 bytes in 16 bits. Backward makes h again while gate and up are at
hand, and puts its three results where gate, dh and up were: a number is read before it is written, by the same thread,
and (N, F) is the widest tensor of a step.

Bytes moved a number of 16 bits: 4 read, 2 written; backward 6 and 6. In float32, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_table import on
from minilora.kernels.norm import DTYPES, fitting, two

BLOCK, WARPS = 1024, 4


def swiglu(gate: Tensor, up: Tensor, room: int = 0) -> Tensor:
    """What `swiglu.swiglu` does, with the same arguments. Raises ValueError as `fitting` and `on` do."""
    gate, up = _alike(gate=gate, up=up)
    n, f = gate.shape
    h = gate.new_empty(n, f + room)
    with on(gate.device):
        swiglu_kernel[(n, triton.cdiv(f, BLOCK))](
            gate, up, h[:, :f], f, f + room, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
        )
    return h


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `swiglu.swiglu_backward` does, with the same arguments. Raises ValueError as `fitting` and `on` do."""
    gate, up = _alike(gate=gate, up=up)
    (n, f), width = gate.shape, max(gate.shape[1], dh.shape[-1])
    dh = fitting("dh", dh, (n, width), gate.device, (gate.dtype,), apart=True)
    with on(gate.device):
        swiglu_back_kernel[(n, triton.cdiv(f, BLOCK))](
            dh[:, :f], gate, up, f, dh.stride(0), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
        )
    for written in (gate, dh, up):
        torch.autograd.graph.increment_version(written)  # a kernel writes behind autograd's back
    return gate, dh, up


def _alike(**tensors: Tensor) -> list[Tensor]:
    """The tensors with their numbers in order. Raises ValueError unless all are as the first."""
    first = next(iter(tensors.values()))
    of_first = two(first), first.device
    return [fitting(name, t, *of_first, DTYPES if t is first else (first.dtype,)) for name, t in tensors.items()]


@triton.jit
def swiglu_kernel(gate, up, h, f, pitch, BLOCK: tl.constexpr):
    """gate, up, h (n, f). pitch: from one row of h to the next."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * f + column, column < f
    g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    tl.store(h + row * pitch + column, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_back_kernel(dh, gate, up, f, pitch, BLOCK: tl.constexpr):
    """dh, gate and up (n, f) become d_gate, h and d_up. pitch: from one row of dh to the next."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, in_dh, inside = row * f + column, row * pitch + column, column < f
    g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    d = tl.load(dh + in_dh, mask=inside, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    tl.store(gate + at, (silu * u).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + at, (d * silu).to(up.dtype.element_ty), mask=inside)
    tl.store(dh + in_dh, (d * u * (s + silu * (1 - s))).to(dh.dtype.element_ty), mask=inside)
