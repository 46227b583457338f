"""RMSNorm, forward and backward: y = x r weight, r = 1 / sqrt(mean(x^2) + eps), a row a program.

A program holds its row in registers, so that sum and result need one reading of it; with the attention's output to be
added first, the sum of both is written on the way, and not read again. Backward adds the residual stream's gradient,
and makes the norm again, which would be a pass each.

Bytes moved a number of 16 bits: 2 read, 2 written; with a sum 4 and 4; backward 4 read, with the residual's gradient 6,
4 written. The 12 to 21 instructions a number (sm_90) are a third of what a GPU issues in that time, or less.

All arithmetic is float32. x = residual + y is the definition's bit for bit; the sums over a row have another order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_table import on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
A_THREAD = 16  # numbers: two vectors of 16 bytes in 16 bits, so that backward's three rows fit into the registers


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, inverse: Tensor | None = None, room: int = 0
) -> tuple[Tensor, Tensor]:
    """What `norm.rms_norm` does, with the same arguments.

    Raises ValueError where `dtype` is not one of DTYPES, and as `fitting` and `on` do.
    """
    _, normed, inverse = _normalize(x, None, weight, eps, dtype, inverse, room)
    return normed, inverse


def add_rms_norm(
    residual: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What `norm.add_rms_norm` does, with the same arguments. Raises ValueError as `rms_norm` does."""
    return _normalize(residual, y, weight, eps, dtype, None, room)


def _normalize(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, known: Tensor | None, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x, or x + y, and its norm and 1 / rms, which may be `known`."""
    n, d = two(x)
    x, weight = fitting("x", x, (n, d), x.device), fitting("weight", weight, (d,), x.device)
    y = None if y is None else fitting("y", y, (n, d), x.device)
    total = x if y is None else torch.empty_like(x)
    if dtype not in DTYPES:
        raise ValueError(f"the norm's dtype is {dtype}; it must be {' or '.join(map(str, DTYPES))}")
    normed = torch.empty(n, d + room, dtype=dtype, device=x.device)
    if known is None:
        inverse = torch.empty(n, 1, dtype=torch.float32, device=x.device)
    else:
        inverse = fitting("inverse", known, (n, 1), x.device, (torch.float32,))
    block = triton.next_power_of_2(d)
    with on(x.device):
        normalize_kernel[(n,)](
            x=x,
            y=y,
            weight=weight,
            total=total,
            normed=normed[:, :d],
            inverse=inverse,
            d=d,
            pitch=d + room,
            eps=eps,
            IS_KNOWN=known is not None,
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=True,
        )
    return total, normed, inverse


def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None = None, room: int = 0
) -> tuple[Tensor, Tensor]:
    """What `norm.rms_norm_backward` does, with the same arguments. Raises ValueError as `fitting` and `on` do."""
    n, d = two(x)
    if residual_grad is not None:
        residual_grad = fitting("residual_grad", residual_grad, (n, d), x.device, apart=True)
    dn, dx = fitting("dn", dn, (n, d), x.device), torch.empty(n, d + room, dtype=x.dtype, device=x.device)
    normed = torch.empty_like(dn)
    block = triton.next_power_of_2(d)
    with on(x.device):
        normalize_back_kernel[(n,)](
            dn=dn,
            x=fitting("x", x, (n, d), x.device),
            weight=fitting("weight", weight, (d,), x.device),
            inverse=fitting("inverse", inverse, (n, 1), x.device, (torch.float32,)),
            residual_grad=residual_grad,
            dx=dx[:, :d],
            normed=normed,
            d=d,
            pitch=d + room,
            residual_pitch=0 if residual_grad is None else residual_grad.stride(0),
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=True,
        )
    return dx, normed


def two(x: Tensor) -> tuple[int, int]:
    """The shape of x. Raises ValueError unless it has two dimensions, of at least 1."""
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"there must be (rows, numbers of each), not the shape {tuple(x.shape)}")
    return x.shape[0], x.shape[1]


def fitting(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    apart: bool = False,
) -> Tensor:
    """The tensor with its numbers in order; `apart`: those of each row. Raises ValueError unless it is of that shape
    and a dtype of `dtypes`, strided, on the device."""
    wrong_kind = tensor.dtype not in dtypes or tensor.layout != torch.strided
    if wrong_kind or tuple(tensor.shape) != shape or tensor.device != device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, {tensor.layout}, on {tensor.device}; it must be {shape}, "
            f"{' or '.join(map(str, dtypes))}, strided, on {device}"
        )
    tensor = tensor.resolve_neg()
    return tensor if apart and tensor.stride(-1) == 1 else tensor.contiguous()


def warps(numbers: int) -> int:
    """Of a program that does so many numbers."""
    return min(16, max(1, numbers // (32 * A_THREAD)))


@triton.jit
def normalize_kernel(
    x,
    y,
    weight,
    total,
    normed,
    inverse,
    d,
    pitch,
    eps,
    IS_KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, y, total, normed (n, d), weight (d,), inverse (n,) float32. y: None, or what is added to x for total.

    pitch: from one row of normed to the next
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    at = row * d + column
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    stored = tl.load(x + at, mask=inside, other=0)
    if y is not None:
        added = tl.load(y + at, mask=inside, other=0).to(stored.dtype)
        stored = (stored.to(tl.float32) + added.to(tl.float32)).to(stored.dtype)
        tl.store(total + at, stored, mask=inside)
    values = stored.to(tl.float32)
    if IS_KNOWN:
        r = tl.load(inverse + row)
    else:
        r = tl.rsqrt(tl.sum(values * values, axis=0) / d + eps)
        tl.store(inverse + row, r)
    tl.store(normed + row * pitch + column, (values * r * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def normalize_back_kernel(
    dn,
    x,
    weight,
    inverse,
    residual_grad,
    dx,
    normed,
    d,
    pitch,
    residual_pitch,
    BLOCK: tl.constexpr,
):
    """dn, x, dx, normed (n, d), weight (d,), inverse (n,) float32. residual_grad: None, or (n, d), which is added.

    pitch, residual_pitch: from one row of dx, of residual_grad, to the next
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    at = row * d + column
    r = tl.load(inverse + row)
    unit = tl.load(x + at, mask=inside, other=0).to(tl.float32) * r
    w = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(dn + at, mask=inside, other=0).to(tl.float32) * w
    tl.store(normed + at, (unit * w).to(normed.dtype.element_ty), mask=inside)
    if residual_grad is not None:
        added = tl.load(residual_grad + row * residual_pitch + column, mask=inside, other=0)
    # r u - r unit mean(u unit): r^3 could be infinite where this is not
    values = r * (u - unit * (tl.sum(u * unit, axis=0) / d))
    if residual_grad is not None:
        values += added
    tl.store(dx + row * pitch + column, values.to(dx.dtype.element_ty), mask=inside)
