"""NF4Linear against a dense layer of the dequantized weight; what it keeps for backward; how it moves and is saved."""

import io
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.linear import NF4Linear
from minilora.nf4 import quantize_nf4

OUT, IN = 48, 80
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(double_quant: bool = True, dtype: torch.dtype = torch.float32) -> NF4Linear:
    return NF4Linear(quantize_nf4(random(OUT, IN).to(dtype), double_quant=double_quant))


def run(function: Any, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(upstream)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN)])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_equal_a_dense_layer(
    dtype: torch.dtype, double_quant: bool, shape: tuple[int, ...]
) -> None:
    """The same products in the same order: equal bits, whatever the dtype of the weight was."""
    nf4_linear = layer(double_quant, torch.bfloat16)
    dense = nf4_linear.weight.dequantize(dtype)
    x, upstream = random(*shape, seed=1).to(dtype), random(*shape[:-1], OUT, seed=2).to(dtype)
    y, x_grad = run(nf4_linear, x, upstream)
    expected_y, expected_grad = run(lambda x: linear(x, dense), x, upstream)
    assert y.dtype == x_grad.dtype == dtype
    assert torch.equal(y, expected_y)
    assert torch.equal(x_grad, expected_grad)


def test_only_x_gets_a_gradient() -> None:
    nf4_linear = layer()
    assert list(nf4_linear.parameters()) == []
    assert not nf4_linear(random(3, IN)).requires_grad  # nothing before it learns
    assert not any(b.requires_grad for b in nf4_linear.buffers())
    assert not nf4_linear.weight.dequantize().requires_grad


class Recorder(TorchDispatchMode):
    """Weak references to all floating-point tensors of a whole weight's size that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
        self.seen += [ref(t.untyped_storage()) for t in tensors if t.numel() >= OUT * IN]
        return out

    @property
    def alive(self) -> int:
        return sum(r() is not None for r in self.seen)


def test_no_weight_of_full_size_is_kept_for_backward() -> None:
    x, saved = random(2, IN).requires_grad_(), []
    nf4_linear = layer()

    def note(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(note, lambda t: t), Recorder() as recorder:
        y = nf4_linear(x)
    assert recorder.seen  # it was decoded once,
    assert recorder.alive == 0  # and is gone
    assert all(t.numel() < OUT * IN or t.dtype == torch.uint8 for t in saved)
    with Recorder() as recorder:
        y.sum().backward()
    assert recorder.seen  # decoded again
    assert recorder.alive == 0


def test_the_recorder_sees_what_a_dense_layer_keeps() -> None:
    x, nf4_linear = random(2, IN).requires_grad_(), layer()
    with Recorder() as recorder:
        y = linear(x, nf4_linear.weight.dequantize())
    assert y.requires_grad
    assert recorder.alive > 0


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_module_moves_and_counts_with_its_parts(double_quant: bool) -> None:
    nf4_linear = nn.Sequential(layer(double_quant))
    n_bytes = nf4_linear[0].weight.nbytes
    assert sum(b.nbytes for b in nf4_linear.buffers()) == n_bytes
    moved = nf4_linear.to("meta")
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    assert sum(b.nbytes for b in moved.buffers()) == n_bytes


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_a_model_leaves_the_stored_weight_as_it_is(cast: str) -> None:
    """absmax rounded to bfloat16 would be another weight."""
    for double_quant in (False, True):
        nf4_linear = layer(double_quant)
        before = nf4_linear.weight.dequantize()
        getattr(nn.Sequential(nf4_linear), cast)()
        assert torch.equal(nf4_linear.weight.dequantize(torch.float32), before)


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_round_trip(double_quant: bool) -> None:
    source = layer(double_quant)
    names = {"packed", "absmax"} | ({"nested_absmax", "nested_offset"} if double_quant else set())
    assert set(source.state_dict()) == names
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = NF4Linear(quantize_nf4(torch.zeros(OUT, IN), double_quant=double_quant))
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target.weight.dequantize(), source.weight.dequantize())


def test_the_weight_comes_back_whole() -> None:
    quantized = quantize_nf4(random(OUT, IN).to(torch.bfloat16), block_size=128)
    weight = NF4Linear(quantized).weight
    assert (weight.shape, weight.dtype, weight.block_size) == ((OUT, IN), torch.bfloat16, 128)
    assert torch.equal(weight.dequantize(), quantized.dequantize())


def test_its_face() -> None:
    assert repr(layer()) == f"NF4Linear(in_features={IN}, out_features={OUT}, double_quant=True)"
    with pytest.raises(ValueError, match="two dimensions"):
        NF4Linear(quantize_nf4(random(OUT)))
