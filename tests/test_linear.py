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

from minilora import backend, scratch
from minilora import linear as linear_module
from minilora.linear import NF4Linear, multiply, multiply_back, slices
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
def test_forward_and_backward_equal_a_dense_layer(double_quant: bool, shape: tuple[int, ...]) -> None:
    """The same products in the same order: equal bits, whatever the dtype of the weight was."""
    nf4_linear = layer(double_quant, torch.bfloat16)
    dense = nf4_linear.weight.dequantize(torch.float32)
    x, upstream = random(*shape, seed=1), random(*shape[:-1], OUT, seed=2)
    y, x_grad = run(nf4_linear, x, upstream)
    expected_y, expected_grad = run(lambda x: linear(x, dense), x, upstream)
    assert y.dtype == x_grad.dtype == torch.float32
    assert torch.equal(y, expected_y)
    assert torch.equal(x_grad, expected_grad)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_errs_no_more_than_a_dense_layer(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64; both where the machine multiplies 16-bit numbers and where the products are widened."""
    monkeypatch.setattr(backend, "_cpu_product_dtype", lambda dtype: dtype if native else torch.float32)
    nf4_linear = layer()
    exact, dense = nf4_linear.weight.dequantize(torch.float32).double(), nf4_linear.weight.dequantize(dtype)
    x, upstream = random(7, IN, seed=1).to(dtype), random(7, OUT, seed=2).to(dtype)
    results = run(nf4_linear, x, upstream)
    expected = run(lambda x: linear(x, exact), x.double(), upstream.double())
    plain = run(lambda x: linear(x, dense), x, upstream)
    for ours, theirs, truth in zip(results, plain, expected, strict=True):
        assert ours.dtype == dtype
        assert 0 < (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("n_in", [64, 80, 51])
def test_slices_change_nothing_but_the_order_of_sums(
    n_in: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight cut into slices of rows, an uneven last one among them, gives the product of the whole."""
    weight = quantize_nf4(random(600, n_in), block_size=block_size)
    x, dy = random(9, n_in, seed=1), random(9, 600, seed=2)
    whole = multiply(x, weight), multiply_back(dy, weight)
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 200 * n_in * 4)
    starts = [start for start, _, _ in slices(weight, x)]
    assert len(starts) >= 3
    decoded = torch.cat([rows.clone() for _, _, rows in slices(weight, x)])
    assert torch.equal(decoded, weight.dequantize(torch.float32))
    for sliced, expected in zip((multiply(x, weight), multiply_back(dy, weight)), whole, strict=True):
        assert sliced.allclose(expected, rtol=1e-5, atol=1e-4)
    onto = random(9, n_in, seed=3)
    assert multiply_back(dy, weight, onto.clone(), adds=True).allclose(onto + whole[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_grows_by_columns_and_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is decoded, or where it has been decoded with them; what is multiplied may have rows that lie apart."""
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 20 * 64 * dtype.itemsize)
    weight, b, a = quantize_nf4(random(60, 64)), random(60, 8, seed=1).to(dtype), random(24, 64, seed=2).to(dtype)
    x, dy = random(9, 80, seed=3).to(dtype), random(9, 100, seed=4).to(dtype)
    plain = weight.dequantize(dtype)
    y, dx = x[:, :72] @ torch.cat([plain, b], dim=1).T, dy[:, :84] @ torch.cat([plain, a])
    for either in (weight, linear_module.decoded(weight, dtype, b, a)):
        assert torch.equal(multiply(x[:, :72], either, b), y)
        assert torch.equal(multiply_back(dy[:, :84], either, below=a), dx)
        roomy = torch.zeros(9, 70, dtype=dtype)
        assert multiply_back(dy[:, :84], either, roomy[:, :64], below=a).data_ptr() == roomy.data_ptr()
        assert torch.equal(roomy[:, :64], dx)
        assert not roomy[:, 64:].any()
    assert torch.equal(linear_module.decoded(weight, dtype, b, a), plain)


def test_a_dense_weight_of_another_dtype_is_widened_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(100, 16).bfloat16()
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 30 * 16 * 4)
    x = random(5, 16, seed=1)
    assert len(list(slices(weight, x))) == 4
    assert multiply(x, weight).allclose(x @ weight.float().T, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 30 * 16 * 2)
    unwidened = [(start, rows.data_ptr()) for start, _, rows in slices(weight, x.bfloat16())]
    assert unwidened == [(start, weight[start].data_ptr()) for start in (0, 28, 56, 84)]


@pytest.mark.parametrize(("n", "n_parts"), [(128, 2), (97, 2), (250, 1), (50, 1)])
def test_a_16_bit_product_as_high_as_wide_goes_in_two_parts(n: int, n_parts: int) -> None:
    weight, x, dy = random(96, 100).bfloat16(), random(n, 100, seed=1).bfloat16(), random(n, 96, seed=2).bfloat16()
    parts = list(linear_module._parts(x, torch.empty(n, 96)))
    assert len(parts) == n_parts
    assert sum(len(of_x) for of_x, _ in parts) == sum(len(of_y) for _, of_y in parts) == n
    exact = x.double() @ weight.double().T, dy.double() @ weight.double()
    for ours, expected in zip((multiply(x, weight), multiply_back(dy, weight)), exact, strict=True):
        assert ours.double().allclose(expected, rtol=2**-8, atol=1e-4)  # sums in float32, rounded once


@pytest.mark.parametrize("n_in", [64, 80, 51])
def test_what_is_decoded_already_gives_the_same_bits(n_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, dy = quantize_nf4(random(600, n_in)), random(9, n_in, seed=1), random(9, 600, seed=2)
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 200 * n_in * 4)
    dense = linear_module.decoded(weight, torch.float32)
    assert len(list(slices(dense, x))) >= 3
    assert torch.equal(multiply(x, dense), multiply(x, weight))
    assert torch.equal(multiply_back(dy, dense), multiply_back(dy, weight))


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
        scratch._held.__dict__.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
        self.seen += [ref(t.untyped_storage()) for t in tensors if t.numel() >= OUT * IN]
        return out

    @property
    def alive(self) -> int:
        """How many are left but for the scratch, which the next weight overwrites."""
        reused = {buffer.untyped_storage().data_ptr() for buffer in scratch._held.__dict__.values()}
        return sum(storage is not None and storage.data_ptr() not in reused for storage in (r() for r in self.seen))


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
