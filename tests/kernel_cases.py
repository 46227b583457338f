"""What the tests of the kernels share: where they run, in which dtypes, on what, and how near a result must be."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter truncates where a cast to bfloat16 must round, and multiplies it wrongly; there float16 stands for it.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_no_worse(ours: Tensor, *plain: Tensor, exact: Tensor) -> None:
    """ours is off from `exact`, float64, by no more than twice what each of `plain` is, in the same dtype; or than ten
    roundings to float32 are, which is all that the kernels compute on the way, when the sum over a row is one."""
    assert ours.dtype == plain[0].dtype
    assert ours.shape == exact.shape
    least = 10 * 2**-24 * float(exact.abs().max())
    error = float((ours.double() - exact).abs().max())
    for other in plain:
        assert error <= max(2 * float((other.double() - exact).abs().max()), least)


def assert_product(y: Tensor, x: Tensor, dense: Tensor) -> None:
    """y (M, N) is x (M, K) times the transpose of dense (N, K), off by no more than float32 sums of K terms and one
    rounding to x's dtype allow."""
    assert y.dtype == x.dtype
    x, dense = x.double(), dense.double()
    exact, terms = x @ dense.T, x.abs() @ dense.abs().T
    rounding = torch.finfo(y.dtype).eps / 2 * exact.abs() if y.dtype != torch.float32 else 0
    assert bool(((y.double() - exact).abs() <= dense.shape[1] * 2**-24 * terms + rounding).all())


def widened(*tensors: Tensor) -> list[Tensor]:
    """Leaves in float64."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]
