"""The norm's kernels against the definition, and against autograd: in Triton's interpreter, or on a GPU."""

from inspect import unwrap

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_no_worse, leaves, random, widened
from torch import Tensor
from torch.nn.functional import rms_norm as torchs

from minilora import norm
from minilora.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward
from minilora.norm import RMSNorm

EPS = 1e-5
SHAPES = [(1, 1), (1, 2), (3, 64), (5, 100), (2, 511), (3, 514), (2, 2048), (1, 5120), (2, 8192)]
# of the residual stream and of the norm
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, dtype) for dtype in DTYPES[1:]]
defined_norm, defined_add, defined_back = (
    unwrap(function) for function in (norm.rms_norm, norm.add_rms_norm, norm.rms_norm_backward)
)


def plain_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """By the module."""
    module = RMSNorm(x.shape[-1], eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    y: Tensor = module(x)
    return y


@pytest.mark.parametrize(("dtype", "to"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int], dtype: torch.dtype, to: torch.dtype) -> None:
    x, y, weight = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=to), random(shape[1], seed=2, dtype=to)
    normed, inverse = rms_norm(x, weight, EPS, to)
    defined, defined_inverse = defined_norm(x, weight, EPS, to)
    exact = torchs(x.double(), (shape[1],), weight.double(), EPS)
    plain = plain_norm(x, weight) if dtype == to else defined
    assert_no_worse(normed, defined, plain, exact=exact)
    torch.testing.assert_close(inverse, defined_inverse, rtol=1e-6, atol=0)
    again, known = rms_norm(x, weight, EPS, to, inverse)
    assert torch.equal(again, normed)
    assert torch.equal(known, inverse)
    total, of_total, inverse = add_rms_norm(x, y, weight, EPS, to)
    assert torch.equal(total, defined_add(x, y, weight, EPS, to)[0])
    for ours, same in zip((of_total, inverse), rms_norm(total, weight, EPS, to), strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize(("dtype", "to"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, int], dtype: torch.dtype, to: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], seed=2, dtype=to)
    dn, residual_grad = random(*shape, seed=3, dtype=to), random(*shape, seed=4, dtype=dtype)
    inverse = defined_norm(x, weight, EPS, to)[1]
    for added in (None, residual_grad):
        ours, normed = rms_norm_backward(dn, x, weight, inverse, added)
        assert torch.equal(normed, rms_norm(x, weight, EPS, to, inverse)[0])
        defined, normed = defined_back(dn.clone(), x, weight, inverse, added)
        assert torch.equal(normed, defined_norm(x, weight, EPS, to, inverse)[0])
        through_residual = 0 if added is None else added
        [wide], [leaf] = widened(x), leaves(x)
        torchs(wide, (shape[1],), weight.double(), EPS).backward(dn.double())
        assert wide.grad is not None
        others = [defined]
        if dtype == to:
            plain_norm(leaf, weight).backward(dn)
            assert leaf.grad is not None
            others.append(leaf.grad + through_residual)
        assert_no_worse(ours, *others, exact=wide.grad + through_residual)


@pytest.mark.parametrize(("dtype", "to"), PAIRS)
@pytest.mark.parametrize(("n", "d", "room"), [(3, 64, 16), (2, 511, 1), (1, 100, 200)])
def test_room_behind_a_norm_changes_nothing_else(
    n: int, d: int, room: int, dtype: torch.dtype, to: torch.dtype
) -> None:
    x, y, weight = random(n, d, dtype=dtype), random(n, d, seed=1, dtype=to), random(d, seed=2, dtype=to)
    for once, added in ((rms_norm, add_rms_norm), (defined_norm, defined_add)):
        tight, inverse = once(x, weight, EPS, to)
        for roomy, same in (once(x, weight, EPS, to, room=room), once(x, weight, EPS, to, inverse, room)):
            assert roomy.shape == (n, d + room)
            assert torch.equal(roomy[:, :d], tight)
            assert torch.equal(same, inverse)
        total, normed, inverse = added(x, y, weight, EPS, to)
        expected = total, normed, inverse
        total, normed, inverse = added(x, y, weight, EPS, to, room)
        assert all(map(torch.equal, (total, normed[:, :d], inverse), expected))


@pytest.mark.parametrize(("dtype", "to"), PAIRS)
@pytest.mark.parametrize(("n", "d", "room"), [(3, 64, 16), (2, 511, 1), (1, 100, 200)])
def test_room_behind_gradients_changes_nothing_else(
    n: int, d: int, room: int, dtype: torch.dtype, to: torch.dtype
) -> None:
    """Behind the one that is made, and behind the residual's."""
    x, dn, wide = random(n, d, dtype=dtype), random(n, d, seed=1, dtype=to), random(n, d + 7, seed=2, dtype=dtype)
    weight, given = random(d, seed=3, dtype=to), wide.clone()
    _, inverse = rms_norm(x, weight, EPS, to)
    for back in (rms_norm_backward, defined_back):
        tight = back(dn.clone(), x, weight, inverse, wide[:, :d].clone())
        dx, normed = back(dn.clone(), x, weight, inverse, wide[:, :d], room)
        assert dx.shape == (n, d + room)
        assert all(map(torch.equal, (dx[:, :d], normed), tight))
        assert torch.equal(wide, given)


def test_what_was_given_is_not_touched() -> None:
    given = [random(3, 64, seed=seed) for seed in range(3)]
    dn, x, residual_grad = (tensor.clone() for tensor in given)
    weight, (_, inverse) = random(64), rms_norm(x, random(64), EPS, torch.float32)
    add_rms_norm(x, dn, weight, EPS, torch.float16)
    rms_norm_backward(dn, x, weight, inverse, residual_grad)
    assert all(torch.equal(a, b) for a, b in zip((dn, x, residual_grad), given, strict=True))


def test_rows_of_zeros_stay_zeros() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), random(64)
    normed, inverse = rms_norm(x, weight, 1e-6, torch.float16)
    assert not normed.any()
    torch.testing.assert_close(inverse, torch.full_like(inverse, 1e3))
    dn = random(2, 64, seed=1)
    assert_no_worse(
        rms_norm_backward(dn, x, weight, inverse)[0],
        1e3 * dn * weight,
        exact=1e-6**-0.5 * dn.double() * weight.double(),
    )


@pytest.mark.parametrize("scale", [1e-18, 1e17])
def test_the_ends_of_the_numbers(scale: float) -> None:
    """Of float32, where r^3 is no number or zero."""
    x, weight, dn = scale * random(2, 512), random(512, seed=1), random(2, 512, seed=2)
    normed, inverse = rms_norm(x, weight, 1e-30, torch.float32)
    [wide] = widened(x)
    exact = torchs(wide, (512,), weight.double(), 1e-30)
    exact.backward(dn.double())
    assert wide.grad is not None
    assert_no_worse(normed, defined_norm(x, weight, 1e-30, torch.float32)[0], exact=exact.detach())
    error = (rms_norm_backward(dn, x, weight, inverse)[0].double() - wide.grad).abs().max()
    assert float(error) <= 20 * 2**-24 * float(wide.grad.abs().max())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_large_values_in_16_bits(dtype: torch.dtype) -> None:
    """Their squares are no 16-bit numbers, their sum no float16."""
    x, weight = torch.full((1, 256), 6e4, device=DEVICE, dtype=dtype), torch.ones(256, device=DEVICE, dtype=dtype)
    normed, _ = rms_norm(x, weight, EPS, dtype)
    assert torch.equal(normed, torch.ones_like(x))


def test_any_layout_in_memory() -> None:
    x, weight = random(64, 6).T, random(128)[::2]
    assert torch.equal(
        rms_norm(x, weight, EPS, torch.float32)[0],
        rms_norm(x.contiguous(), weight.contiguous(), EPS, torch.float32)[0],
    )
    assert torch.equal(
        rms_norm(torch._neg_view(x), weight, EPS, torch.float32)[0], rms_norm(-x, weight, EPS, torch.float32)[0]
    )


def test_what_does_not_fit() -> None:
    x, weight = random(2, 64), random(64)
    with pytest.raises(ValueError, match=r"not the shape \(64,\)"):
        rms_norm(weight, weight, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"not the shape \(0, 64\)"):
        rms_norm(x[:0], weight, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"weight is \(63,\)"):
        rms_norm(x, weight[1:], EPS, torch.float32)
    with pytest.raises(ValueError, match=r"x is .* torch\.float64"):
        rms_norm(x.double(), weight, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"the norm's dtype is torch\.float64"):
        rms_norm(x, weight, EPS, torch.float64)
    with pytest.raises(ValueError, match=r"y is .* on meta; it must be \(2, 64\)"):
        add_rms_norm(x, x.to("meta"), weight, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"inverse is \(2,\)"):
        rms_norm_backward(x, x, weight, weight[:2])
    with pytest.raises(ValueError, match="not on meta"):
        rms_norm(x.to("meta"), weight.to("meta"), EPS, torch.float32)
