"""How far one model's next-token distribution is from another's, on the target tokens of held-out text.

KL(p, q) = sum over v of p(v) (ln p(v) - ln q(v)),  in nats a token
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, epoch_rows, make_batch
from minilora.lora import adapters_off
from minilora.loss import IGNORE
from minilora.model import Mistral


@dataclass(frozen=True)
class Distance:
    """mean_kl: KL(p, q) a token; max_logit_difference; top1_agreement: share of tokens with the same likeliest next."""

    mean_kl: float
    max_logit_difference: float
    top1_agreement: float
    n_tokens: int


Predictor = Callable[[PackedBatch], Tensor]  # a batch -> the logits (targets, V) of its target tokens, float32


def predictor(model: Mistral) -> Predictor:
    """The model's own predictions."""

    def logits(batch: PackedBatch) -> Tensor:
        batch = batch.to(model.device)
        hidden = model.hidden(batch.tokens, batch.positions, batch.segments)
        rows: Tensor = model.lm_head(hidden[batch.labels != IGNORE])
        return rows.float()

    return logits


def base_predictor(model: Mistral) -> Predictor:
    """The predictions of a model with its adapters off."""

    def logits(batch: PackedBatch) -> Tensor:
        with adapters_off(model):
            return predictor(model)(batch)

    return logits


@torch.no_grad()
def distance(p: Predictor, q: Predictor, samples: Sequence[Sample], max_seq_len: int, batch_size: int = 1) -> Distance:
    """From p to q, of models in evaluation mode, over all target tokens of the samples."""
    rows = epoch_rows([s.length for s in samples], max_seq_len, seed=0, epoch=0, shuffle=False)
    kl, largest, agreed, n_tokens = 0.0, 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = make_batch(samples, rows[start : start + batch_size], max_seq_len, trim=True)
        logits_p = p(batch)
        logits_q = q(batch).to(logits_p.device)
        log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        largest = max(largest, float((logits_p - logits_q).abs().max()))
        agreed += int((logits_p.argmax(-1) == logits_q.argmax(-1)).sum())
        n_tokens += len(logits_p)
    return Distance(kl / n_tokens, largest, agreed / n_tokens, n_tokens)
