"""Grouped-query attention with a sliding window: softmax(Q K^T / sqrt(Dh)) V over the keys that a query may see.

The window, said once: token i sees token j iff 0 <= i - j < window. In a packed row a token sees only its own segment,
and positions start again with each segment, so the same rule on positions holds there.
"""

import torch
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


def causal_runs(
    positions: Tensor, window: int | None, segments: Tensor | None = None, least_length: int = 64
) -> tuple[int, ...] | None:
    """Lengths of the runs that the tokens (B, T), row after row, fall into, if `visible` says no more than this:
    a token sees the tokens before it in its run, and itself. None where it says something else.

    A run ends where a row or segment does. It is causal and no more if its positions count up by one and the window
    holds all of it. Runs are attended to one by one, so many short ones are better served by one mask: None, too,
    where they are shorter than `least_length` on average, or where looking would make a GPU wait.
    """
    n_rows, n_columns = positions.shape
    if positions.device.type != "cpu" or n_columns < 2:
        return None
    follows = positions[:, 1:] == positions[:, :-1] + 1
    same = follows if segments is None else segments[:, 1:] == segments[:, :-1]
    if not bool((follows | ~same).all()) or int(positions.min()) < 0 or (segments is None and not bool(same.all())):
        return None
    ends = torch.ones(n_rows, n_columns, dtype=torch.bool)
    ends[:, :-1] = ~same
    stops = ends.view(-1).nonzero().view(-1) + 1
    lengths = torch.diff(stops, prepend=torch.zeros(1, dtype=stops.dtype)).tolist()
    if (window is not None and max(lengths) > window) or positions.numel() < least_length * len(lengths):
        return None
    return tuple(lengths)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | tuple[int, ...]) -> Tensor:
    """q (B, Tq, Hq, Dh), k and v (B, Tk, Hkv, Dh) -> (B, Tq, Hq, Dh).

    sees: a mask (B, 1, Tq, Tk), or the lengths of causal runs, which cost half of a mask's work where there is one run
    and a small part where there are many. Query head h uses key head h // (Hq / Hkv).
    """
    if isinstance(sees, Tensor):
        return _softmax_product(q, k, v, sees)
    if len(set(sees)) == 1:
        return _softmax_product(*(x.reshape(len(sees), sees[0], *x.shape[2:]) for x in (q, k, v))).view(q.shape)
    split = [x.flatten(0, 1).split(sees) for x in (q, k, v)]  # not slices: the backward of each would fill all of q
    return torch.cat([_softmax_product(*(x[None] for x in run)) for run in zip(*split, strict=True)], dim=1).view(
        q.shape
    )


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Over (B, T, H, Dh), under `mask`, or causal without one."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and mask is not None and q.device.type != "cpu":  # a GPU's fast kernels take a mask or fewer k and v
        k, v, groups = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2), 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, Dh)
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)
    return y.transpose(1, 2)
