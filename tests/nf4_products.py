"""What the tests of both product kernels share: where they run, in which dtypes, and how near a product must be."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly; there float16 stands for it.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_product(y: Tensor, x: Tensor, dense: Tensor) -> None:
    """y (M, N) is x (M, K) times the transpose of dense (N, K), off by no more than float32 sums of K terms and one
    rounding to x's dtype allow."""
    assert y.dtype == x.dtype
    x, dense = x.double(), dense.double()
    exact, terms = x @ dense.T, x.abs() @ dense.abs().T
    rounding = torch.finfo(y.dtype).eps / 2 * exact.abs() if y.dtype != torch.float32 else 0
    assert bool(((y.double() - exact).abs() <= dense.shape[1] * 2**-24 * terms + rounding).all())
