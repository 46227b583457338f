"""Mean loss over target tokens, packed and batched, against each sample alone."""

from math import exp, inf, isnan, nan

import numpy as np
import pytest
import torch
from tiny_runs import TINY, tiny_model
from torch.nn.functional import cross_entropy

from minilora.data.encode import Sample
from minilora.evaluate.perplexity import mean_loss, perplexity


def samples() -> list[Sample]:
    draw = np.random.default_rng(0)
    made = []
    for n in (4, 40, 11, 2, 25, 33, 8):
        mask = draw.random(n + 1) < 0.5
        mask[0], mask[-1] = False, True
        made.append(Sample(draw.integers(14, TINY.vocab_size, n + 1, dtype=np.int32), mask, "f"))
    return made


@pytest.mark.parametrize(("max_seq_len", "batch_size"), [(40, 1), (40, 8), (64, 2), (200, 3)])
def test_it_is_the_naive_loop(max_seq_len: int, batch_size: int) -> None:
    model = tiny_model()
    losses = []
    for s in samples():
        tokens, mask = torch.tensor(s.tokens, dtype=torch.int64), torch.tensor(s.target_mask[1:])
        logits = model(tokens[None, :-1])[0]
        losses += cross_entropy(logits, tokens[1:], reduction="none")[mask].tolist()
    loss = mean_loss(model, samples(), max_seq_len, batch_size)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_it_leaves_mode_and_gradients_alone(training: bool) -> None:
    model = tiny_model().requires_grad_(True).train(training)
    mean_loss(model, samples(), 64)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_perplexity_is_exp() -> None:
    assert perplexity(1.5) == exp(1.5)
    assert perplexity(0.0) == 1.0
    assert perplexity(709.0) == exp(709)
    assert perplexity(710.0) == perplexity(1e4) == perplexity(inf) == inf
    assert isnan(perplexity(nan))
