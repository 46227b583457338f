"""The rotation's kernel against the definition, and against autograd: in Triton's interpreter, or on a GPU."""

from inspect import unwrap

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_no_worse, leaves, random, widened
from torch import Tensor

from minilora import rope
from minilora.kernels.rope import rotate, rotate_back
from minilora.rope import apply_rope, rope_cos_sin

defined_rotate, defined_back = unwrap(rope.rotate), unwrap(rope.rotate_back)


def cos_sin(n: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    cos, sin = rope_cos_sin(torch.arange(3, n + 3, device=DEVICE)[None], head_dim, 100.0, dtype)
    return cos[0], sin[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (3, 4, 16), (2, 3, 6), (5, 8, 128), (2, 33, 128), (1, 2, 80), (2, 1, 4098)]
)
def test_any_shape_and_back(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, dy, (cos, sin) = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype), cos_sin(shape[0], shape[2])
    cos, sin = cos.to(dtype), sin.to(dtype)
    [wide], [leaf] = widened(x), leaves(x)
    exact = apply_rope(wide[None], cos[None].double(), sin[None].double())[0]
    plain = apply_rope(leaf[None], cos[None], sin[None])[0]
    exact.backward(dy.double())
    plain.backward(dy)
    assert wide.grad is not None
    assert leaf.grad is not None
    ours = rotate(x, cos, sin)
    assert ours.is_contiguous()
    assert_no_worse(ours, defined_rotate(x, cos, sin), plain.detach(), exact=exact.detach())
    back = rotate_back(dy, cos, sin)
    assert_no_worse(back, defined_back(dy, cos, sin), leaf.grad.flatten(1), exact=wide.grad.flatten(1))
    for function in (rotate_back, defined_back):
        roomy = function(dy, cos, sin, room=16)
        assert roomy.shape == (shape[0], shape[1] * shape[2] + 16)
        assert torch.equal(roomy[:, :-16], function(dy, cos, sin))


def test_each_number_at_its_place() -> None:
    """A quarter turn changes the halves of each head, bit for bit."""
    x = random(3, 5, 48)
    none, whole = torch.zeros(3, 24, device=DEVICE), torch.ones(3, 24, device=DEVICE)
    a, b = x.chunk(2, dim=-1)
    assert torch.equal(rotate(x, none, whole), torch.cat([-b, a], dim=-1))
    assert torch.equal(rotate_back(x, none, whole), torch.cat([b, -a], dim=-1).flatten(1))
    assert torch.equal(rotate(x, whole, none), x)


def test_strides() -> None:
    """A slice of a wider product; heads before tokens, as attention has them; tokens last; a negated view."""
    cos, sin = cos_sin(4, 16)
    wide, other = random(4, 10, 16), random(3, 4, 16).transpose(0, 1)
    for x in (wide[:, 2:5], other, random(4, 16, 3).transpose(1, 2), torch._neg_view(other)):
        before = x.clone()
        assert torch.equal(rotate(x, cos, sin), rotate(before.contiguous(), cos, sin))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_and_zeros(dtype: torch.dtype) -> None:
    """Near the end of the numbers, where the turned pair still is one."""
    x = torch.finfo(dtype).max * torch.eye(2, 4, device=DEVICE)[:, None].to(dtype)
    cos, sin = (t.to(dtype) for t in cos_sin(2, 4))
    turned = rotate(x, cos, sin)
    assert turned.isfinite().all()
    assert_no_worse(turned, defined_rotate(x, cos, sin), exact=defined_rotate(x.double(), cos.double(), sin.double()))


def test_what_does_not_fit() -> None:
    x, (cos, sin) = random(2, 3, 16), cos_sin(2, 16)
    for wrong in (x[0], x[:, :, 1:], x[:0], x.double(), x.to_sparse()):
        with pytest.raises(ValueError, match=r"it must be \(N, H, Dh\) with an even Dh"):
            rotate(wrong, cos, sin)
    with pytest.raises(ValueError, match=r"cos is \(1, 8\)"):
        rotate(x, cos[:1], sin)
    with pytest.raises(ValueError, match=r"sin is .* on meta"):
        rotate(x, cos, sin.to("meta"))
    with pytest.raises(ValueError, match="not on meta"):
        rotate(x.to("meta"), cos.to("meta"), sin.to("meta"))
