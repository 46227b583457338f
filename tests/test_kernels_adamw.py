"""The AdamW kernel against its definition, both against float64: in Triton's interpreter, or on a GPU."""

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from minilora import adamw
from minilora.kernels.adamw import BLOCK, adamw_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNIT = 2.0**-24


def problem(n: int) -> list[Tensor]:
    """p, grad, m and v (n,), of which v is positive, with some of each zero."""
    generator = torch.Generator().manual_seed(n)
    p, grad, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    for part in (p, grad, m, v):
        part[torch.rand(n, generator=generator) < 0.1] = 0.0
    return [part.to(DEVICE) for part in (p, 3 * grad, m, v.abs())]


@pytest.mark.parametrize("n", [1, 16, 1000, BLOCK, BLOCK + 1, 5 * BLOCK - 16])
@pytest.mark.parametrize(
    ("lr", "weight_decay", "step", "grad_scale"),
    [(1e-2, 0.0, 1, 1.0), (1e-2, 0.1, 2, 0.25), (3e-4, 0.01, 10_000, 1e-3)],
)
def test_it_is_the_definition(n: int, lr: float, weight_decay: float, step: int, grad_scale: float) -> None:
    """Each is as near to float64 as its roundings, `in_float64` counts them."""
    settings = (lr, 0.9, 0.95, 1e-8, weight_decay, step, grad_scale)
    given = problem(n)
    exact, sizes = in_float64(given, *settings)
    for function in (adamw_, adamw.adamw_):
        p, grad, m, v = (part.clone() for part in given)
        function(p, grad, m, v, *settings)
        assert torch.equal(grad, given[1])
        for name, ours in (("m", m), ("v", v), ("p", p)):
            off = (ours.double() - exact[name]).abs()
            assert bool((off <= sizes[name] * UNIT).all()), (function.__module__, name)


def in_float64(
    given: list[Tensor], lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int, grad_scale: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What comes out by the formula, and how much each may be off by, number by number, in units of one rounding.

    A term of m has six at most: scale, g, its difference from m, weight, product, sum. One of v eight: scale and g
    twice, the square, weight, product, sum. p has three: what decay leaves of it, the product, the sum. The update has
    m's, half of v's, and ten: a root of two (a GPU's), eps, a quotient of four (a GPU's), step size, product, sum.
    """
    p, g, m, v = (part.double() for part in given)
    g = g * grad_scale
    new_m, new_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    root = (new_v / (1 - beta2**step)).sqrt() + eps
    size = lr / (1 - beta1**step) / root
    exact = {"m": new_m, "v": new_v, "p": p - lr * decay * p - size * new_m}
    of_m = 6 * (m.abs() + (1 - beta1) * g.abs())
    sizes = {"m": of_m, "v": 8 * new_v, "p": 3 * p.abs() + size * (of_m + (8 / 2 + 10) * new_m.abs())}
    return exact, {name: t + 1e-30 for name, t in sizes.items()}


def test_nothing_happens_to_what_has_no_gradient_and_no_moments() -> None:
    """The numbers between two parameters stay zeros."""
    parts = [torch.zeros(100, device=DEVICE) for _ in range(4)]
    adamw_(*parts, 1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 1.0)
    assert not any(part.any() for part in parts)


def test_the_first_step_is_the_learning_rate() -> None:
    p, grad, m, v = (torch.zeros(3, device=DEVICE) for _ in range(4))
    grad.copy_(torch.tensor([1e-3, -5.0, 1e4]))
    adamw_(p, grad, m, v, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)
    torch.testing.assert_close(p.cpu(), torch.tensor([-1e-2, 1e-2, -1e-2]), rtol=2e-5, atol=0)  # 1e-8 / 1e-3


def test_the_change_is_told_to_autograd() -> None:
    parts = problem(10)
    leaf = torch.ones(10, device=DEVICE, requires_grad=True)
    product = leaf * parts[0]
    adamw_(*parts, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "bad", [torch.zeros(10).double(), torch.zeros(20)[::2], torch.zeros(2, 5), torch.zeros(9), torch.zeros(10).half()]
)
def test_what_the_kernel_cannot_take(at: int, bad: Tensor) -> None:
    parts: list[Any] = problem(10)
    parts[at] = bad.to(DEVICE)
    named = ("p", "grad", "m", "v")[at] if bad.shape != (9,) or at else "grad"
    with pytest.raises(ValueError, match=rf"{named} must be \(n,\) contiguous float32"):
        adamw_(*parts, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)


def test_the_corrections_are_the_host_s() -> None:
    """At a late step they are one; float32 would have made 0.999^1e5 a denormal number's root."""
    p, grad, m, v = (torch.ones(4, device=DEVICE) for _ in range(4))
    adamw_(p, grad, m, v, 1e-2, 0.9, 0.999, 1e-8, 0.0, 100_000, 1.0)
    torch.testing.assert_close(p.cpu(), torch.full((4,), 1 - 1e-2 / sqrt(1.0)), rtol=1e-6, atol=0)
