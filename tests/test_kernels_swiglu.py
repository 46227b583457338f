"""SwiGLU's kernels against the definition, and against autograd: in Triton's interpreter, or on a GPU."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_no_worse, leaves, random, widened
from torch.nn.functional import silu

from minilora import swiglu as definitions
from minilora.kernels.swiglu import BLOCK, swiglu, swiglu_backward

defined, defined_backward = unwrap(definitions.swiglu), unwrap(definitions.swiglu_backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 14), (1, BLOCK), (2, BLOCK), (3, 682), (5, 1000)])
def test_any_shape_and_backward(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    gate, up, dh = (scale * random(*shape, seed=seed, dtype=dtype) for seed in range(3))
    wide, own = widened(gate, up), leaves(gate, up)
    exact, plain = (silu(g) * u for g, u in (wide, own))
    exact.backward(dh.double())
    plain.backward(dh)
    assert_no_worse(swiglu(gate, up), defined(gate, up), plain.detach(), exact=exact.detach())
    theirs = defined_backward(dh.clone(), gate, up)
    ours = swiglu_backward(dh.clone(), gate.clone(), up.clone())
    assert torch.equal(ours[0], swiglu(gate, up))
    for mine, other, leaf, precise in zip(ours[1:], theirs[1:], own, wide, strict=True):
        assert precise.grad is not None
        assert leaf.grad is not None
        assert_no_worse(mine, other, leaf.grad, exact=precise.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "f", "room"), [(3, 14, 16), (2, BLOCK + 5, 1), (1, 100, 200)])
def test_room_behind_h_changes_nothing_else(n: int, f: int, room: int, dtype: torch.dtype) -> None:
    gate, up = random(n, f, dtype=dtype), random(n, f, seed=1, dtype=dtype)
    for function in (swiglu, defined):
        roomy = function(gate, up, room)
        assert roomy.shape == (n, f + room)
        tight = function(gate, up)
        assert torch.equal(roomy[:, :f], tight) or function is defined  # torch does what is apart by other instructions
        torch.testing.assert_close(roomy[:, :f], tight, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "f", "room"), [(3, 14, 16), (2, BLOCK + 5, 1), (1, 100, 200)])
def test_room_behind_dh_stays_behind_d_gate(n: int, f: int, room: int, dtype: torch.dtype) -> None:
    wide, gate, up = (random(n, more, seed=seed, dtype=dtype) for seed, more in enumerate((f + room, f, f)))
    for function in (swiglu_backward, defined_backward):
        dh = wide.clone()
        h, d_gate, d_up = function(dh, gate.clone(), up.clone())
        assert (d_gate.shape, d_gate.data_ptr()) == (wide.shape, dh.data_ptr())
        assert torch.equal(d_gate[:, f:], wide[:, f:])
        expected = function(wide[:, :f].clone(), gate.clone(), up.clone())
        for ours, same in zip((h, d_gate[:, :f], d_up), expected, strict=True):
            assert torch.equal(ours, same) or function is defined_backward  # see above
            torch.testing.assert_close(ours, same, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_where_the_results_lie() -> None:
    """d_gate in the memory of dh; the kernel's others in that of gate and up, the definition's in new memory."""
    for function, in_place in ((swiglu_backward, True), (defined_backward, False)):
        given = [random(3, 100, seed=seed) for seed in range(3)]
        dh, gate, up = (tensor.clone() for tensor in given)
        versions = [tensor._version for tensor in (dh, gate, up)]
        h, d_gate, d_up = function(dh, gate, up)
        assert d_gate.data_ptr() == dh.data_ptr()
        written = [t._version > version for t, version in zip((dh, gate, up), versions, strict=True)]
        assert written == [True, in_place, in_place]
        if in_place:
            assert (h.data_ptr(), d_up.data_ptr()) == (gate.data_ptr(), up.data_ptr())
        else:
            assert len({t.data_ptr() for t in (h, d_gate, d_up, gate, up)}) == 5
            assert torch.equal(gate, given[1])
            assert torch.equal(up, given[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_numbers(dtype: torch.dtype) -> None:
    """Where e^-g is none, and zeros: silu is 0 or g there, its slope 0, 1/2 or 1."""
    gate = torch.tensor([[-6e4, -200.0, 0.0, 200.0, 6e4]], device=DEVICE, dtype=dtype)
    ones = torch.ones_like(gate)
    with np.errstate(over="ignore"):  # the interpreter is numpy, which warns
        h, d_gate, d_up = swiglu_backward(ones.clone(), gate.clone(), ones.clone())
        assert torch.equal(swiglu(gate, ones), h)
    assert torch.equal(h, gate.clamp_min(0))
    assert torch.equal(d_up, h)
    assert d_gate.tolist() == [[0, 0, 0.5, 1, 1]]


def test_any_layout_in_memory() -> None:
    gate, up = random(64, 6).T, random(6, 128, seed=1)[:, ::2]
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    assert torch.equal(swiglu(torch._neg_view(gate), up), swiglu(-gate, up))
    strided = random(64, 6, seed=2).T
    expected = swiglu_backward(strided.clone(memory_format=torch.contiguous_format), gate.clone(), up.clone())
    for ours, same in zip(swiglu_backward(strided, gate.clone(), up.clone()), expected, strict=True):
        assert torch.equal(ours, same)


def test_what_does_not_fit() -> None:
    gate = random(2, 64)
    for wrong in (gate[:, 1:], gate.half(), gate.to("meta")):
        with pytest.raises(ValueError, match="up is "):
            swiglu(gate, wrong)
        with pytest.raises(ValueError, match="up is "):
            swiglu_backward(gate, gate, wrong)
    with pytest.raises(ValueError, match=r"dh is .* torch\.float64"):
        swiglu_backward(gate.double(), gate, gate)
    with pytest.raises(ValueError, match=r"gate is .* torch\.sparse_coo"):
        swiglu(gate.to_sparse(), gate)
    with pytest.raises(ValueError, match=r"not the shape \(2, 0\)"):
        swiglu(gate[:, :0], gate[:, :0])
    with pytest.raises(ValueError, match="not on meta"):
        swiglu(gate.to("meta"), gate.to("meta"))
