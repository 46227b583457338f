"""RMSNorm against transformers' module, bit for bit, and against its equation in float64."""

import pytest
import torch
from torch import Tensor
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from minilora.norm import RMSNorm

D = 96


def norms(eps: float, dtype: torch.dtype) -> tuple[RMSNorm, MistralRMSNorm]:
    weight = torch.randn(D, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = RMSNorm(D, eps).to(dtype), MistralRMSNorm(D, eps).to(dtype)
    ours.load_state_dict({"weight": weight})
    theirs.load_state_dict({"weight": weight})
    return ours, theirs


def vectors(scale: float, dtype: torch.dtype) -> Tensor:
    return (scale * torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0])
def test_equals_transformers_bit_for_bit_forward_and_backward(scale: float, dtype: torch.dtype) -> None:
    ours, theirs = norms(1e-5, dtype)
    x, y = vectors(scale, dtype).requires_grad_(), vectors(scale, dtype).requires_grad_()
    assert torch.equal(ours(x), theirs(y))
    upstream = vectors(1.0, dtype).flip(0)
    ours(x).backward(upstream)
    theirs(y).backward(upstream)
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_is_its_equation(eps: float) -> None:
    norm, _ = norms(eps, torch.float32)
    x = vectors(0.3, torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x.float()), expected.float(), rtol=1e-6, atol=1e-6)


def test_half_precision_squares_are_summed_in_float32() -> None:
    """300^2 is beyond float16, and a mean of bfloat16 numbers would be off by a percent."""
    x = torch.full((1, D), 300.0, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(D, 1e-5).half()(x), torch.ones_like(x))


def test_zeros_stay_zeros() -> None:
    assert torch.equal(RMSNorm(D, 1e-5)(torch.zeros(2, D)), torch.zeros(2, D))
