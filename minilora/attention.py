"""Grouped-query attention with a sliding window: softmax(Q K^T / sqrt(Dh)) V over the keys that a query may see.

The window, said once: token i sees token j iff 0 <= i - j < window. In a packed row a token sees only its own segment,
and positions start again with each segment, so the same rule on positions holds there.

Three ways to it, by what is known of the tokens: under a mask; causal, run by run, on a CPU; and on a GPU all runs in
one launch of FlashAttention (https://arxiv.org/abs/2307.08691), as torch ships it, which knows the window and no mask.
"""

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Runs:
    """Tokens, row after row, in runs: one sees those before it in its run, within `window`, and itself; on a GPU.

    stops: (K + 1,) int32, where each run begins, and the last one ends; runs may be empty
    longest: no run is longer; the host must know it, so that a GPU need not be waited for
    """

    stops: Tensor
    longest: int
    window: int | None = None

    @staticmethod
    def serve(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether torch's FlashAttention takes such heads there."""
        return (
            device.type == "cuda"
            and dtype in (torch.bfloat16, torch.float16)
            and head_dim % 8 == 0
            and head_dim <= 256
            and torch.cuda.get_device_capability(device) >= (8, 0)
            and torch.backends.cuda.is_flash_attention_available()
        )

    @property
    def _limits(self) -> tuple[Any, ...]:
        return self.stops, self.stops, self.longest, self.longest, 0.0, self.window is None

    @property
    def _sides(self) -> dict[str, int]:
        return {"window_size_left": -1 if self.window is None else self.window - 1, "window_size_right": 0}


Sees = Tensor | tuple[int, ...] | Runs


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Tensor:
    """q (B, Tq, Hq, Dh), k and v (B, Tk, Hkv, Dh) -> (B, Tq, Hq, Dh).

    sees: a mask (B, 1, Tq, Tk), or the lengths of causal runs, which cost half of a mask's work where there is one run
    and a small part where there are many; or, on a GPU, `Runs`. Query head h uses key head h // (Hq / Hkv).
    """
    if isinstance(sees, Runs):
        return _flash(q, k, v, sees)[0].view(q.shape)
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


def _flash(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """Output (B * T, Hq, Dh), logsumexp and what else its backward takes."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    made = torch.ops.aten._flash_attention_forward(q, k, v, *runs._limits, False, **runs._sides)
    return tuple(made[:4])


def attend_kept(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`attend`, for a caller that differentiates by hand: the output, and what `attend_back` wants besides.

    That is a graph of autograd's own, which keeps q, k and v; but for `Runs` it is small.
    """
    if isinstance(sees, Runs):
        y, *rest = _flash(q, k, v, sees)
        return y.view(q.shape), tuple(rest)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        y = attend(q, k, v, sees)
    return y.detach(), (y, q, k, v)


def attend_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, rest: tuple[Tensor, ...], sees: Sees
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, in their shapes."""
    if not isinstance(sees, Runs):
        output, *inputs = rest
        return torch.autograd.grad(output, inputs, dy)
    dy, *heads = (x.flatten(0, 1) for x in (dy, q, k, v, y))
    grads = torch.ops.aten._flash_attention_backward(dy, *heads, rest[0], *sees._limits, *rest[1:], **sees._sides)
    return tuple(grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
