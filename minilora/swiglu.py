"""SwiGLU's elementwise half (https://arxiv.org/abs/2002.05202): h = silu(gate) * up, silu(g) = g s, s = 1 / (1 + e^-g).

    d_up = dh silu(gate)        d_gate = dh up s (1 + gate (1 - s))

`model.MLP` says the whole, with `gated`; the others are what the fast block (`fused.py`) does of it, by a kernel on a
GPU. Backward makes h again on its way, since the gradient of down_proj's adapter needs it.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from minilora.compiled import compilable
from minilora.dispatch import kernel_on_gpu, undifferentiated_on_gpu


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """h (..., F) from gate and up (..., F)."""
    if undifferentiated_on_gpu(gate):
        return swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)
    return silu(gate) * up


@kernel_on_gpu
@compilable
def swiglu(gate: Tensor, up: Tensor, room: int = 0) -> Tensor:
    """h (N, F) from gate and up (N, F).

    room: columns behind h for others to write to (projections.py), (N, F + room)
    """
    if not room:
        return silu(gate).mul_(up)
    n, f = gate.shape
    roomy = gate.new_empty(n, f + room)
    torch.ops.aten.silu.out(gate, out=roomy[:, :f]).mul_(up)
    return roomy


@kernel_on_gpu
@compilable
def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, d_gate and d_up, each (N, F). d_gate takes the memory of dh; h and d_up may take that of gate and up.

    dh: or (N, F + room), as then d_gate is
    """
    bare, silu_gate = dh[:, : gate.shape[1]], silu(gate)
    h = silu_gate * up
    d_up = silu_gate.mul_(bare)
    torch.ops.aten.silu_backward.grad_input(bare.mul_(up), gate, grad_input=bare)
    return h, dh, d_up
