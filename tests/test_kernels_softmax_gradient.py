"""The softmax kernel against its definition and float64: in Triton's interpreter, or on a GPU."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DTYPES
from torch import Tensor

from minilora import softmax_gradient
from minilora.kernels.softmax_gradient import BLOCK, softmax_gradient_
from minilora.loss import IGNORE


def problem(n_rows: int, n_columns: int, dtype: torch.dtype, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits (n_rows, n_columns), and labels of which every fourth is IGNORE, the first and last column among them."""
    generator = torch.Generator().manual_seed(n_rows * n_columns)
    logits = scale * torch.randn(n_rows, n_columns, generator=generator)
    labels = torch.randint(n_columns, (n_rows,), generator=generator)
    labels[: min(n_rows, 2)] = torch.tensor([n_columns - 1, 0])[:n_rows]
    labels[3::4] = IGNORE
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def both(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(losses, gradients) of the kernel and of the definition."""
    found = []
    for function in (softmax_gradient_, unwrap(softmax_gradient.softmax_gradient_)):
        made = logits.clone()
        found.append((function(made, labels, IGNORE), made))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 2), (9, 101), (4, BLOCK - 1), (4, BLOCK), (4, BLOCK + 1), (5, 3 * BLOCK + 77), (2, 32768)]
)
def test_it_is_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A float32 exponential errs by its argument's rounding, |z - max| 2^-24, of at most 40 here, and the sum of V
    terms in another order by log2(V) 2^-24; then comes the rounding to the logits' dtype, half a unit or, where the two
    lie on both sides of a tie, one."""
    logits, labels = problem(*shape, dtype)
    (losses, gradients), (expected_losses, expected) = both(logits, labels)
    assert losses.dtype == torch.float32
    assert gradients.dtype == dtype
    in_float32 = 64 * 2.0**-24
    torch.testing.assert_close(losses, expected_losses, rtol=in_float32, atol=in_float32)
    unit = torch.finfo(dtype).eps + in_float32
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0.0
    # At the label p - 1 cancels, which leaves p's own error.
    torch.testing.assert_close(gradients, expected, rtol=unit, atol=in_float32 + smallest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_errs_no_more_than_torch_against_float64(dtype: torch.dtype) -> None:
    logits, labels = problem(16, 5000, dtype)
    z = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORE, reduction="none")
    exact.sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    (losses, gradients), (plain_losses, plain) = both(logits, labels)
    assert (losses - exact).norm() <= 2 * (plain_losses - exact).norm() + 2**-24 * exact.norm()
    assert (gradients - z.grad).norm() <= 2 * (plain - z.grad).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_target_may_hold_anything(dtype: torch.dtype) -> None:
    logits, labels = problem(8, 300, dtype)
    logits[3], logits[7] = float("nan"), float("inf")
    for losses, gradients in both(logits, labels):
        assert losses.isfinite().all()
        assert gradients.isfinite().all()
        assert (losses[3::4] == 0).all()
        assert (gradients[3::4] == 0).all()


@pytest.mark.parametrize("label", [-1, -101, 300, 2**40, -(2**63)])
def test_a_label_that_is_no_column_is_told_by_its_loss(label: int) -> None:
    logits, labels = problem(4, 300, torch.float32)
    labels[1] = label
    (losses, gradients), (expected_losses, expected) = both(logits, labels)
    assert losses.isnan().tolist() == expected_losses.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_told_by_its_loss() -> None:
    """-inf is a logit like others, of no weight."""
    logits, labels = problem(4, 300, torch.float32)
    logits[0, 5], logits[1, 6], logits[2, 7:290] = float("nan"), float("inf"), -float("inf")
    labels[2] = 3
    with np.errstate(invalid="ignore"):  # the interpreter is numpy
        (losses, gradients), (expected_losses, expected) = both(logits, labels)
    assert losses.isnan().tolist() == expected_losses.isnan().tolist() == [True, True, False, False]
    torch.testing.assert_close(losses[2:], expected_losses[2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[2:], expected[2:], rtol=1e-5, atol=1e-6)


def test_logits_far_from_zero_and_from_each_other() -> None:
    for scale, offset in ((1e4, 0.0), (1.0, 1e5), (1.0, -1e5), (1e-6, 0.0)):
        logits, labels = problem(6, 1000, torch.float32, scale)
        (losses, gradients), (expected_losses, expected) = both(logits + offset, labels)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_no_rows() -> None:
    logits, labels = problem(0, 64, torch.float32)
    assert softmax_gradient_(logits, labels, IGNORE).shape == (0,)


def test_the_change_is_told_to_autograd() -> None:
    logits, labels = problem(2, 64, torch.float32)
    leaf = torch.ones_like(logits, requires_grad=True)
    product = leaf * logits
    softmax_gradient_(logits, labels, IGNORE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()  # type: ignore[no-untyped-call]


LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(4, 8, dtype=torch.float64), LABELS, r"logits must .* \(4, 8\) torch.float64"),
        (torch.zeros(8, 4).T, LABELS, "logits must .* strides"),
        (torch.zeros(32), LABELS, "logits must"),
        (torch.zeros(4, 8), LABELS.int(), "labels must be 4 contiguous int64"),
        (torch.zeros(4, 8), LABELS[:3], "labels must"),
        (torch.zeros(4, 8), torch.zeros(8, dtype=torch.int64)[::2], "labels must .* strides"),
    ],
)
def test_what_the_kernel_cannot_take(logits: Tensor, labels: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        softmax_gradient_(logits.to(DEVICE), labels.to(DEVICE), IGNORE)
