"""Cross entropy of the next token, tile by tile: the full logits (N, V) never exist.

loss = sum over target rows of logsumexp(z) - z[label],  z = h W^T;   dloss/dh = softmax(z) W - W[label]

A tile is some rows of h times some columns of z. It is made, turned into exp(z - m) and multiplied by its part of W
while it is in the cache, then thrown away. m, the row's largest logit so far, may grow from tile to tile: what was
summed before shrinks by exp(m_old - m_new), as in FlashAttention (https://arxiv.org/abs/2205.14135). So forward makes
h's gradient with the loss, and backward has nothing to compute again. Where W learns, a tile has all columns: W's
gradient needs the whole sum. Logits are 131 kB a row (V = 32768, float32); what is kept, h's gradient, is 8 kB (bf16).

On a GPU a tile has all columns, too, in 16 bits: between the two products its logits become their gradient
(`softmax_gradient.py`). Rows without a target are computed like the others: leaving them out would need the host to
know how many there are. So it never waits for the GPU, and the whole can be captured as a CUDA graph.
"""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from minilora.backend import padded_rows, product_dtype
from minilora.compiled import compilable
from minilora.linear import add_product_
from minilora.softmax_gradient import softmax_gradient_

IGNORE = -100  # the label of a row that is no target
ROWS = 512  # of a tile, at most: the more, the less often W is read
COLUMNS = 2048  # the same: 4 MiB of float32 logits are in a CPU's cache; few rows have no more, as W's may be widened
WHOLE_BYTES = 64 << 20  # where a tile has all columns
GPU_ROWS = 128  # of a GPU's products: a tile's are a multiple


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Summed natural-log loss, () float32, of the rows of hidden (..., D) whose label (...) is not IGNORE.

    head: (V, D), the output projection. A label that is not in it is an error on a CPU; on a GPU, which nobody waits
    for here, it makes the sum NaN, which no step is taken with.
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if not torch.is_grad_enabled():
        head = head.detach()  # else a head that learns would have its gradient made in validation too
    if rows.device.type != "cpu":
        return _whole_row_cross_entropy(rows, head, labels)
    targets = labels != IGNORE
    return _tiled_cross_entropy(rows[targets], head, labels[targets])


def tile(n_rows: int, n_columns: int, head_learns: bool) -> tuple[int, int]:
    """Rows and columns of the (n_rows, n_columns) logits that a CPU has in work at a time, at least one of each."""
    if head_learns:
        return max(1, min(n_rows, WHOLE_BYTES // (4 * n_columns))), n_columns
    return max(1, min(n_rows, ROWS)), max(1, min(n_columns, COLUMNS))


def whole_rows(n_rows: int, n_columns: int, itemsize: int) -> int:
    """How many rows of the (n_rows, n_columns) logits a GPU has in work at a time, at least one."""
    rows = WHOLE_BYTES // (itemsize * n_columns)
    return max(1, min(n_rows, rows - rows % GPU_ROWS if rows > GPU_ROWS else rows))


@compilable
def _exponentials(
    z: Tensor, at: Tensor, largest: Tensor, sums: Tensor, label_logit: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a tile's logits z (n, columns), which may be overwritten: exp(z - m) in `dtype`; the factor for earlier sums;
    and m, the sums and the labels' logits with this tile, all (n, 1) float32.

    at: (n, 1) int64, the labels as columns of the tile, if they are in it
    """
    inside, z = (at >= 0) & (at < z.shape[1]), z.float()
    label_logit = torch.where(inside, z.gather(1, at.clamp(0, z.shape[1] - 1)), label_logit)
    before, largest = largest, torch.maximum(largest, z.amax(-1, keepdim=True))
    p, shrink = z.sub_(largest).exp_(), (before - largest).exp_()
    return p.to(dtype), shrink, largest, (sums * shrink).add_(p.sum(-1, keepdim=True)), label_logit


class _TiledCrossEntropy(torch.autograd.Function):
    """hidden (N, D), head (V, D), labels (N,) -> the summed loss, () float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype = product_dtype(hidden)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        n_rows, n_columns = tile(len(hidden), len(head), grad_head is not None)
        buffer = hidden.new_empty(
            padded_rows(n_rows, dtype) * n_columns, dtype=dtype
        )  # one for all tiles: new memory is slow
        for start in range(0, len(hidden), n_rows):
            n = min(n_rows, len(hidden) - start)
            more = (0, 0, 0, padded_rows(n, dtype) - n)  # rows of zeros, whose loss and gradient nobody reads
            h, y = pad(hidden[start : start + n].to(dtype), more), pad(labels[start : start + n, None], more)
            largest, sums, label_logit = (torch.full((len(h), 1), at, device=h.device) for at in (-inf, 0.0, -inf))
            grad = torch.zeros(h.shape, device=h.device)
            for column in range(0, len(head), n_columns):
                w = head[column : column + n_columns].to(dtype)
                z = torch.mm(h, w.T, out=buffer[: len(h) * len(w)].view(len(h), len(w)))
                wide = dtype if grad_head is None else torch.float32
                p, shrink, largest, sums, label_logit = _exponentials(z, y - column, largest, sums, label_logit, wide)
                if grad_hidden is not None:
                    _accumulate(grad.mul_(shrink), p.to(dtype), w)
                if grad_head is not None:  # one tile, so `sums` is whole
                    p.scatter_add_(1, y, -sums)
                    _accumulate(grad_head, p.to(dtype).T, (h / sums).to(dtype))
                del z, p, w  # before the next tile is made
            total += (largest + sums.log() - label_logit)[:n].sum()
            of_label = head.index_select(0, y[:, 0])  # an error where there is no such label, without gradients too
            if grad_hidden is not None:
                grad_hidden[start : start + n] = grad.div_(sums).sub_(of_label)[:n]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            None,
        )


class _WholeRowCrossEntropy(_TiledCrossEntropy):
    """The same of all rows, without a wait: hidden (N, D), head (V, D), labels (N,), some IGNORE."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        w, n_rows = head.to(hidden.dtype), whole_rows(len(hidden), len(head), hidden.itemsize)
        buffer = hidden.new_empty(n_rows, len(head))
        for start in range(0, len(hidden), n_rows):
            h, y = hidden[start : start + n_rows], labels[start : start + n_rows]
            z = torch.mm(h, w.T, out=buffer[: len(h)])
            total += softmax_gradient_(z, y, IGNORE).sum()
            if grad_hidden is not None:
                torch.mm(z, w, out=grad_hidden[start : start + n_rows])
            if grad_head is not None:  # in rows without a target h may be anything, and 0 * NaN is NaN
                add_product_(grad_head, z.T, h.masked_fill((y == IGNORE)[:, None], 0.0))
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total


def _accumulate(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to (M, N) += a (M, K) b (K, N); `to` is float32."""
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


_tiled_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = _TiledCrossEntropy.apply
_whole_row_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = _WholeRowCrossEntropy.apply
