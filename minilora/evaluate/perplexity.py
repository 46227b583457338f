"""Perplexity: exp of the mean natural-log loss over target tokens. Batch by batch; no logits are kept."""

from collections.abc import Sequence
from math import exp, inf

import torch
from torch import Tensor

from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, batches
from minilora.loss import cross_entropy_sum
from minilora.model import Mistral, evaluating


def loss_sum(model: Mistral, batch: PackedBatch) -> Tensor:
    """Summed loss in nats of a packed batch's target tokens, () float32. The batch lies on the model's device."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments, runs=batch.runs)
    return cross_entropy_sum(hidden, model.lm_head.weight, batch.labels)


@torch.no_grad()
def mean_loss(model: Mistral, samples: Sequence[Sample], max_seq_len: int, batch_size: int = 8) -> float:
    """Mean loss in nats of all target tokens of the samples. Leaves the training mode as it was."""
    total, n_targets = 0.0, 0
    with evaluating(model):
        for batch in batches(samples, max_seq_len, batch_size, model.device):
            total += float(loss_sum(model, batch))
            n_targets += batch.n_targets
    return total / n_targets


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats; infinite where that overflows, NaN of NaN."""
    return inf if loss > 709 else exp(loss)
