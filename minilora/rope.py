"""Rotary position embedding (https://arxiv.org/abs/2104.09864): position as a rotation of pairs of numbers.

Pair i of a head is turned by the angle p * theta^(-2i / Dh) at position p, so that the product of a query at p and a
key at q depends on p - q alone. Two ways to choose the pairs are in use, and differ only in the order of a head's rows:

    half-split    (x[i], x[i + Dh/2])     Hugging Face's files, and this decoder
    interleaved   (x[2i], x[2i + 1])      Mistral's own files

`interleaved_to_half_split` reorders the rows of W_q and W_k (and of a LoRA's B); then both give the same products.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from minilora.compiled import compilable
from minilora.dispatch import kernel_on_gpu, undifferentiated_on_gpu


def rope_cos_sin(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle, each (B, T, Dh/2) in `dtype`, for positions (B, T). Angles are float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)  # (B, T, Dh/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the half-split pairs of x (B, T, H, Dh) by cos, sin (B, T, Dh/2)."""
    if undifferentiated_on_gpu(x):
        return rotate(x.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1)).view(x.shape)
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, Dh/2)
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)  # not chunk: its backward fills two tensors of x's size with zeros
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@kernel_on_gpu
@compilable
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` of x (N, H, Dh) by cos, sin (N, Dh/2), in new memory."""
    return _turned(x, cos[:, None], sin[:, None])


@kernel_on_gpu
@compilable
def rotate_back(dx: Tensor, cos: Tensor, sin: Tensor, room: int = 0) -> Tensor:
    """Turns dx (N, H, Dh) the other way, which is the gradient of what was rotated: (N, H * Dh), in new memory.

    room: columns behind it for others to write to (projections.py), (N, H * Dh + room)
    """
    turned = _turned(dx, cos[:, None], -sin[:, None]).flatten(1)
    return pad(turned, (0, room)) if room else turned


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([(a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)], dim=-1)


def interleaved_to_half_split(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder (H*Dh, ...) rows head by head: 0, 2, 4, ..., 1, 3, 5, ..."""
    return rows.reshape(n_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def half_split_to_interleaved(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleaved_to_half_split`."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
