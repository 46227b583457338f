"""Cross entropy of the next token, tile by tile: the full logits (N, V) never exist.

loss = sum over target rows of logsumexp(z) - z[label],  z = h W^T;   dloss/dh = softmax(z) W - W[label]

A tile is some rows of h times some columns of z. It is made, turned into exp(z - m) and multiplied by its part of W
while it is in the cache, then thrown away. m, the row's largest logit so far, may grow from tile to tile: what was
summed before shrinks by exp(m_old - m_new), as in FlashAttention (https://arxiv.org/abs/2205.14135). So forward makes
h's gradient with the loss, and backward has nothing to compute again. Where W learns, a tile has all columns: W's
gradient needs the whole sum. Logits are 131 kB a row (V = 32768, float32); what is kept, h's gradient, is 8 kB (bf16).
"""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from minilora.backend import product_dtype

IGNORE = -100  # the label of a row that is no target
ROWS = {"cpu": 512, "cuda": 4096}  # of a tile, at most: the more, the less often W is read
TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of float32 logits: a CPU's cache, a GPU's work for one launch
WHOLE_BYTES = 64 << 20  # where a tile has all columns


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Summed natural-log loss, () float32, of the rows of hidden (..., D) whose label (...) is not IGNORE.

    head: (V, D), the output projection
    """
    targets = labels.reshape(-1) != IGNORE
    rows = hidden.reshape(-1, hidden.shape[-1])[targets]
    if not torch.is_grad_enabled():
        head = head.detach()  # else a head that learns would have its gradient made in validation too
    return _tiled_cross_entropy(rows, head, labels.reshape(-1)[targets])


def tile(n_rows: int, n_columns: int, device_type: str, head_learns: bool) -> tuple[int, int]:
    """Rows and columns of the (n_rows, n_columns) logits that are in work at a time, at least one of each."""
    if head_learns:
        return max(1, min(n_rows, WHOLE_BYTES // (4 * n_columns))), n_columns
    rows = max(1, min(n_rows, ROWS[device_type]))
    return rows, max(1, min(n_columns, TILE_BYTES[device_type] // (4 * rows)))


class _TiledCrossEntropy(torch.autograd.Function):
    """hidden (N, D), head (V, D), labels (N,) -> the summed loss, () float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype = product_dtype(hidden)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        n_rows, n_columns = tile(len(hidden), len(head), hidden.device.type, grad_head is not None)
        buffer = hidden.new_empty(n_rows * n_columns, dtype=dtype)  # one for all tiles: new memory is slow
        for start in range(0, len(hidden), n_rows):
            h, y = hidden[start : start + n_rows].to(dtype), labels[start : start + n_rows, None]
            largest, sums, label_logit = (torch.full((len(h), 1), at, device=h.device) for at in (-inf, 0.0, -inf))
            grad = torch.zeros(h.shape, device=h.device)
            for column in range(0, len(head), n_columns):
                w = head[column : column + n_columns].to(dtype)
                z = torch.mm(h, w.T, out=buffer[: len(h) * len(w)].view(len(h), len(w))).float()
                at = y - column
                label_logit = torch.where((at >= 0) & (at < len(w)), z.gather(1, at.clamp(0, len(w) - 1)), label_logit)
                before, largest = largest, torch.maximum(largest, z.amax(-1, keepdim=True))
                p, shrink = z.sub_(largest).exp_(), (before - largest).exp_()
                sums.mul_(shrink).add_(p.sum(-1, keepdim=True))
                if grad_hidden is not None:
                    _add_product(grad.mul_(shrink), p.to(dtype), w)
                if grad_head is not None:  # one tile, so `sums` is whole
                    p.scatter_add_(1, y, -sums)
                    _add_product(grad_head, p.to(dtype).T, (h / sums).to(dtype))
                del z, p  # before the next tile is made
            total += (largest + sums.log() - label_logit).sum()
            of_label = head.index_select(0, y[:, 0])  # an error where there is no such label, without gradients too
            if grad_hidden is not None:
                grad_hidden[start : start + n_rows] = grad.div_(sums).sub_(of_label)
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


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to (M, N) += a (M, K) b (K, N); `to` is float32."""
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


_tiled_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = _TiledCrossEntropy.apply
