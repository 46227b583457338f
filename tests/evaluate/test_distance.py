"""The distance between two models, against a computation of one sample at a time."""

import math

import numpy as np
import pytest
import torch
from adapters import as_trained, base_predictor, distance, lora_layers, predictor
from tiny_runs import TINY, tiny_model

from minilora.config import LoraConfig
from minilora.data.encode import Sample
from minilora.lora import add_lora
from minilora.model import Mistral


def samples() -> list[Sample]:
    draw = np.random.default_rng(0)
    made = []
    for n in (5, 20, 11, 2):
        mask = draw.random(n + 1) < 0.6
        mask[0], mask[-1] = False, True
        made.append(Sample(draw.integers(14, TINY.vocab_size, n + 1, dtype=np.int32), mask, "f"))
    return made


def with_adapters(strength: float) -> Mistral:
    torch.manual_seed(0)
    return as_trained(add_lora(tiny_model(), LoraConfig(rank=2)), strength)


def test_a_model_is_no_distance_from_itself() -> None:
    p = predictor(tiny_model())
    got = distance(p, p, samples(), 32)
    assert (got.mean_kl, got.max_logit_difference, got.top1_agreement) == (0.0, 0.0, 1.0)
    assert got.n_tokens == sum(s.n_targets for s in samples())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_it_is_the_naive_computation(batch_size: int) -> None:
    a, b = tiny_model(0), with_adapters(0.03)
    kl, largest, agreed = [], 0.0, []
    for s in samples():
        tokens, mask = torch.tensor(s.tokens, dtype=torch.int64), s.target_mask[1:]
        with torch.no_grad():
            za, zb = a(tokens[None, :-1])[0][mask].double(), b(tokens[None, :-1])[0][mask].double()
        for x, y in zip(za.softmax(-1), zb.softmax(-1), strict=True):
            kl.append(sum(float(u) * (math.log(u) - math.log(v)) for u, v in zip(x, y, strict=True)))
        largest = max(largest, float((za - zb).abs().max()))
        agreed += (za.argmax(-1) == zb.argmax(-1)).tolist()
    got = distance(predictor(a), predictor(b), samples(), 24, batch_size)
    assert got.mean_kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert got.max_logit_difference == pytest.approx(largest, rel=1e-4)
    assert got.top1_agreement == pytest.approx(sum(agreed) / len(agreed), rel=1e-12)
    assert 0 < got.top1_agreement < 1
    assert got.mean_kl != pytest.approx(distance(predictor(b), predictor(a), samples(), 24).mean_kl, rel=1e-3)


def test_the_base_of_a_model_is_the_model_without_adapters() -> None:
    model = with_adapters(0.3)
    got = distance(base_predictor(model), predictor(tiny_model()), samples(), 24)
    assert (got.mean_kl, got.max_logit_difference) == (0.0, 0.0)
    assert all(layer.enabled for _, layer in lora_layers(model))
