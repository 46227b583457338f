"""Attention's backward on a CPU as products in 16 bits, with one compiled loop between them (`compiled.py`).

    P = exp(s Q K^T - logsumexp)     dP = dY V^T     dS = s P (dP - sum(dY Y))
    dQ = dS K                        dK = dS^T Q     dV = P^T dY

torch's kernel for it multiplies in small tiles, far below the rate of such products. Some queries with all the keys
that they may see are in work at a time; so scores are never T x T.
"""

from functools import lru_cache
from math import inf, prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from minilora.backend import product_dtype, whole_shapes
from minilora.compiled import compilable, compiles
from minilora.scratch import scratch
from minilora.visible import QUERIES, Pieces

SCORE_BYTES = 5 << 20  # of scores in work at a time, at most, unless these are of few queries:
LEAST = 128
WORTH = 1 << 19  # scores of a piece, on average, from which on this is faster than torch's kernel


def pays(q: Tensor, sees: Pieces) -> bool:
    """Whether `products_back` is the faster: where loops are compiled, and the CPU multiplies in q's 16 bits."""
    scores = sum((piece.stop - piece.start) * (piece.stop - piece.first) for piece in sees.pieces)
    fits = compiles(q.device) and q.dtype.itemsize == 2 and product_dtype(q) == q.dtype
    return fits and sees.rows * q.shape[2] * scores >= WORTH * len(sees.pieces)


@torch.no_grad()
def products_back(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: tuple[Tensor, ...], sees: Pieces
) -> tuple[Tensor, ...]:
    """The gradients of q (B, T, Hq, Dh), k and v (B, T, Hkv, Dh), from y's, and each piece's logsumexp."""
    heads, group, scale = sees.rows * k.shape[2], q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    grads = [torch.zeros_like(q), *(torch.zeros(x.shape) for x in (k, v))]
    means = torch.linalg.vecdot(dy.float(), y.float())[..., None]
    (q, dy, means, k, v), (dq, dk, dv) = sees.parts(q, dy, means, k, v), sees.parts(*grads)
    for piece, of_piece in zip(sees.pieces, sums, strict=True):
        n = piece.stop - piece.start
        most = min(max(SCORE_BYTES // (2 * heads * group * (piece.stop - piece.first)), LEAST), QUERIES)
        n_queries = whole_shapes(-(-n // -(-n // most)), q.dtype)  # in as few parts as there must be, of even size
        for start in range(piece.start, piece.stop, n_queries):
            stop = min(start + n_queries, piece.stop)
            at, inside = slice(start, stop), slice(start - piece.start, stop - piece.start)
            seen = slice(piece.first, stop if piece.mask is None else piece.stop)
            of_q, of_dy = (_whole(x[:, :, at]).reshape(heads, -1, x.shape[3]) for x in (q, dy))
            of_k, of_v = (_whole(x[:, :, seen]).reshape(heads, -1, x.shape[3]) for x in (k, v))
            p, ds = (x.unflatten(1, (group, -1)) for x in (_scores("p", of_q, of_k), _scores("ds", of_dy, of_v)))
            more = (0, p.shape[3] - (seen.stop - seen.start), 0, p.shape[2] - (stop - start))  # which nobody sees
            mask = _causal_mask(p.shape[2]) if piece.mask is None else pad(piece.mask[inside], more, value=-inf)
            p[..., -mask.shape[1] :].add_(mask.to(p.dtype))
            by_row = _whole(of_piece[:, :, inside, None], inf), _whole(means[:, :, at])  # of what is no query P is 0
            total, mean = (x.reshape(*p.shape[:3], 1) for x in by_row)
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


@lru_cache(maxsize=4)
def _causal_mask(n: int) -> Tensor:
    """What is added to the scores of n queries and their own keys."""
    return torch.full((n, n), -inf, dtype=torch.bfloat16).triu_(1)


@compilable
def _softmax_back(scores: Tensor, d_p: Tensor, logsumexp: Tensor, means: Tensor, scale: float) -> None:
    """Q K^T, masked, and dP (..., queries, keys) become P and dS."""
    p = (scores.float() * scale - logsumexp).exp()
    d_p.copy_((d_p.float() - means) * p * scale)
    scores.copy_(p)
