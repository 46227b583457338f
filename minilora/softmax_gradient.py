"""Logits to their gradient, in place, and to losses: z -> softmax(z) - onehot(label), loss = log sum exp(z) - z[label].

What `loss.py` does between its two products where it has whole rows of logits: on a GPU, by the kernel of this name.
"""

import torch
from torch import Tensor

from minilora.dispatch import kernel_on_gpu


@kernel_on_gpu
def softmax_gradient_(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Losses (N,) of logits (N, V), which become their gradients: softmax(z) - onehot(label). In float32 at least.

    Where a label (N,) int64 is `ignore`, loss and gradient are zeros, whatever the logits are; where it is neither
    that nor a column, the loss is NaN.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    columns, y = torch.arange(logits.shape[1], device=logits.device), labels[:, None]
    log_p = z.log_softmax(-1)
    losses = -log_p.gather(1, y.clamp(0, len(columns) - 1))
    losses = torch.where((y < 0) | (y >= len(columns)), torch.nan, losses).masked_fill(y == ignore, 0.0)
    logits.copy_((log_p.exp() - (columns == y).to(z.dtype)).masked_fill(y == ignore, 0.0))
    return losses[:, 0]
