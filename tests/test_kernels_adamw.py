"""The AdamW kernel against its definition, both against float64: in Triton's interpreter, or on a GPU."""

from inspect import unwrap
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from minilora import adamw
from minilora.adamw import Update
from minilora.dynamic_8bit import dynamic_map
from minilora.kernels.adamw import BLOCK, adamw_, adamw_8bit_
from minilora.nf4 import CPU

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
    update = Update(lr, 0.9, 0.95, 1e-8, weight_decay, step, grad_scale)
    given = problem(n)
    exact, sizes = in_float64(given, *update)
    for function in (adamw_, unwrap(adamw.adamw_)):
        p, grad, m, v = (part.clone() for part in given)
        function(p, grad, m, v, update)
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
    adamw_(*parts, Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 1.0))
    assert not any(part.any() for part in parts)


def test_the_first_step_is_the_learning_rate() -> None:
    p, grad, m, v = (torch.zeros(3, device=DEVICE) for _ in range(4))
    grad.copy_(torch.tensor([1e-3, -5.0, 1e4]))
    adamw_(p, grad, m, v, Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0))
    torch.testing.assert_close(p.cpu(), torch.tensor([-1e-2, 1e-2, -1e-2]), rtol=2e-5, atol=0)  # 1e-8 / 1e-3


def test_the_change_is_told_to_autograd() -> None:
    parts = problem(10)
    leaf = torch.ones(10, device=DEVICE, requires_grad=True)
    product = leaf * parts[0]
    adamw_(*parts, Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0))
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
    with pytest.raises(ValueError, match=rf"{named} must be \(\d+,\) contiguous float32 on"):
        adamw_(*parts, Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0))


def test_the_corrections_are_the_host_s() -> None:
    """At the first step 1 - 0.999 stands over itself; in float32 it is 1.3e-5 off, which only one of the two may be."""
    p, grad, m, v = (torch.full((4,), float(i == 1), device=DEVICE) for i in range(4))
    adamw_(p, grad, m, v, Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0))
    torch.testing.assert_close(p.cpu(), torch.full((4,), -1e-2), rtol=1e-6, atol=0)


# -- moments in 8 bits -------------------------------------------------------------------------------------------------


def problem_in_8_bits(n: int) -> list[Tensor]:
    """p, grad, and any codes with any absmax, of which the first block's are zeros."""
    generator = torch.Generator().manual_seed(n)
    m, v = (torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for _ in range(2))
    m_absmax, v_absmax = (torch.rand(n // 256, generator=generator) for _ in range(2))
    m_absmax[0] = v_absmax[0] = 0.0
    return [*problem(n)[:2], *(part.to(DEVICE) for part in (m, v, m_absmax, v_absmax))]


def decoded(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    levels = dynamic_map(CPU, signed).double()[codes.int().cpu()].to(DEVICE)
    return (levels.view(-1, 256) * absmax[:, None].double()).view(-1)


@pytest.mark.parametrize("n", [256, BLOCK, BLOCK + 256, 5 * BLOCK - 512])
@pytest.mark.parametrize(
    ("lr", "weight_decay", "step", "grad_scale"),
    [(1e-2, 0.0, 1, 1.0), (1e-2, 0.1, 2, 0.25), (3e-4, 0.01, 10_000, 1e-3)],
)
def test_in_8_bits_it_is_the_definition(n: int, lr: float, weight_decay: float, step: int, grad_scale: float) -> None:
    """p is as near to float64 as in 32 bits, a seventh rounding of m added; that of v is within its eight. A code is
    the nearest, or within roundings of being it: then the number is as far from its level as from the next."""
    update = Update(lr, 0.9, 0.95, 1e-8, weight_decay, step, grad_scale)
    given = problem_in_8_bits(n)
    m, v = decoded(given[2], given[4], True), decoded(given[3], given[5], False)
    exact, sizes = in_float64([given[0], given[1], m, v], *update)
    for function in (adamw_8bit_, unwrap(adamw.adamw_8bit_)):
        p, grad, *state = (part.clone() for part in given)
        function(p, grad, *state, update)
        assert torch.equal(grad, given[1])
        assert bool(((p.double() - exact["p"]).abs() <= 1.2 * sizes["p"] * UNIT).all()), function.__module__
        for name, codes, absmax, signed in (("m", state[0], state[2], True), ("v", state[1], state[3], False)):
            off = 1.2 * sizes[name].view(-1, 256) * UNIT
            blocks = exact[name].view(-1, 256)
            largest = blocks.abs().amax(1)
            assert bool(((absmax.double() - largest).abs() <= off.amax(1)).all()), (function.__module__, name)
            levels, here = dynamic_map(CPU, signed).double().to(DEVICE), codes.view(-1, 256).int()
            scaled = blocks / largest.clamp(min=1e-38)[:, None]
            nearest = (scaled[..., None] - levels).abs().amin(-1)
            if not signed:  # what is above zero stays so
                nearest = torch.where((scaled > 0) & (scaled < levels[1] / 2), levels[1] - scaled, nearest)
            allowed = nearest + 4 * (off / largest.clamp(min=1e-38)[:, None] + UNIT)
            assert bool(((scaled - levels[here]).abs() <= allowed).all()), (function.__module__, name)
            assert signed or bool(((here > 0) == (scaled > 0)).all())


def test_in_8_bits_nothing_happens_to_what_has_no_gradient_and_no_moments() -> None:
    parts = [torch.zeros(512, device=DEVICE) for _ in range(2)]
    codes = [torch.zeros(512, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    absmax = [torch.zeros(2, device=DEVICE) for _ in range(2)]
    adamw_8bit_(*parts, *codes, *absmax, Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 1.0))
    assert not any(part.any() for part in (*parts, *absmax))


@pytest.mark.parametrize(("at", "named"), [*enumerate(("p", "grad", "m", "v", "m_absmax", "v_absmax"))])
def test_what_the_kernel_of_8_bits_cannot_take(at: int, named: str) -> None:
    update = Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)
    parts: list[Any] = problem_in_8_bits(512)
    wrong = parts.copy()
    wrong[at] = parts[at].double()
    with pytest.raises(ValueError, match=rf"{named} must be \(\d+,\) contiguous (float32|uint8) on"):
        adamw_8bit_(*wrong, update)
    with pytest.raises(ValueError, match="p must have a multiple of 256 numbers; it has 511"):
        adamw_8bit_(*(part[:511] for part in parts), update)
