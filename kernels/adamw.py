"""AdamW's update in one pass: m, v and p from the gradient times what clipping and the loss scale multiply it by.

What depends on the step alone, the corrections for its number and the learning rate, the host works out in float64 and
hands over as numbers, which do not make Triton compile anew.

Bytes moved a parameter: 16 read (p, gradient, m, v), 12 written; nothing else costs.
"""

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import is_plain, told
from minilora.kernels.nf4_table import on

BLOCK = 1024  # numbers of a program: eight a thread


def adamw_(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """What `adamw.adamw_` does, with the same arguments.

    Raises ValueError where p, grad, m and v are not (n,) contiguous float32 on one device, and as `on` does.
    """
    for name, part in (("p", p), ("grad", grad), ("m", m), ("v", v)):
        fits = part.dim() == 1 and part.shape == p.shape and part.device == p.device
        if not fits or part.dtype != torch.float32 or not is_plain(part):
            raise ValueError(f"{name} must be (n,) contiguous float32 like p; it is {told(part)}")
    root = sqrt(1 - beta2**step)
    with on(p.device):
        adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
            p,
            grad,
            m,
            v,
            p.numel(),
            grad_scale,
            1 - beta1,
            beta2,
            1 - beta2,
            eps * root,
            1 - lr * weight_decay,
            lr * root / (1 - beta1**step),
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    for part in (p, m, v):
        torch.autograd.graph.increment_version(part)


@triton.jit
def adamw_kernel(p, grad, m, v, n, grad_scale, weight_m, beta2, weight_v, eps, kept, step_size, BLOCK: tl.constexpr):
    """p, m, v (n,) in place. eps: times sqrt(1 - beta2^t), for v's correction stands in `step_size`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0) * grad_scale
    new_m = tl.load(m + at, mask=inside, other=0)
    new_m += (g - new_m) * weight_m
    new_v = tl.load(v + at, mask=inside, other=0) * beta2 + g * g * weight_v
    new_p = tl.load(p + at, mask=inside, other=0) * kept - new_m / (tl.sqrt(new_v) + eps) * step_size
    tl.store(m + at, new_m, mask=inside)
    tl.store(v + at, new_v, mask=inside)
    tl.store(p + at, new_p, mask=inside)
