"""SwiGLU (https://arxiv.org/abs/2002.05202) between its products: h = silu(g) * u, and backward by hand."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h (N, F)."""
    return silu(gate).mul_(up)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, made again, d_gate and d_up (N, F); `dh` may be overwritten."""
    gated = silu(gate)
    h = gated * up
    d_up = gated.mul_(dh)
    d_gate = torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dh)
    return h, d_gate, d_up
