"""NEFTune's noise: its bound and distribution, the length it goes by, and transformers' own with the same draw."""

import pytest
import torch
from tiny_runs import TINY, tiny_model
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from minilora.neftune import with_noise


def test_equals_transformers_with_the_same_draw() -> None:
    x = torch.randn(2, 30, 8)
    theirs = nn.Identity().train()
    theirs.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    torch.manual_seed(3)
    expected = neftune_post_forward_hook(theirs, None, x)
    torch.manual_seed(3)
    torch.testing.assert_close(with_noise(x, None, 5.0), expected, rtol=1e-6, atol=1e-7)


def test_each_sample_of_a_packed_row_has_the_noise_of_its_own_length() -> None:
    lengths, size, alpha = [40, 9, 1], 1000, 5.0
    segments = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    torch.manual_seed(0)
    noise = with_noise(torch.zeros(1, 50, size), segments, alpha)[0]
    for i, n in enumerate(lengths):
        own, bound = noise[segments[0] == i], alpha / (n * size) ** 0.5
        assert own.abs().max() <= bound
        assert own.abs().max() > 0.99 * bound
        assert float(own.std()) == pytest.approx(bound / 3**0.5, rel=0.05)  # uniform
        assert abs(float(own.mean())) < 0.1 * bound


def test_the_model_adds_it_while_training_only() -> None:
    model, tokens = tiny_model(), torch.arange(20, 32)[None]
    quiet = model(tokens)
    model.neftune_alpha = 5.0
    assert torch.equal(model(tokens), quiet)
    model.train()
    torch.manual_seed(0)
    noisy = model(tokens)
    assert not torch.equal(noisy, quiet)
    torch.manual_seed(0)
    assert torch.equal(model(tokens), noisy)
    model.neftune_alpha = 0.0
    assert torch.equal(model(tokens), quiet)
    assert with_noise(torch.zeros(1, 4, TINY.dim, dtype=torch.bfloat16), None, 1.0).dtype == torch.bfloat16
