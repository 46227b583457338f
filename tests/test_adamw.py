"""The flat optimizer: torch's update on torch's numbers, views that stay, and one length of the whole gradient."""

from collections.abc import Sequence

import pytest
import torch
from bitsandbytes import functional as bnb
from kernel_cases import DEVICE
from torch import Tensor, nn

from minilora import adamw as adamw_module
from minilora import dispatch, dynamic_8bit
from minilora.adamw import ALIGNED, STATE, FlatAdamW, Update, adamw_8bit_, state_bytes
from minilora.config import Optimizer
from minilora.dynamic_8bit import dynamic_map, encode_dynamic

SHAPES = ((7, 3), (5,), (1,), (40, 33), (16,))


@pytest.fixture(params=["definition", "kernel"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What updates; the kernel in Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(dispatch, "has_kernels", lambda _: request.param == "kernel")


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]


def of(weights: Sequence[nn.Parameter]) -> dict[tuple[float, float], Sequence[nn.Parameter]]:
    """Matrices decay, vectors learn four times as fast."""
    return {(0.1, 1.0): [p for p in weights if p.dim() > 1], (0.0, 4.0): [p for p in weights if p.dim() == 1]}


def test_casts_are_of_now_and_where_they_were() -> None:
    """What refers to them (ahead.py, CUDA graphs) finds there what the parameters are at this entry."""
    weights, places = parameters(), []
    optimizer = FlatAdamW(of(weights))
    for _ in range(2):
        with torch.no_grad():
            for p in weights:
                p.add_(1)
        with optimizer.casts(torch.float16):
            assert all(torch.equal(p.kept_cast, p.half()) for p in weights)
            places.append([p.kept_cast.data_ptr() for p in weights])
        assert not any(hasattr(p, "kept_cast") for p in weights)
    assert places[0] == places[1]
    with optimizer.casts(torch.float32):
        assert not any(hasattr(p, "kept_cast") for p in weights)


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


# -- moments in 8 bits -------------------------------------------------------------------------------------------------


def train(optimizer: FlatAdamW, weights: Sequence[nn.Parameter], steps: int = 5) -> None:
    """Updates by gradients that are drawn anew, a tenth of whose numbers are zeros."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in weights:
            drawn = torch.randn(p.shape, generator=generator) * (torch.rand(p.shape, generator=generator) > 0.1)
            assert p.grad is not None
            p.grad.copy_(drawn)
        optimizer.step(1e-2, 0.3)


def test_an_update_in_8_bits_is_bitsandbytes() -> None:
    """From the same state, step by step: v is made by the same operations, so its absmax are the same bytes; m's differ
    by a rounding (torch's lerp, which ours is, has another order). p follows; the first step is from zeros."""
    n, lr, unit = 64 * 256, 1e-2, 2.0**-23
    generator = torch.Generator().manual_seed(0)
    p, *state = torch.randn(n, generator=generator), *torch.zeros(2, n, dtype=torch.uint8), *torch.zeros(2, n // 256)
    for step in range(1, 6):
        grad, (q, *theirs) = torch.randn(n, generator=generator), (part.clone() for part in (p, *state))
        adamw_8bit_(p, grad, *state, Update(lr, 0.9, 0.999, 1e-8, 0.1, step, 0.3))
        m, v, m_absmax, v_absmax = theirs
        maps = bnb.create_dynamic_map(True), bnb.create_dynamic_map(False)
        bnb.optimizer_update_8bit_blockwise(
            "adam", grad, q, m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, lr, *maps, m_absmax, v_absmax, 0.1, 0.3
        )
        assert torch.equal(state[3], v_absmax)
        torch.testing.assert_close(state[2], m_absmax, rtol=(step > 1) * 2 * unit, atol=0)
        # an update is of lr's size; of a v near zero it is larger, its last bits with it
        torch.testing.assert_close(p, q, rtol=3 * unit, atol=20 * unit * 30 * lr)
        assert (state[0] != m).float().mean() < 0.005
        assert (state[1] != v).float().mean() < 0.05


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("piece", [256, 1 << 16])
def test_in_8_bits_each_parameter_has_its_own_blocks(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each were updated alone, filled up to whole blocks with zeros."""
    monkeypatch.setattr(adamw_module, "PIECE", piece)
    together, alone = parameters(), parameters()
    optimizer = FlatAdamW(of(together), kind="adamw_8bit")
    train(optimizer, together)
    for p, peer in zip(together, alone, strict=True):
        [key] = [key for key, ps in of(together).items() if any(p is other for other in ps)]
        own = FlatAdamW({key: [peer]}, kind="adamw_8bit")
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for other in together:
                shape = other.shape
                drawn = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)
                if other is p:
                    assert peer.grad is not None
                    peer.grad.copy_(drawn)
            own.step(1e-2, 0.3)
        assert torch.equal(p, peer)
        assert {name: (t.dtype, t.shape) for name, t in optimizer.state[p].items()} == {
            "exp_avg": (torch.uint8, p.shape), "exp_avg_sq": (torch.uint8, p.shape),
            "exp_avg_absmax": (torch.float32, (-(-p.numel() // 256),)),
            "exp_avg_sq_absmax": (torch.float32, (-(-p.numel() // 256),)),
        }  # fmt: skip
        for name, part in optimizer.state[p].items():
            assert torch.equal(part, own.state[peer][name])


def test_the_block_of_the_chapter() -> None:
    """docs/optimizer_state.md, "One block"."""
    some = (4e-3, -1.23e-3, 2e-5, -3e-9, 0), (1.6e-5, 1.5e-6, 4e-10, 9e-13, 0)
    m, v = (torch.tensor([*first, *[0.0] * 251]) for first in some)
    codes = [encode_dynamic(x, signed)[0][:5].tolist() for x, signed in ((m, True), (v, False))]
    assert codes == [[255, 49, 150, 126, 127], [255, 122, 8, 1, 0]]


def second_update(kind: Optimizer) -> float:
    """Of a weight whose gradients are 3e-4, then 0, in a block whose others have 1, in learning rates."""
    p = nn.Parameter(torch.zeros(256))
    optimizer = FlatAdamW({(0.0, 1.0): [p]}, kind=kind)
    assert p.grad is not None
    p.grad.fill_(1.0)[0] = 3e-4
    optimizer.step(1e-3)
    before = float(p.detach()[0])
    p.grad[0] = 0.0
    optimizer.step(1e-3)
    return (before - float(p.detach()[0])) / 1e-3


def test_in_8_bits_a_small_square_does_not_become_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else m is divided by nothing but eps. The figures stand in docs/optimizer_state.md."""
    assert second_update("adamw") == pytest.approx(0.7, abs=0.05)
    assert second_update("adamw_8bit") == pytest.approx(0.3, abs=0.05)

    def midpoints(device: torch.device, signed: bool) -> Tensor:
        levels = dynamic_map(device, signed)
        return (levels[:-1] + levels[1:]) / 2

    monkeypatch.setattr(dynamic_8bit, "dynamic_thresholds", midpoints)
    assert second_update("adamw_8bit") == pytest.approx(12_700, rel=0.01)


@pytest.mark.parametrize("kind", STATE)
def test_the_bytes_of_the_state(kind: Optimizer) -> None:
    optimizer = FlatAdamW({(0.0, 1.0): [nn.Parameter(torch.zeros(16, 4096))]}, kind=kind)
    [state] = optimizer.state.values()
    assert sum(part.nbytes for part in state.values()) == state_bytes(kind, 16 * 4096)
    assert state_bytes("adamw", 16 * 4096) == 8 * 16 * 4096
    assert state_bytes("adamw_8bit", 42_000_000) == pytest.approx((2 + 8 / 256) * 42e6, rel=1e-6)
    assert state_bytes("adamw", 42_000_000, pinned=True) == 2 * 2**28
    assert state_bytes("adamw", 2**20, pinned=True) == state_bytes("adamw", 2**20)


# -- paged -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("kind", STATE)
@pytest.mark.parametrize("page", [256, 1024, 1 << 22])
def test_paged_it_makes_the_same_bits(kind: Optimizer, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_module, "PAGE", page)
    plain, paged = parameters(), parameters()
    train(FlatAdamW(of(plain), kind=kind), plain)
    optimizer = FlatAdamW(of(paged), kind=kind, paged=True)
    train(optimizer, paged)
    again = FlatAdamW(of(twins := parameters()), kind=kind)
    train(again, twins)
    for p, other, twin in zip(plain, paged, twins, strict=True):
        assert torch.equal(p, other)
        for name, part in optimizer.state[other].items():
            assert part.device.type == "cpu"
            assert torch.equal(part, again.state[twin][name].cpu())


@pytest.mark.parametrize("kind", STATE)
def test_two_pages_of_the_state_are_on_the_device(kind: Optimizer) -> None:
    optimizer = FlatAdamW(of(parameters()), kind=kind, paged=True)
    held = sum(part.nbytes for lane in optimizer._lanes for part in lane._here)
    assert held == state_bytes(kind, 2 * adamw_module.PAGE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", STATE)
def test_paged_on_a_gpu(kind: Optimizer) -> None:
    """More pages than lanes, and gradients that the current stream is still busy with; nobody waits but the step."""
    n = 5 * adamw_module.PAGE + 4096
    made = []
    for paged in (False, True):
        p = nn.Parameter(torch.ones(n, device="cuda"))
        optimizer = FlatAdamW({(0.1, 1.0): [p]}, kind=kind, paged=paged)
        on_gpu = torch.cuda.memory_allocated()
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(3):
            assert p.grad is not None
            torch.cuda._sleep(50_000_000)
            p.grad.normal_(generator=generator)
            optimizer.step(1e-2, 0.5)
        assert all(part.is_pinned() == paged for part in optimizer.state[p].values())
        made.append((p.detach().cpu(), {name: part.cpu() for name, part in optimizer.state[p].items()}, on_gpu))
        del p, optimizer
    (p, state, on_gpu), (other, of_other, less) = made
    assert torch.equal(p, other)
    assert all(torch.equal(state[name], of_other[name]) for name in state)
    assert on_gpu - less >= state_bytes(kind, 3 * adamw_module.PAGE)
