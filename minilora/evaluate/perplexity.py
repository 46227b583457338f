"""Perplexity: exp of the mean natural-log loss over target tokens. Batch by batch; no logits are kept."""

from collections.abc import Sequence
from math import exp

import torch

from minilora.data.encode import Sample
from minilora.data.pack import epoch_rows, make_batch
from minilora.loss import cross_entropy_sum
from minilora.model import Mistral, evaluating


@torch.no_grad()
def mean_loss(model: Mistral, samples: Sequence[Sample], max_seq_len: int, batch_size: int = 8) -> tuple[float, int]:
    """Mean loss in nats of all target tokens of the samples, and their number. Leaves the training mode as it was."""
    rows = epoch_rows([s.length for s in samples], max_seq_len, seed=0, epoch=0, shuffle=False)
    total, n_targets = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = make_batch(samples, rows[start : start + batch_size], max_seq_len, trim=True).to(model.device)
            hidden = model.hidden(batch.tokens, batch.positions, batch.segments, runs=batch.runs)
            total += float(cross_entropy_sum(hidden, model.lm_head.weight, batch.labels))
            n_targets += batch.n_targets
    return total / n_targets, n_targets


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats; infinite where that overflows."""
    return exp(loss) if loss < 700 else float("inf")
