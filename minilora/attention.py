"""Grouped-query attention with a sliding window: softmax(Q K^T / sqrt(Dh)) V over the keys that a query may see.

Three ways to it, by what is known of who sees whom (`visible.py`): under a mask of all queries and keys; on a CPU,
where each run of tokens is causal, piece by piece, so that time and memory grow with the tokens and not with their
square; and on a GPU all runs in one launch of FlashAttention (https://arxiv.org/abs/2307.08691), as torch ships it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minilora.visible import Piece, Pieces, Runs, Sees

WIDENED = 256  # keys of a piece, at most, whose backward is slower in 16 bits than in float32, and less exact


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Tensor:
    """q (B, Tq, Hq, Dh), k and v (B, Tk, Hkv, Dh) -> (B, Tq, Hq, Dh).

    sees: a mask (B, 1, Tq, Tk), or causal runs, on a CPU in `Pieces`, on a GPU as `Runs`. Query head h uses key head
    h // (Hq / Hkv). A single query's mask may be `as_added`, and have a row for each query head of a key head.
    """
    if isinstance(sees, Runs):
        return _flash(q, k, v, sees)[0].view(q.shape)
    return _softmax_product(q, k, v, sees) if isinstance(sees, Tensor) else _in_pieces(q, k, v, sees)


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Over (B, T, H, Dh), under `mask`."""
    if q.shape[1] == 1:  # a key head's query heads are the queries of one product: it reads k and v once, as they lie
        heads = q.unflatten(2, (k.shape[2], -1))[:, 0]  # (B, Hkv, Hq / Hkv, Dh)
        y = scaled_dot_product_attention(heads, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return y.reshape(q.shape)
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and q.device.type != "cpu":  # a GPU's fast kernels take a mask or fewer k and v
        k, v, groups = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2), 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, Dh)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1).transpose(1, 2)


class _InPieces(torch.autograd.Function):
    """`attend` for `Pieces`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sees: Pieces) -> Tensor:
        y, rest = attend_kept(q, k, v, sees)
        ctx.save_for_backward(q, k, v, y, *rest)
        ctx.sees = sees
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *rest = ctx.saved_tensors
        return (*attend_back(grads[0], q, k, v, y, tuple(rest), ctx.sees), None)


_in_pieces: Callable[[Tensor, Tensor, Tensor, Pieces], Tensor] = _InPieces.apply


def _flash_arguments(piece: Piece, dtype: torch.dtype) -> tuple[slice, slice, dict[str, Any]]:
    """Where its queries and its keys are, and what torch's kernel, the CPU's FlashAttention, is told of them."""
    mask = None if piece.mask is None else piece.mask.to(dtype)[None, None]
    at, seen = slice(piece.start, piece.stop), slice(piece.first, piece.stop)
    return at, seen, {"dropout_p": 0.0, "is_causal": mask is None, "attn_mask": mask}


@torch.no_grad()
def _pieces_forward(q: Tensor, k: Tensor, v: Tensor, sees: Pieces) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, in q's shape, and each piece's logsumexp."""
    whole, sums = torch.empty(q.shape if len(sees.pieces) > 1 else 0, dtype=q.dtype), list[Tensor]()
    shape, (q, k, v) = q.shape, sees.parts(q, k, v)
    for piece in sees.pieces:
        at, seen, told = _flash_arguments(piece, q.dtype)
        y, of_piece = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, at], k[:, :, seen], v[:, :, seen], **told
        )
        sums.append(of_piece)
        if len(sees.pieces) == 1:
            return y.transpose(1, 2).reshape(shape), tuple(sums)
        sees.parts(whole)[0][:, :, at] = y
    return whole, tuple(sums)


@torch.no_grad()
def _pieces_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: tuple[Tensor, ...], sees: Pieces
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v; a key's is added up over the pieces, in float32 at least."""
    shapes, dtype, one = [x.shape for x in (q, k, v)], q.dtype, len(sees.pieces) == 1
    wide = torch.promote_types(dtype, torch.float32)
    grads = [] if one else [torch.zeros(shape, dtype=wide) for shape in shapes]
    dy, q, k, v, y = sees.parts(dy, q, k, v, y)
    if (copies := copies_for_threads(sees.rows, q.shape[1], k.shape[1])) > 1:
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    for piece, of_piece in zip(sees.pieces, sums, strict=True):
        within = wide if piece.stop - piece.first <= WIDENED else dtype
        at, seen, told = _flash_arguments(piece, within)
        parts = dy[:, :, at], q[:, :, at], k[:, :, seen], v[:, :, seen], y[:, :, at]
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(part.to(within) for part in parts), of_piece, **told
        )
        if copies > 1:
            apart = ([x[:, i::copies].to(wide) for i in range(copies)] for x in made[1:])
            made = made[0], *(sum(x[1:], x[0]) for x in apart)
        if one:
            return tuple(g.to(dtype).transpose(1, 2).reshape(shape) for g, shape in zip(made, shapes, strict=True))
        for whole, where, part in zip(sees.parts(*grads), (at, seen, seen), made, strict=True):
            whole[:, :, where].add_(part)
    return tuple(grad.to(dtype) for grad in grads)


def copies_for_threads(rows: int, n_q_heads: int, n_k_heads: int) -> int:
    """Of each key head, for all threads to have something to do: backward gives a thread whole key heads of a row.

    With 3 key heads of 3 query heads each and two threads one has to do 6 of 9 query heads; with 9 key heads, 5.
    """
    threads, groups = torch.get_num_threads(), n_q_heads // n_k_heads
    most, most_apart = (-(-rows * heads // threads) for heads in (n_k_heads, n_q_heads))
    return groups if most_apart < most * groups else 1


def has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's FlashAttention takes such heads on that device."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def _told_of(runs: Runs) -> dict[str, Any]:
    """What torch's FlashAttention is told of queries and keys, forward and back."""
    stops, longest, window = runs.stops, runs.longest, runs.window
    limits = {"cum_seq_q": stops, "cum_seq_k": stops, "max_q": longest, "max_k": longest}
    sides = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    return {**limits, **sides, "dropout_p": 0.0, "is_causal": window is None}


def _flash(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """Output (B * T, Hq, Dh), logsumexp, and the two tensors that its backward takes besides."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    made = torch.ops.aten._flash_attention_forward(q, k, v, **_told_of(runs), return_debug_mask=False)
    return tuple(made[:4])


def attend_kept(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`attend`, for a caller that differentiates by hand: the output, and what `attend_back` wants besides.

    That is small; but under a mask it is a graph of autograd's own, which keeps q, k and v.
    """
    if isinstance(sees, Runs):
        y, *rest = _flash(q, k, v, sees)
        return y.view(q.shape), tuple(rest)
    if isinstance(sees, Pieces):
        return _pieces_forward(q, k, v, sees)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        y = attend(q, k, v, sees)
    return y.detach(), (y, q, k, v)


def attend_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, rest: tuple[Tensor, ...], sees: Sees
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, in their shapes."""
    if isinstance(sees, Tensor):
        output, *inputs = rest
        return torch.autograd.grad(output, inputs, dy)
    if isinstance(sees, Pieces):
        return _pieces_back(dy, q, k, v, y, rest, sees)
    dy, *heads = (x.flatten(0, 1) for x in (dy, q, k, v, y))
    logsumexp, rng_state, unused = rest
    grads = torch.ops.aten._flash_attention_backward(
        dy, *heads, logsumexp, **_told_of(sees), rng_state=rng_state, unused=unused
    )
    return tuple(grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
