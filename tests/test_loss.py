"""The tiled cross entropy against torch's: value, gradients, tiles' borders, ignored rows, and what it allocates."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import backend, dispatch
from minilora import loss as loss_module
from minilora.kernels import softmax_gradient
from minilora.loss import IGNORE, cross_entropy_sum

N, D, V = 37, 16, 101


def problem(
    dtype: torch.dtype = torch.float32, ignored: int = 9, by: str = "definition"
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), head (V, D), labels (N,) of which `ignored` are no targets; for the kernel, where it runs."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[torch.randperm(N, generator=generator)[:ignored]] = IGNORE
    device = torch.device("cpu") if by == "definition" else DEVICE
    return hidden.to(device, dtype), head.to(device, dtype), labels.to(device)


def value_and_gradients(
    function: Any, hidden: Tensor, head: Tensor, labels: Tensor, head_learns: bool = True
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of hidden and, if it learns, of head."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_(head_learns)
    value = function(hidden, head, labels)
    value.backward()
    return value.detach(), *(t.grad for t in (hidden, head) if t.grad is not None)


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ head.T).float(), labels, ignore_index=IGNORE, reduction="sum")


def set_tile(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int = V) -> None:
    monkeypatch.setattr(loss_module, "ROWS", rows)
    monkeypatch.setattr(loss_module, "COLUMNS", columns)
    monkeypatch.setattr(loss_module, "WHOLE_BYTES", 4 * rows * V)


@pytest.mark.parametrize("rows", [1, 5, 27, 28, 29, 1000])
@pytest.mark.parametrize("columns", [1, 10, 100, 101, 1000])
@pytest.mark.parametrize("ignored", [0, 9])
@pytest.mark.parametrize("head_learns", [True, False])
def test_value_and_gradients_equal_torch_wherever_the_tiles_end(
    rows: int, columns: int, ignored: int, head_learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, rows, columns)
    given = problem(ignored=ignored)
    ours = value_and_gradients(cross_entropy_sum, *given, head_learns=head_learns)
    for mine, theirs in zip(ours, value_and_gradients(plain, *given, head_learns=head_learns), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_learns", [True, False])
def test_a_tile_holds_at_least_one_number(head_learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "COLUMNS", 0)
    monkeypatch.setattr(loss_module, "WHOLE_BYTES", 1)
    assert loss_module.tile(N, V, head_learns) == ((1, V) if head_learns else (N, 1))
    torch.testing.assert_close(cross_entropy_sum(*problem()), plain(*problem()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_learns", [True, False])
def test_half_precision_errs_at_most_twice_as_much_as_torch(
    dtype: torch.dtype, native: bool, head_learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where the machine multiplies 16-bit numbers and where the products are widened."""
    monkeypatch.setattr(backend, "_cpu_product_dtype", lambda dtype: dtype if native else torch.float32)
    set_tile(monkeypatch, 5, 30)
    hidden, head, labels = problem(dtype)
    exact = value_and_gradients(plain_float64, hidden.double(), head.double(), labels, head_learns)
    ours = value_and_gradients(cross_entropy_sum, hidden, head, labels, head_learns)
    theirs = value_and_gradients(plain, hidden, head, labels, head_learns)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype][: 2 + head_learns]
    for mine, peer, true in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - true).norm() <= 2 * (peer.double() - true).norm() + 1e-6 * true.norm()


def plain_float64(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE, reduction="sum")


def test_ignored_rows_get_no_gradient_and_may_hold_anything() -> None:
    hidden, head, labels = problem()
    _, clean, _ = value_and_gradients(cross_entropy_sum, hidden, head, labels)
    hidden[labels == IGNORE] = float("nan")
    value, gradient, head_gradient = value_and_gradients(cross_entropy_sum, hidden, head, labels)
    assert (gradient[labels == IGNORE] == 0).all()
    assert torch.equal(gradient, clean)
    assert value.isfinite()
    assert head_gradient.isfinite().all()


def test_no_targets_is_a_loss_of_zero_with_zero_gradients() -> None:
    value, *gradients = value_and_gradients(cross_entropy_sum, *problem(ignored=N))
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_batches_are_flattened_and_the_upstream_gradient_scales() -> None:
    hidden, head, labels = problem()
    flat = value_and_gradients(cross_entropy_sum, hidden[:36], head, labels[:36])

    def scaled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return cross_entropy_sum(h.view(3, 12, D), w, y.view(3, 12)) / 7

    value, *gradients = value_and_gradients(scaled, hidden[:36], head, labels[:36])
    torch.testing.assert_close(value * 7, flat[0])
    for gradient, whole in zip(gradients, flat[1:], strict=True):
        torch.testing.assert_close(gradient * 7, whole)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, labels = problem()
    torch.testing.assert_close(
        cross_entropy_sum(1000 * hidden, head, labels), plain(1000 * hidden, head, labels), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for_gets_a_gradient(needs: tuple[bool, bool]) -> None:
    hidden, head, labels = problem()
    cross_entropy_sum(hidden.requires_grad_(needs[0]), head.requires_grad_(needs[1]), labels).backward()
    assert (hidden.grad is not None, head.grad is not None) == needs


def test_a_label_beyond_the_vocabulary_is_an_error() -> None:
    hidden, head, labels = problem()
    labels[3] = V
    with pytest.raises((RuntimeError, IndexError)):
        cross_entropy_sum(hidden, head, labels)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def largest_tensor(function: Any, head_learns: bool) -> int:
    with LargestTensor() as largest:
        value_and_gradients(function, *problem(ignored=0), head_learns=head_learns)
    return largest.numel


def test_the_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 30, 30)
    assert largest_tensor(plain, head_learns=False) == N * V  # the measure sees them where they are
    assert largest_tensor(cross_entropy_sum, head_learns=False) == max(30 * 30, N * D, V * D)
    set_tile(monkeypatch, 8)
    assert largest_tensor(cross_entropy_sum, head_learns=True) == max(8 * V, V * D)


def test_without_gradients_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation makes no (V, D) gradient of a head that learns."""
    set_tile(monkeypatch, 4)
    hidden, head, labels = problem()
    head.requires_grad_()
    with torch.no_grad(), LargestTensor() as largest:
        cross_entropy_sum(hidden, head, labels)
    assert largest.numel < V * D


# --- The GPU's way --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["definition", "kernel"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What makes the gradient of the logits; the kernel in Triton's interpreter where there is no GPU."""
    if request.param == "kernel":
        monkeypatch.setattr(dispatch, "has_kernels", lambda _: True)
    return str(request.param)


def whole_rows_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return loss_module._whole_row_cross_entropy(hidden, head, labels)


def test_the_kernel_runs_where_it_is_said_to(by: str) -> None:
    with patch.object(softmax_gradient, "softmax_gradient_", wraps=softmax_gradient.softmax_gradient_) as kernel:
        value_and_gradients(whole_rows_sum, *problem(by=by))
    assert kernel.called == (by == "kernel")


@pytest.mark.parametrize("rows", [1, 5, 27, 36, 37, 1000])
@pytest.mark.parametrize("ignored", [0, 9, N])
@pytest.mark.parametrize("head_learns", [True, False])
def test_whole_rows_are_torch_s_cross_entropy_too(
    rows: int, ignored: int, head_learns: bool, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(loss_module, "WHOLE_BYTES", 4 * rows * V)
    given = problem(ignored=ignored, by=by)
    ours = value_and_gradients(whole_rows_sum, *given, head_learns=head_learns)
    for mine, theirs in zip(ours, value_and_gradients(plain, *given, head_learns=head_learns), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_learns", [True, False])
@pytest.mark.parametrize("head_dtype", [None, torch.float32])
def test_whole_rows_err_at_most_twice_as_much_as_torch(
    dtype: torch.dtype,
    head_learns: bool,
    head_dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    """head_dtype float32: a trained copy beside a model in 16 bits."""
    if by == "kernel" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter truncates casts to bfloat16")
    monkeypatch.setattr(loss_module, "WHOLE_BYTES", 2 * 10 * V)
    hidden, head, labels = problem(dtype, by=by)
    exact = value_and_gradients(plain_float64, hidden.double(), head.double(), labels, head_learns)
    ours = value_and_gradients(whole_rows_sum, hidden, head.to(head_dtype or dtype), labels, head_learns)
    theirs = value_and_gradients(plain, hidden, head, labels, head_learns)
    assert [t.dtype for t in ours] == [torch.float32, dtype, head_dtype or dtype][: 2 + head_learns]
    for mine, peer, true in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - true).norm() <= 2 * (peer.double() - true).norm() + 1e-6 * true.norm()


def test_whole_rows_that_are_ignored_may_hold_anything(by: str) -> None:
    hidden, head, labels = problem(by=by)
    clean = value_and_gradients(whole_rows_sum, hidden, head, labels)
    hidden[labels == IGNORE] = float("nan")
    for mine, expected in zip(value_and_gradients(whole_rows_sum, hidden, head, labels), clean, strict=True):
        assert torch.equal(mine, expected)
    assert (clean[1][labels == IGNORE] == 0).all()


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_beyond_the_vocabulary_makes_a_gpu_s_loss_nan(label: int, by: str) -> None:
    hidden, head, labels = problem(by=by)
    labels[3] = label
    assert whole_rows_sum(hidden, head, labels).isnan()


def test_whole_rows_without_gradients_and_no_rows(by: str) -> None:
    hidden, head, labels = problem(by=by)
    torch.testing.assert_close(whole_rows_sum(hidden, head, labels), plain(hidden, head, labels), rtol=1e-5, atol=0)
    assert whole_rows_sum(hidden[:0], head, labels[:0]) == 0


class NothingThatWaits(TorchDispatchMode):
    """Refuses the operators whose result's size or value the host would have to be told by a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = {"nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero"}
        assert func.overloadpacket.__name__ not in waiting, func
        given = tree_leaves(args[1:])  # of an index, the mask
        if "index" in func.overloadpacket.__name__:
            assert not any(isinstance(t, Tensor) and t.dtype == torch.bool for t in given), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_learns", [True, False])
def test_whole_rows_are_free_of_what_a_gpu_is_waited_for(head_learns: bool) -> None:
    with NothingThatWaits():
        value_and_gradients(whole_rows_sum, *problem(), head_learns=head_learns)
    with NothingThatWaits(), pytest.raises(AssertionError, match="index"):
        value_and_gradients(cross_entropy_sum, *problem(), head_learns=head_learns)  # a CPU's way does


@pytest.mark.parametrize(
    ("columns", "itemsize", "rows"), [(32768, 2, 1024), (131072, 2, 256), (32000, 2, 1024), (32768, 4, 512)]
)
def test_a_gpu_s_rows_fill_its_products_and_64_mib_at_most(columns: int, itemsize: int, rows: int) -> None:
    assert loss_module.whole_rows(4096, columns, itemsize) == rows
    assert rows % loss_module.GPU_ROWS == 0
    assert rows * columns * itemsize <= 64 << 20
    assert loss_module.whole_rows(100, columns, itemsize) == 100
    assert loss_module.whole_rows(100, 1 << 30, itemsize) == 1
    assert loss_module.whole_rows(100, 1 << 20, itemsize) == (64 << 20) // (itemsize << 20)
