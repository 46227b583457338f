"""AdamW's update in one pass: m, v and p from the gradient times what clipping and the loss scale multiply it by.

With moments in 8 bits a program takes blocks whole: it looks their numbers up, updates, finds the new absmax and counts
the thresholds below each number, eight look-ups by halving.

What depends on the step alone, the corrections for its number and the learning rate, the host works out in float64 and
hands over as numbers, which do not make Triton compile anew.

Bytes moved a parameter: 16 read (p, gradient, m, v), 12 written; nothing else costs. In 8 bits 10 read, 6 written, and
18 look-ups in tables of a kilobyte, which cost more than that.
"""

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.dynamic_8bit import DYNAMIC_BLOCK_SIZE, dynamic_map, dynamic_thresholds
from minilora.kernels.nf4_dequantize import is_plain, told
from minilora.kernels.nf4_quantize import encode_dynamic
from minilora.kernels.nf4_table import on

BLOCK = 1024  # numbers of a program: eight a thread
BLOCKS = BLOCK // DYNAMIC_BLOCK_SIZE  # of 8-bit moments
Numbers = tuple[float, ...]  # an `adamw.Update`, or what the kernels take in its place


def adamw_(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, update: Numbers) -> None:
    """What `adamw.adamw_` does, with the same arguments.

    Raises ValueError where p, grad, m and v are not (n,) contiguous float32 on one device, and as `on` does.
    """
    for name, part in (("p", p), ("grad", grad), ("m", m), ("v", v)):
        _check(name, part, p, p.numel(), torch.float32)
    with on(p.device):
        adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
            p,
            grad,
            m,
            v,
            p.numel(),
            *_numbers(update),
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    for part in (p, m, v):
        torch.autograd.graph.increment_version(part)


def adamw_8bit_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, m_absmax: Tensor, v_absmax: Tensor, update: Numbers
) -> None:
    """What `adamw.adamw_8bit_` does, with the same arguments.

    Raises ValueError where p and grad are not (n,) contiguous float32, n a multiple of 256, m and v as many uint8, and
    their absmax (n / 256,) float32, all on one device, and as `on` does.
    """
    n = p.numel()
    if n % DYNAMIC_BLOCK_SIZE:
        raise ValueError(f"p must have a multiple of {DYNAMIC_BLOCK_SIZE} numbers; it has {n}")
    for name, part in (("p", p), ("grad", grad)):
        _check(name, part, p, n, torch.float32)
    for name, part in (("m", m), ("v", v)):
        _check(name, part, p, n, torch.uint8)
    for name, part in (("m_absmax", m_absmax), ("v_absmax", v_absmax)):
        _check(name, part, p, n // DYNAMIC_BLOCK_SIZE, torch.float32)
    with on(p.device):
        adamw_8bit_kernel[(triton.cdiv(n, BLOCK),)](
            p,
            grad,
            m,
            v,
            m_absmax,
            v_absmax,
            dynamic_map(p.device),
            dynamic_map(p.device, signed=False),
            dynamic_thresholds(p.device),
            dynamic_thresholds(p.device, signed=False),
            n,
            *_numbers(update),
            block_size=DYNAMIC_BLOCK_SIZE,
            BLOCKS=BLOCKS,
            enable_fp_fusion=True,
        )
    for part in (p, m, v, m_absmax, v_absmax):
        torch.autograd.graph.increment_version(part)


def _check(name: str, part: Tensor, p: Tensor, n: int, dtype: torch.dtype) -> None:
    if part.shape != (n,) or part.device != p.device or part.dtype != dtype or not is_plain(part):
        of = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be ({n},) contiguous {of} on {p.device}; it is {told(part)}")


def _numbers(update: Numbers) -> Numbers:
    """grad_scale, weight_m, beta2, weight_v, eps, kept, step_size, as the kernels take them."""
    lr, beta1, beta2, eps, weight_decay, step, grad_scale = update
    root = sqrt(1 - beta2**step)
    kept, step_size = 1 - lr * weight_decay, lr * root / (1 - beta1**step)
    return grad_scale, 1 - beta1, beta2, 1 - beta2, eps * root, kept, step_size


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


@triton.jit
def adamw_8bit_kernel(
    p,
    grad,
    m,
    v,
    m_absmax,
    v_absmax,
    m_map,
    v_map,
    m_thresholds,
    v_thresholds,
    n,
    grad_scale,
    weight_m,
    beta2,
    weight_v,
    eps,
    kept,
    step_size,
    block_size: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """p (n,), m and v (n,) uint8, their absmax (n / block_size,), all in place; maps (256,), thresholds (255,)."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * block_size + tl.arange(0, block_size)[None, :]
    inside, has_block = at < n, block * block_size < n
    m_scale = tl.load(m_absmax + block, mask=has_block, other=0)[:, None]
    v_scale = tl.load(v_absmax + block, mask=has_block, other=0)[:, None]
    g = tl.load(grad + at, mask=inside, other=0) * grad_scale
    new_m = tl.load(m_map + tl.load(m + at, mask=inside, other=0)) * m_scale
    new_m += (g - new_m) * weight_m
    new_v = tl.load(v_map + tl.load(v + at, mask=inside, other=0)) * v_scale * beta2 + g * g * weight_v
    new_p = tl.load(p + at, mask=inside, other=0) * kept - new_m / (tl.sqrt(new_v) + eps) * step_size
    tl.store(p + at, new_p, mask=inside)
    m_codes, m_largest = encode_dynamic(m_thresholds, new_m)
    tl.store(m + at, m_codes, mask=inside)
    tl.store(m_absmax + block, m_largest, mask=has_block)
    v_codes, v_largest = encode_dynamic(v_thresholds, new_v)
    tl.store(v + at, v_codes, mask=inside)
    tl.store(v_absmax + block, v_largest, mask=has_block)
