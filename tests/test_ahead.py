"""Weights decoded ahead: the same numbers, and no order of two streams in which they would be others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import combinations

import pytest
import torch
from tiny_runs import TINY, step_of
from torch import Tensor

from benchmarks.feeds import random_batch
from benchmarks.ledger import random_model
from minilora import ahead as ahead_module
from minilora.ahead import Ahead
from minilora.config import LoraConfig, RunConfig, TrainConfig
from minilora.dispatch import quantize
from minilora.linear import multiply, multiply_back
from minilora.nf4 import CPU
from minilora.train.setup import optimizer_for
from minilora.train.step import backward_of
from minilora.train.strategies import apply_strategy, trainable

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")


class Clock:
    """A pretended stream: what it was given, and how much of each stream's work comes before what it is given next."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, {name: 0}

    def wait_stream(self, other: "Clock") -> None:
        for name, n in other.seen.items():
            self.seen[name] = max(self.seen.get(name, 0), n)


class TwoStreams:
    """Notes who touches which memory, and tells which of them a GPU could do in either order."""

    def __init__(self, ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main = self.now = Clock("main")
        self.side = Clock("side")
        self.touched: list[tuple[str, int, int, bool, dict[str, int]]] = []
        monkeypatch.setattr(ahead, "_side", self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.now)
        monkeypatch.setattr(torch.cuda, "stream", self.entered)

    @contextmanager
    def entered(self, stream: Clock) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def touch(self, memory: Tensor, writes: bool) -> None:
        self.now.seen[self.now.name] += 1
        seen = dict(self.now.seen)
        self.touched.append((self.now.name, seen[self.now.name], memory.data_ptr(), writes, seen))

    def joined(self) -> bool:
        return self.main.seen.get("side", 0) == self.side.seen["side"]

    def races(self) -> int:
        n = 0
        for (name, at, where, writes, _), (_, _, there, also, seen) in combinations(self.touched, 2):
            n += where == there and (writes or also) and seen.get(name, 0) < at
        return n


def filler(streams: TwoStreams, number: float) -> Callable[[Tensor], None]:
    def fill(out: Tensor) -> None:
        streams.touch(out, writes=True)
        out.fill_(number)

    return fill


ORDERS = {
    "the same": [[1, 2, 3, 4, 5]] * 3,
    "of odd and even length": [[1, 2, 3], [1, 2, 3], [1, 2], [1, 2], [1, 2, 3, 4]],
    "one twice in a row": [[1, 1, 2, 2, 1]] * 3,
    "another from the middle on": [[1, 2, 3, 4], [1, 2, 4, 3, 1], [1, 2, 4, 3, 1], [4, 3, 2, 1], [4, 3, 2, 1]],
    "too large for the memory": [[1, 2, 3], [1, 2, 9, 3, 4], [1, 2, 9, 3, 4], [9, 9, 1], [9, 9, 1]],
    "only one, and nothing": [[1], [1], [], [1]],
}


@pytest.mark.parametrize("steps", ORDERS.values(), ids=ORDERS)
def test_no_order_of_the_streams_gives_other_numbers(steps: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use of the memory is before or after every filling of it, whatever is asked for."""
    ahead = Ahead(CPU)
    streams, rooms = TwoStreams(ahead, monkeypatch), set[int]()
    for step in steps:
        with ahead.step():
            for n in step:
                shape = (4, 30 if n == 9 else n)
                out = ahead.filled(n, shape, torch.float32, filler(streams, n))
                assert out.shape == shape
                assert bool((out == n).all())
                streams.touch(out, writes=False)
                streams.touch(out, writes=False)
        assert streams.joined(), "a CUDA graph would not end"
        rooms |= {room.data_ptr() for room in ahead._rooms}
    assert streams.races() == 0
    assert len(rooms) == 2, "a CUDA graph knows where they are"
    assert len(steps[0]) < 2 or any(name == "side" for name, *_ in streams.touched)


def test_what_was_begun_is_waited_for_where_a_step_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead(CPU)
    streams = TwoStreams(ahead, monkeypatch)
    for stops in (False, True, False):
        with pytest.raises(KeyError) if stops else nullcontext(), ahead.step():
            for n in (1, 2, 3):
                streams.touch(ahead.filled(n, (1, n), torch.float32, filler(streams, n)), writes=False)
                if stops:
                    raise KeyError
        assert ahead_module.current() is None
    assert streams.races() == 0


def test_a_filling_that_fails_halfway_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead(CPU)
    streams = TwoStreams(ahead, monkeypatch)
    fails = False

    def fill(out: Tensor) -> None:
        streams.touch(out, writes=True)
        if fails and streams.now is streams.side:
            raise KeyError

    for fails in (False, False, True):
        with pytest.raises(KeyError) if fails else nullcontext(), ahead.step():
            for n in (1, 2, 3):
                ahead.filled(n, (1, n), torch.float32, fill)
        assert streams.joined()


def test_a_step_that_breaks_off_makes_no_memory() -> None:
    """Which would be as small as what it came to."""
    ahead = Ahead(CPU)
    for fails in (True, False):
        with pytest.raises(KeyError) if fails else nullcontext(), ahead.step():
            ahead.filled(1, (1, 1), torch.float32, torch.zero_)
            if fails:
                raise KeyError
            ahead.filled(2, (1, 100), torch.float32, torch.zero_)
    assert [len(room) for room in ahead._rooms] == [400, 400]


def test_a_step_is_filled_as_often_as_it_asks() -> None:
    filled, ahead = list[int](), Ahead(CPU)

    def fill(n: int) -> Callable[[Tensor], None]:
        return lambda _: filled.append(n)

    for _ in range(3):
        with ahead.step():
            for n in (1, 2, 3):
                ahead.filled(n, (1, 1), torch.float32, fill(n))
    assert filled == [1, 2, 3] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_is_the_same_bits(checkpointing: bool) -> None:
    """Here without streams: whole weights, in two pieces of memory that take turns."""
    batch, found = random_batch(2, 16, TINY.vocab_size), []
    for ahead in (None, Ahead(CPU)):
        torch.manual_seed(0)
        run = RunConfig(lora=LoraConfig(rank=4), train=TrainConfig(activation_checkpointing=checkpointing))
        model = apply_strategy(random_model(TINY, torch.float32), run).train()
        optimizer = optimizer_for(trainable(model), RunConfig())
        backward = backward_of(model, optimizer, ahead=ahead)
        losses = [step_of(model, optimizer, [batch], 1e-3, 0.0, backward=backward).loss for _ in range(4)]
        assert losses[-1] < losses[0]
        found.append((losses, [p.detach().clone() for p in trainable(model).values()]))
        if ahead is not None:
            assert len(ahead._rooms) == 2
            assert len(ahead._order) > 2 * 7
    (losses, weights), (losses_ahead, weights_ahead) = found
    assert losses == losses_ahead
    assert all(map(torch.equal, weights, weights_ahead))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recorded", [False, True])
def test_on_a_gpu_products_are_the_same_bits(recorded: bool) -> None:
    """Weights of 32 MB, decoded in about the time that their products take: a missing wait would show."""
    device, draw = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    weights = [
        quantize(torch.randn(4096, 4096, generator=draw, device=device, dtype=torch.bfloat16) / 64) for _ in range(6)
    ]
    x = torch.randn(512, 4096, generator=draw, device=device, dtype=torch.bfloat16)

    def there_and_back() -> Tensor:
        y = x
        for weight in weights:
            y = multiply(y, weight)
        for weight in reversed(weights):
            y = multiply_back(y, weight)
        return y

    expected, ahead = there_and_back(), Ahead(device)

    def step() -> Tensor:
        with ahead.step():
            return there_and_back()

    assert torch.equal(step(), expected)
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
    found = list[Tensor]()
    torch.cuda._sleep(200_000_000)  # some 0.1 s, in which the host gets ahead: nothing waits for a launch then
    for _ in range(50):
        if recorded:
            graph.replay()
            found.append(y.clone())
        else:
            found.append(step())
    assert all(torch.equal(y, expected) for y in found)
