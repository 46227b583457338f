"""Grouped-query attention with a sliding window: softmax(Q K^T / sqrt(Dh)) V over the keys that a query may see.

The window, said once: token i sees token j iff 0 <= i - j < window. In a packed row a token sees only its own segment,
and positions start again with each segment, so the same rule on positions holds there.

Three ways to it, by what is known of the tokens: under a mask of all queries and keys; on a CPU, where each run of
tokens is causal, piece by piece, so that time and memory grow with the tokens and not with their square; and on a GPU
all runs in one launch of FlashAttention (https://arxiv.org/abs/2307.08691), as torch ships it, which knows the window.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from minilora.backend import product_dtype, whole_shapes
from minilora.compiled import compilable, compiles
from minilora.scratch import scratch

QUERIES = 256  # of a piece: with more, more keys are masked away; with fewer, the products are small
SHORT = 64  # tokens of a run that is not worth a piece of its own
TOGETHER = 128  # tokens of short runs that share a piece, at most
SCORE_BYTES = 5 << 20  # of 16-bit scores in work at a time, at most, unless these are of few queries:
LEAST = 128
WORTH = 1 << 19  # scores of a piece, on average, for whose backward products of one's own pay
WIDENED = 256  # keys of a piece, at most, whose backward is slower in 16 bits than in float32, and less exact


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


def causal_runs(positions: Tensor, segments: Tensor | None = None) -> tuple[int, ...] | None:
    """Lengths of the runs that the tokens (B, T), row after row, fall into, if `visible` says no more than this:
    a token sees the tokens before it in its run, within the window, and itself. None where it says something else.

    A run ends where a row or segment does, and its positions count up by one. None, too, where looking would make a
    GPU wait, and for a step of generation.
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
    return tuple(torch.diff(stops, prepend=torch.zeros(1, dtype=stops.dtype)).tolist())


@dataclass(frozen=True)
class Piece:
    """Queries start..stop, which see of the keys first..stop what the mask says, or all up to themselves.

    mask: (stop - start, stop - first) float32, 0 or -inf; None: start is first
    """

    start: int
    stop: int
    first: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class Pieces:
    """Tokens, row after row, in runs: one sees those before it in its run, within a window, and itself; on a CPU.

    rows: so many runs of the same length side by side, each in these pieces; else 1
    """

    rows: int
    pieces: tuple[Piece, ...]

    @staticmethod
    def of(runs: Sequence[int], window: int | None = None) -> "Pieces":
        """From the runs' lengths."""
        rows = len(runs) if len(set(runs)) == 1 else 1
        return Pieces(rows, tuple(_pieces(runs[: len(runs) // rows], window)))

    @property
    def mask_bytes(self) -> int:
        """Of the masks; those of a window are views of one."""
        storages = [piece.mask.untyped_storage() for piece in self.pieces if piece.mask is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _pieces(runs: Sequence[int], window: int | None) -> Iterator[Piece]:
    """A run that the window holds is one piece, a longer one several; neighbours that are short share one."""
    begin, i, band = 0, 0, None
    while i < len(runs):
        end, n = begin + runs[i], 1
        while runs[i] <= SHORT and i + n < len(runs) and runs[i + n] <= SHORT and end + runs[i + n] - begin <= TOGETHER:
            end, n = end + runs[i + n], n + 1
        if n > 1:
            together = torch.tensor(runs[i : i + n])
            run = torch.repeat_interleave(torch.arange(n), together)[None]
            yield Piece(begin, end, begin, _as_added(*(torch.arange(end - begin)[None],) * 2, window, run))
        elif window is None or end - begin <= window:
            yield Piece(begin, end, begin)
        else:
            keys = torch.arange(window - 1 + QUERIES)[None]
            band = _as_added(keys[:, window - 1 :], keys, window) if band is None else band
            for start in range(begin, end, QUERIES):
                stop, earliest = min(start + QUERIES, end), start - window + 1
                first = max(begin, earliest)
                yield Piece(start, stop, first, band[: stop - start, first - earliest : stop - earliest])
        begin, i = end, i + n


def _as_added(q_positions: Tensor, k_positions: Tensor, window: int | None, run: Tensor | None = None) -> Tensor:
    """`visible` of one row, (Tq, Tk) float32: what is added to the scores."""
    sees = visible(q_positions, k_positions, window, run, run)[0, 0]
    return torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))


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


Sees = Tensor | Pieces | Runs


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Tensor:
    """q (B, Tq, Hq, Dh), k and v (B, Tk, Hkv, Dh) -> (B, Tq, Hq, Dh).

    sees: a mask (B, 1, Tq, Tk), or the `Pieces` of causal runs, or, on a GPU, `Runs`. Query head h uses key head
    h // (Hq / Hkv).
    """
    if isinstance(sees, Runs):
        return _flash(q, k, v, sees)[0].view(q.shape)
    return _softmax_product(q, k, v, sees) if isinstance(sees, Tensor) else _in_pieces(q, k, v, sees)


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Over (B, T, H, Dh), under `mask`."""
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


def _parts(sees: Pieces, *tensors: Tensor) -> list[Tensor]:
    """Each (B, T, H, Dh) as (rows, H, n, Dh)."""
    return [x.reshape(sees.rows, -1, *x.shape[2:]).transpose(1, 2) for x in tensors]


def _told(piece: Piece, dtype: torch.dtype) -> tuple[slice, slice, dict[str, Any]]:
    """Where its queries and its keys are, and what torch's kernel, the CPU's FlashAttention, is told of them."""
    mask = None if piece.mask is None else piece.mask.to(dtype)[None, None]
    at, seen = slice(piece.start, piece.stop), slice(piece.first, piece.stop)
    return at, seen, {"dropout_p": 0.0, "is_causal": mask is None, "attn_mask": mask}


@torch.no_grad()
def _pieces_forward(q: Tensor, k: Tensor, v: Tensor, sees: Pieces) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, in q's shape, and each piece's logsumexp."""
    whole, sums = torch.empty(q.shape if len(sees.pieces) > 1 else 0, dtype=q.dtype), list[Tensor]()
    shape, (q, k, v) = q.shape, _parts(sees, q, k, v)
    for piece in sees.pieces:
        at, seen, told = _told(piece, q.dtype)
        y, of_piece = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, at], k[:, :, seen], v[:, :, seen], **told
        )
        sums.append(of_piece)
        if len(sees.pieces) == 1:
            return y.transpose(1, 2).reshape(shape), tuple(sums)
        _parts(sees, whole)[0][:, :, at] = y
    return whole, tuple(sums)


@torch.no_grad()
def _pieces_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: tuple[Tensor, ...], sees: Pieces
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v; a key's is added up over the pieces, in float32 at least."""
    shapes, dtype, one = [x.shape for x in (q, k, v)], q.dtype, len(sees.pieces) == 1
    wide = torch.promote_types(dtype, torch.float32)
    grads = [] if one else [torch.zeros(shape, dtype=wide) for shape in shapes]
    dy, q, k, v, y = _parts(sees, dy, q, k, v, y)
    if (copies := copies_for_threads(sees.rows, q.shape[1], k.shape[1])) > 1:
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    for piece, of_piece in zip(sees.pieces, sums, strict=True):
        within = wide if piece.stop - piece.first <= WIDENED else dtype
        at, seen, told = _told(piece, within)
        parts = dy[:, :, at], q[:, :, at], k[:, :, seen], v[:, :, seen], y[:, :, at]
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(part.to(within) for part in parts), of_piece, **told
        )
        if copies > 1:
            apart = ([x[:, i::copies].to(wide) for i in range(copies)] for x in made[1:])
            made = made[0], *(sum(x[1:], x[0]) for x in apart)
        if one:
            return tuple(g.to(dtype).transpose(1, 2).reshape(shape) for g, shape in zip(made, shapes, strict=True))
        for whole, where, part in zip(_parts(sees, *grads), (at, seen, seen), made, strict=True):
            whole[:, :, where].add_(part)
    return tuple(grad.to(dtype) for grad in grads)


def _pays_in_products(q: Tensor, sees: Pieces) -> bool:
    """Whether `_products_back` is faster: in 16 bits that this CPU multiplies, compiled, and not in small pieces."""
    scores = (
        sees.rows * q.shape[2] * sum((piece.stop - piece.start) * (piece.stop - piece.first) for piece in sees.pieces)
    )
    fits = compiles(q.device) and q.dtype.itemsize == 2 and product_dtype(q) == q.dtype
    return fits and scores >= WORTH * len(sees.pieces)


@torch.no_grad()
def _products_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: tuple[Tensor, ...], sees: Pieces
) -> tuple[Tensor, ...]:
    """`_pieces_back` in 16-bit products, of some queries with all the keys that they may see at a time:

    P = exp(s Q K^T - logsumexp)     dP = dY V^T     dS = s P (dP - sum(dY Y))
    dQ = dS K                        dK = dS^T Q     dV = P^T dY
    """
    heads, group, scale = sees.rows * k.shape[2], q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    grads = [torch.zeros_like(q), *(torch.zeros(x.shape) for x in (k, v))]
    means = torch.linalg.vecdot(dy.float(), y.float())[..., None]
    (q, dy, means, k, v), (dq, dk, dv) = _parts(sees, q, dy, means, k, v), _parts(sees, *grads)
    for piece, of_piece in zip(sees.pieces, sums, strict=True):
        n = piece.stop - piece.start
        most = min(max(SCORE_BYTES // (2 * heads * group * (piece.stop - piece.first)), LEAST), QUERIES)
        n_queries = whole_shapes(-(-n // -(-n // most)), q.dtype)  # in as few parts as there must be, of even size
        for start in range(piece.start, piece.stop, n_queries):
            stop = min(start + n_queries, piece.stop)
            at, seen = slice(start, stop), slice(piece.first, stop if piece.mask is None else piece.stop)
            of_q, of_dy, of_k, of_v = (
                _whole(x[:, :, where]).reshape(heads, -1, x.shape[3])
                for x, where in ((q, at), (dy, at), (k, seen), (v, seen))
            )
            p, ds = (x.unflatten(1, (group, -1)) for x in (_scores("p", of_q, of_k), _scores("ds", of_dy, of_v)))
            if piece.mask is None:
                p[..., -p.shape[2] :].add_(_causal_mask(p.shape[2], p.dtype))
            else:
                p[:, :, : stop - start, : seen.stop - seen.start].add_(
                    piece.mask[start - piece.start : stop - piece.start]
                )
            total = _whole(of_piece[:, :, start - piece.start : stop - piece.start, None], inf)  # where P is 0
            total, mean = (x.reshape(*p.shape[:3], 1) for x in (total, _whole(means[:, :, at])))
            _softmax_back(p, ds, total, mean, scale)
            p, ds = p.flatten(1, 2), ds.flatten(1, 2)
            for to, where, made in ((dq, at, ds @ of_k), (dk, seen, ds.mT @ of_q), (dv, seen, p.mT @ of_dy)):
                to[:, :, where].add_(made.view(*to.shape[:2], -1, to.shape[3])[:, :, : where.stop - where.start])
    return tuple(grad.to(q.dtype) for grad in grads)


def _whole(x: Tensor, value: float = 0.0) -> Tensor:
    """x (rows, heads, n, Dh), with more numbers behind the n, for products of few sizes (`backend.whole_shapes`)."""
    n = x.shape[2]
    return pad(x, (0, 0, 0, whole_shapes(n, torch.bfloat16) - n), value=value)


def _scores(purpose: str, a: Tensor, b: Tensor) -> Tensor:
    """a b^T (heads, group * queries, keys) in memory that is used again."""
    shape = *a.shape[:2], b.shape[1]
    return torch.bmm(a, b.mT, out=scratch(purpose, prod(shape), a.dtype, a.device).view(shape))


@compilable
def _softmax_back(scores: Tensor, d_p: Tensor, logsumexp: Tensor, means: Tensor, scale: float) -> None:
    """Q K^T, masked, and dP (..., queries, keys) become P and dS."""
    p = (scores.float() * scale - logsumexp).exp()
    d_p.copy_((d_p.float() - means) * p * scale)
    scores.copy_(p)


@lru_cache(maxsize=4)
def _causal_mask(n: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of n queries and their own keys."""
    return torch.full((n, n), float("-inf"), dtype=dtype).triu_(1)


def copies_for_threads(rows: int, n_q_heads: int, n_k_heads: int) -> int:
    """Of each key head, for all threads to have something to do: backward gives a thread whole key heads of a row.

    With 3 key heads of 3 query heads each and two threads one has to do 6 of 9 query heads; with 9 key heads, 5.
    """
    threads, groups = torch.get_num_threads(), n_q_heads // n_k_heads
    most, most_apart = (-(-rows * heads // threads) for heads in (n_k_heads, n_q_heads))
    return groups if most_apart < most * groups else 1


def _flash(q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """Output (B * T, Hq, Dh), logsumexp and what else its backward takes."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    made = torch.ops.aten._flash_attention_forward(q, k, v, *runs._limits, False, **runs._sides)
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
        return (_products_back if _pays_in_products(q, sees) else _pieces_back)(dy, q, k, v, y, rest, sees)
    dy, *heads = (x.flatten(0, 1) for x in (dy, q, k, v, y))
    grads = torch.ops.aten._flash_attention_backward(dy, *heads, rest[0], *sees._limits, *rest[1:], **sees._sides)
    return tuple(grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
