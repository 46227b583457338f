"""Grouped-query attention with a sliding window: softmax(Q K^T / sqrt(Dh)) V over the keys that a query may see.

The window, said once: token i sees token j iff 0 <= i - j < window. In a packed row a token sees only its own segment,
and positions start again with each segment, so the same rule on positions holds there.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def visible(
    q_positions: Tensor,
    k_positions: Tensor,
    window: int | None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
) -> Tensor:
    """Which key each query sees: bool (B, 1, Tq, Tk), from positions (B, Tq), (B, Tk) and segments of the same shapes.

    Keys at negative positions are padding: nobody sees them but themselves (a row that saw nothing would be NaN).
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]  # (B, Tq, Tk)
    mask = (distance >= 0) & ((k_positions >= 0)[:, None, :] | (distance == 0))
    if window is not None:
        mask &= distance < window
    if q_segments is not None and k_segments is not None:
        mask &= q_segments[:, :, None] == k_segments[:, None, :]
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, Tq, Hq, Dh), k and v (B, Tk, Hkv, Dh), mask (B, 1, Tq, Tk) -> (B, Tq, Hq, Dh).

    Query head h uses key head h // (Hq / Hkv).
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, Dh)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
