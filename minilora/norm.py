"""RMSNorm (https://arxiv.org/abs/1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

The norm is computed in float32 and cast back to x's dtype before the weight is applied, as Mistral does it.

The functions are what the fast block (`fused.py`) does of it, by a kernel on a GPU, where without gradients the plain
one takes it, too: all in float32, rounded once. With r = 1 / sqrt(mean(x^2) + eps) and u = dy weight, the gradient is
dx = r u - r^3 x mean(u x). Backward makes the norm again on its way, since the gradients of the adapters need it.
"""

import torch
from torch import Tensor, nn

from minilora.compiled import compilable
from minilora.dispatch import kernel_on_gpu, undifferentiated_on_gpu


class RMSNorm(nn.Module):
    """Scales the vectors of (..., D) to unit mean square, then by a learned `weight` (D,)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if undifferentiated_on_gpu(x):
            return rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps, x.dtype)[0].view(x.shape)
        x32 = x.float()
        unit = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


@kernel_on_gpu
@compilable
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, inverse: Tensor | None = None, room: int = 0
) -> tuple[Tensor, Tensor]:
    """The norm of x (N, D) in `dtype`, and r (N, 1) float32, which is made where `inverse` does not give it.

    room: columns behind the norm for others to write to (projections.py), (N, D + room)
    """
    return _normalized(x, weight, eps, dtype, inverse, room)


@kernel_on_gpu
@compilable
def add_rms_norm(
    residual: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x = residual + y (N, D) in residual's dtype, and `rms_norm` of it."""
    x = residual + y.to(residual.dtype)
    return x, *_normalized(x, weight, eps, dtype, None, room)


def _normalized(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, inverse: Tensor | None, room: int
) -> tuple[Tensor, Tensor]:
    (n, d), x32 = x.shape, x.float()
    if inverse is None:
        inverse = torch.rsqrt(torch.linalg.vector_norm(x32, dim=-1, keepdim=True).pow_(2) / d + eps)
    roomy = x.new_empty(n, d + room, dtype=dtype)
    normed = roomy[:, :d]
    if dtype == torch.float32:
        torch.mul(x32, inverse, out=normed).mul_(weight)
    else:  # made in float32, in x's copy if there is one, and rounded once
        normed.copy_(torch.mul(x32, inverse, out=x32 if x32 is not x else None).mul_(weight))
    return roomy, inverse


@kernel_on_gpu
@compilable
def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None = None, room: int = 0
) -> tuple[Tensor, Tensor]:
    """dx (N, D) in x's dtype from the norm's gradient dn (N, D), which may be overwritten; residual_grad is added. And
    the norm (N, D) in dn's dtype.

    room: columns behind dx for others to write to (projections.py), (N, D + room)
    """
    (n, d), x32, dtype = x.shape, x.float(), dn.dtype
    u = dn.float().mul_(weight)
    mean = torch.linalg.vecdot(u, x32)[:, None] / d
    dx = u.mul_(inverse).addcmul_(x32, mean.mul_(inverse.pow(3)), value=-1)
    if residual_grad is not None:
        dx.add_(residual_grad)
    normed = torch.mul(x32, inverse, out=x32 if x32 is not x else None).mul_(weight).to(dtype)
    if not room:
        return dx.to(x.dtype), normed
    roomy = x.new_empty(n, d + room)
    roomy[:, :d] = dx
    return roomy, normed
