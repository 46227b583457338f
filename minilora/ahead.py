"""Memory that is filled ahead of its use, on a stream of its own, while the device is busy with what was filled before.

A step's frozen weights are decoded for their products one after another, in an order that the next step repeats. To
decode is to move bytes, to multiply is to compute, so a GPU can do both at once:

    main stream    decode 0   product 0   product 1   product 2
    side stream               decode 1    decode 2    decode 3

Two pieces of memory take turns: 2 goes to where 0 was, so it waits for product 0, and product 2 waits for it. The first
step finds the order out. Where a later one departs from it, that is filled when it is asked for, and remembered.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Fill = Callable[[Tensor], None]


@dataclass(frozen=True)
class _Asked:
    key: Hashable
    shape: tuple[int, int]
    dtype: torch.dtype
    fill: Fill

    def stands_for(self, other: "_Asked") -> bool:
        return (self.key, self.shape, self.dtype) == (other.key, other.shape, other.dtype)

    @property
    def n_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class Ahead:
    """What steps ask for, and the two pieces of memory. On a CPU all happens in one order, without a stream: for tests.

    The pieces are made once, after the first step, and never moved: a CUDA graph may know them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._order, self._at = list[_Asked](), 0
        self._rooms: list[Tensor] = []
        self._begun: int | None = None  # which of the order the side stream was given last, and nobody waits for yet

    @contextmanager
    def step(self) -> Iterator[None]:
        """While entered, `current` is this, in every thread: autograd has its own."""
        global _current
        self._at, before, _current = 0, _current, self
        try:
            yield
        finally:
            _current = before
            self._settle()
        if not self._rooms and self._order:  # after a whole step
            n_bytes = max(asked.n_bytes for asked in self._order)
            self._rooms = [torch.empty(n_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]

    def filled(self, key: Hashable, shape: tuple[int, int], dtype: torch.dtype, fill: Fill) -> Tensor:
        """A matrix of that shape and dtype that `fill` has filled, the caller's until the next call: by then all its
        work on it must have been given to the current stream.

        key: of what is filled in; the same key within a step, or in the next one, stands for the same numbers then
        """
        asked, at, order = _Asked(key, shape, dtype, fill), self._at, self._order
        self._at += 1
        expected = at < len(order) and order[at].stands_for(asked)
        if not expected:
            order[at:] = [asked]
        is_begun = expected and self._begun == at
        self._settle()
        here = expected and self._fits(asked)
        out = self._room(at, asked) if here else torch.empty(shape, dtype=dtype, device=self._device)
        if not is_begun:
            fill(out)
        if here and at + 1 < len(order) and self._fits(order[at + 1]):
            self._begun = at + 1  # so that it is waited for if it fails halfway
            with self._beside():
                order[at + 1].fill(self._room(at + 1, order[at + 1]))
        return out

    def _fits(self, asked: _Asked) -> bool:
        return bool(self._rooms) and asked.n_bytes <= len(self._rooms[0])

    def _room(self, at: int, asked: _Asked) -> Tensor:
        return self._rooms[at % 2][: asked.n_bytes].view(asked.dtype).view(asked.shape)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the side stream, after all that the current one has been given."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def _settle(self) -> None:
        """Let the current stream wait for the side stream, if that has something to do."""
        if self._begun is not None and self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        self._begun = None


_current: Ahead | None = None


def current() -> Ahead | None:
    """The one whose step is under way."""
    return _current
