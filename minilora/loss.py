"""Cross entropy of the next token, in chunks of rows: the full logits (N, V) never exist.

loss = sum over target rows of logsumexp(z) - z[label],  z = h W^T;   dloss/dz = softmax(z) - onehot(label)

Each chunk's gradient is made at once from its logits and only h's (and, if it learns, W's) is kept, so backward has
nothing to compute again. Kept logits would be 131 kB a row (V = 32768, float32); the kept gradient of h is 8 kB (bf16).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora.backend import product_dtype
from minilora.linear import multiply, multiply_back

IGNORE = -100  # the label of a row that is no target
CHUNK_BYTES = 64 << 20  # of float32 logits in work at a time


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Summed natural-log loss, () float32, of the rows of hidden (..., D) whose label (...) is not IGNORE.

    head: (V, D), the output projection
    """
    targets = labels.reshape(-1) != IGNORE
    rows = hidden.reshape(-1, hidden.shape[-1])[targets]
    if not torch.is_grad_enabled():
        head = head.detach()  # else a head that learns would have its gradient made in validation too
    return _chunked_cross_entropy(rows, head, labels.reshape(-1)[targets])


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype = product_dtype(hidden)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        n_chunks = max(1, -(-4 * len(hidden) * head.shape[0] // CHUNK_BYTES))
        n_rows = max(1, -(-len(hidden) // n_chunks))
        buffer = hidden.new_empty(n_rows, head.shape[0], dtype=dtype)  # one for all chunks: new memory is slow
        wide = buffer if dtype == torch.float32 else torch.empty_like(buffer, dtype=torch.float32)
        for start in range(0, len(hidden), n_rows):
            h, y = hidden[start : start + n_rows].to(dtype), labels[start : start + n_rows, None]
            product, logits = multiply(h, head, out=buffer[: len(h)]), wide[: len(h)]  # (chunk, V)
            if wide is not buffer:
                logits.copy_(product)
            label_logit, largest = logits.gather(1, y), logits.amax(-1, keepdim=True)
            p = torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)  # in place
            # logsumexp from the largest probability, which is at least 1/V and so has all its digits
            log_sum = largest - p.amax(-1, keepdim=True).log()
            total += (log_sum - label_logit).sum()
            if grad_hidden is None and grad_head is None:
                continue
            p.scatter_add_(1, y, torch.full_like(label_logit, -1))
            grad = p if dtype == torch.float32 else product.copy_(p)
            if grad_hidden is not None:
                grad_hidden[start : start + n_rows] = multiply_back(grad, head)
            if grad_head is not None:
                grad_head += grad.T @ h
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


_chunked_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = _ChunkedCrossEntropy.apply
