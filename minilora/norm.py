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
