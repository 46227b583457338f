"""RMSNorm (https://arxiv.org/abs/1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

The norm is computed in float32 and cast back to x's dtype before the weight is applied, as Mistral does it.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales the vectors of (..., D) to unit mean square, then by a learned `weight` (D,)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        unit = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(x) (N, D) in `dtype`, and 1 / rms (N, 1) float32."""
    x = x.float()
    inverse = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow_(2) / x.shape[-1] + eps)
    return (x * inverse).mul_(weight).to(dtype), inverse


def add_rms_norm(
    residual: Tensor, y: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x = residual + y (N, D) in residual's dtype, and `rms_norm` of it."""
    x = residual + y.to(residual.dtype)
    return x, *rms_norm(x, weight, eps, dtype)


def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None = None
) -> Tensor:
    """dx = (dn w - x mean(dn w x) / rms^2) / rms + residual_grad (N, D), in x's dtype; `dn` may be overwritten."""
    wide, d_unit = x.float(), dn.float().mul_(weight)
    mean = torch.linalg.vecdot(d_unit, wide)[:, None] / x.shape[-1]
    dx = d_unit.mul_(inverse).addcmul_(wide, mean.mul_(inverse.pow(3)), value=-1)
    return (dx if residual_grad is None else dx.add_(residual_grad)).to(x.dtype)
