"""The flat optimizer: torch's update on torch's numbers, views that stay, and one length of the whole gradient."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from minilora import adamw as adamw_module
from minilora import backend
from minilora.adamw import ALIGNED, FlatAdamW

SHAPES = ((7, 3), (5,), (1,), (40, 33), (16,))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["definition", "kernel"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What updates; the kernel in Triton's interpreter where there is no GPU."""
    if request.param == "kernel":
        monkeypatch.setattr(adamw_module, "backend_for", lambda _: backend.Backend("triton", "a test"))
    else:
        monkeypatch.setattr(adamw_module, "backend_for", lambda _: backend.Backend("torch", "a test"))


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]


def of(weights: Sequence[nn.Parameter]) -> dict[tuple[float, float], Sequence[nn.Parameter]]:
    """Matrices decay, vectors learn four times as fast."""
    return {(0.1, 1.0): [p for p in weights if p.dim() > 1], (0.0, 4.0): [p for p in weights if p.dim() == 1]}


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("piece", [64, 1 << 16])
def test_it_is_torch_s_adamw(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_kernels_adamw.py counts the roundings of one step on each side: six of m's terms, eight of v, three of
    p and twenty of an update, which is about lr in size, four times that for vectors. `steps` steps add up."""
    monkeypatch.setattr(adamw_module, "PIECE", piece)
    lr, steps, unit = 1e-2, 6, 2.0**-23
    ours, theirs = parameters(), parameters()
    optimizer = FlatAdamW(of(ours), 0.8, 0.95, 1e-6)
    groups = [{"params": [*ps], "weight_decay": decay, "lr": lr * ratio} for (decay, ratio), ps in of(theirs).items()]
    adam = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for mine, peer in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=generator).to(DEVICE)
            assert mine.grad is not None
            mine.grad.copy_(4 * gradient)
            peer.grad = 4 * gradient * 0.3
        optimizer.step(lr, 0.3)
        adam.step()
    for mine, peer in zip(ours, theirs, strict=True):
        for key, moment in optimizer.state[mine].items():
            torch.testing.assert_close(moment, adam.state[peer][key], rtol=8 * steps * unit, atol=6 * steps * unit)
        torch.testing.assert_close(mine, peer, rtol=3 * steps * unit, atol=20 * steps * unit * 4 * lr)
    assert optimizer.steps == steps


@pytest.mark.usefixtures("by")
def test_every_number_learns_wherever_a_piece_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_module, "PIECE", 50)
    weights = parameters()
    before = [p.detach().clone() for p in weights]
    optimizer = FlatAdamW(of(weights))
    assert all(torch.equal(p, old) for p, old in zip(weights, before, strict=True)), "it takes the numbers over"
    for p in weights:
        assert p.grad is not None
        p.grad.fill_(1.0)
    optimizer.step(1e-3)
    assert all(bool((p < old).all()) for p, old in zip(weights, before, strict=True))


def test_autograd_adds_into_the_flat_gradient() -> None:
    weights = parameters()
    optimizer = FlatAdamW(of(weights))
    places = [p.grad.data_ptr() for p in weights if p.grad is not None]
    for times in (1, 2):
        sum((p * p).sum() for p in weights).backward()  # type: ignore[union-attr]
        for p in weights:
            torch.testing.assert_close(p.grad, 2 * times * p.detach())
    assert [p.grad.data_ptr() for p in weights if p.grad is not None] == places
    optimizer.zero_grad()
    assert [p.grad.data_ptr() for p in weights if p.grad is not None] == places
    assert all(p.grad is not None and not p.grad.any() for p in weights)


def test_the_length_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_module, "PIECE", 64)
    weights = parameters()
    optimizer = FlatAdamW(of(weights))
    assert optimizer.grad_norm() == 0
    gradients = [torch.randn_like(p) for p in weights]
    for p, gradient in zip(weights, gradients, strict=True):
        assert p.grad is not None
        p.grad.copy_(gradient)
    expected = torch.cat([g.flatten() for g in gradients]).double().norm()
    torch.testing.assert_close(optimizer.grad_norm().double(), expected, rtol=1e-6, atol=0)
    gradients = [p.grad for p in weights if p.grad is not None]
    gradients[2].fill_(float("nan"))
    assert optimizer.grad_norm().isnan()


def test_the_length_of_a_long_gradient_is_exact_enough() -> None:
    """torch's norm of one long vector adds up in float32, number by number: of 4 million it is off by 1e-4."""
    p = nn.Parameter(torch.zeros(1 << 22))
    optimizer = FlatAdamW({(0.0, 1.0): [p]})
    assert p.grad is not None
    p.grad.normal_(generator=torch.Generator().manual_seed(0))
    exact = p.grad.double().norm()
    torch.testing.assert_close(optimizer.grad_norm().double(), exact, rtol=2e-6, atol=0)


def test_each_begins_where_sixteen_bytes_are_read_at_once() -> None:
    weights = parameters()
    optimizer = FlatAdamW(of(weights))
    views = [t for p in weights for t in (p, p.grad, *optimizer.state[p].values()) if isinstance(t, Tensor)]
    assert all(t.storage_offset() % ALIGNED == 0 for t in views)
    assert len({t.untyped_storage().data_ptr() for t in views}) == 4 * 2
    assert all(t.is_contiguous() for t in views)


def test_a_transposed_parameter_keeps_its_numbers() -> None:
    p = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    FlatAdamW({(0.0, 1.0): [p]})
    assert p.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("dtypes", [(), (torch.float16,), (torch.float32, torch.float64)])
def test_what_cannot_learn_together(dtypes: tuple[torch.dtype, ...]) -> None:
    weights = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    with pytest.raises(ValueError, match="must be float32 on one device, not"):
        FlatAdamW({(0.0, 1.0): weights})
