"""Frozen layers of one input with their adapters, differentiated by hand. With P = x A^T (rank numbers a token):

    y  = x W'^T + s P B^T                    dx = dy W' + (s dy B) A
    dB = s dy^T P                            dA = (s dy B)^T x

The A of layers with the same x go in one product. What adapters add to y, dx and gradients is added in place. Weights
are decoded by slices (`linear.slices`).

On a GPU y and dx are not even read and written again for an adapter: it joins the product with the weight, as further
columns and rows of what is multiplied, and costs little more than its FLOPs.

    y = [x sP] [W' B]^T                          dx = [dy  s dy B] [W'; A]

           in    room       in    columns             out     room             in
        +-------+----+   +-------+----+            +-------+--------+       +------+
      N |   x   | sP |   |   W'  |  B | out      N |  dy   | s dy B |       |  W'  | out
        +-------+----+   +-------+----+            +-------+--------+       +------+
                                                                            |   A  | below
                                                                            +------+

Of several layers with one x, y is made layer by layer, so each has its own P and B. But dx is one sum over the layers,
so one of them takes s dy B and A of all.

    joins           an adapter's taking part in this; `_joins` says when, else its products are added
    columns, below  B, and every A, where they lie when the weight has been decoded: behind its rows, under the last one
    room            spare columns behind x or dy, which whoever makes that allocates and leaves as they are; so sP and
                    s dy B find their place without a copy. `x_room` and `dy_room` say how many there should be
    bare, roomy     a matrix without its room, and with it
    carrier         the layer whose dy has the room
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor, nn

from minilora.backend import has_kernels
from minilora.linear import NF4Linear, add_product_, decoded, multiply, multiply_back
from minilora.lora import LoRALinear, cast_of
from minilora.nf4 import NF4Tensor

WHOLE = 16  # numbers: rows longer by a multiple of it are moved as fast as before
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class LowRank:
    """A (rank, in) and B (out, rank), float32, whose product is added `scale` times.

    joins: the product with the weight, as above
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    joins: bool


@dataclass(frozen=True)
class Projections:
    """Layers of one input: their frozen weights (out, in), and the adapters that some of them have.

    carrier: the layer whose dy may have room
    """

    weights: tuple[NF4Tensor | Tensor, ...]
    adapters: tuple[LowRank | None, ...]
    carrier: int = 0

    @staticmethod
    def of(*layers: nn.Module, carrier: int = 0) -> "Projections":
        """What each `nn.Linear`, `NF4Linear` or `LoRALinear` computes."""
        weights, adapters = list[NF4Tensor | Tensor](), list[LowRank | None]()
        for layer in layers:
            base = layer.base if isinstance(layer, LoRALinear) else layer
            assert isinstance(base, nn.Linear | NF4Linear)
            weights.append(base.weight)
            adapters.append(None)
            if isinstance(layer, LoRALinear) and layer.enabled:
                joins = _joins(base.weight, len(layer.lora_A))
                adapters[-1] = LowRank(layer.lora_A, layer.lora_B, layer.scale, joins)
        return Projections(tuple(weights), tuple(adapters), carrier)

    def decoded(self, dtype: torch.dtype) -> "Projections":
        """The same, whose weights need not be decoded again."""
        columns = [cast_of(a.lora_B, dtype) if a and a.joins else None for a in self.adapters]
        below: list[Tensor | None] = [None] * len(self.weights)
        if self.dy_room:
            below[self.carrier] = self._every_a(dtype)
        return replace(self, weights=tuple(map(decoded, self.weights, repeat(dtype), columns, below)))

    @property
    def learned(self) -> list[Tensor]:
        """A and B of each adapter: what is handed to an autograd function as arguments of its own."""
        return [tensor for adapter in self.adapters if adapter for tensor in (adapter.lora_A, adapter.lora_B)]

    @property
    def x_room(self) -> int:
        """Columns of room behind x."""
        return max((len(a.lora_A) for a in self.adapters if a and a.joins), default=0)

    @property
    def dy_room(self) -> int:
        """Columns of room behind the carrier's dy."""
        all_join = self.adapters[self.carrier] and all(a.joins for a in self.adapters if a)
        return sum(self._ranks) if all_join else 0

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """x (N, in), or (N, in + x_room), whose room is written to -> y (N, out) of each, and x A^T (N, sum of ranks)
        for backward."""
        if not self.learned:
            return [multiply(x, weight) for weight in self.weights], None
        n_in = self.weights[0].shape[1]
        bare = x[:, :n_in]
        reduced = torch.mm(bare, self._every_a(x.dtype).T)
        if self.x_room and x.shape[1] == n_in:
            x = x.new_empty(len(x), n_in + self.x_room)
            x[:, :n_in] = bare
        ys, parts = list[Tensor](), iter(reduced.split_with_sizes(self._ranks, dim=1))
        for weight, adapter in zip(self.weights, self.adapters, strict=True):
            if adapter is None:
                ys.append(multiply(bare, weight))
                continue
            part, up = next(parts), cast_of(adapter.lora_B, x.dtype)
            if adapter.joins:
                wide = x[:, : n_in + part.shape[1]]
                torch.mul(part, adapter.scale, out=wide[:, n_in:])
                ys.append(multiply(wide, weight, up))
            else:
                ys.append(multiply(bare, weight).addmm_(part, up.T, alpha=adapter.scale))
        return ys, reduced

    def reduce(self, dys: Sequence[Tensor]) -> Tensor | None:
        """s dy B of each adapter (N, sum of ranks): what `back` and `learn` take; None without adapters.

        dys: (N, out) each, or of the carrier (N, out + dy_room), in whose room this then lies
        """
        if not self.learned:
            return None
        d_reduced = dys[self.carrier][:, self.weights[self.carrier].shape[0] :]
        if not d_reduced.shape[1]:
            d_reduced = dys[0].new_empty(dys[0].shape[0], sum(self._ranks))
        for adapter, dy, part in self._adapted(dys, d_reduced):
            part.addmm_(dy, cast_of(adapter.lora_B, dy.dtype), beta=0, alpha=adapter.scale)
        return d_reduced

    def back(self, dys: Sequence[Tensor], d_reduced: Tensor | None, room: int = 0) -> Tensor:
        """dx (N, in).

        room: columns of room that it is to have, (N, in + room)
        """
        n_in, joined = self.weights[0].shape[1], False
        roomy = dys[0].new_empty(dys[0].shape[0], n_in + room)
        dx = roomy[:, :n_in]
        for i, (dy, weight) in enumerate(zip(dys, self.weights, strict=True)):
            has_more = dy.shape[1] > weight.shape[0]
            multiply_back(dy, weight, dx, adds=i > 0, below=self._every_a(dx.dtype) if has_more else None)
            joined |= has_more
        if d_reduced is not None and not joined:
            dx.addmm_(d_reduced, self._every_a(dx.dtype))
        return roomy

    def learn(self, dys: Sequence[Tensor], d_reduced: Tensor | None, x: Tensor, reduced: Tensor | None) -> Gradients:
        """The float32 gradients of what is `learned`, x and reduced as in `forward`; None where they have been added to
        the `.grad` that each has."""
        if d_reduced is None or reduced is None:
            return []
        in_place = all(p.grad is not None for p in self.learned)
        grads = [torch.zeros_like(p) if p.grad is None or not in_place else p.grad for p in self.learned]
        for grad, (adapter, dy, part) in zip(grads[1::2], self._adapted(dys, reduced), strict=True):
            add_product_(grad, dy.T, part, adapter.scale)
        if (of_every_a := _as_one(grads[::2])) is not None:
            add_product_(of_every_a, d_reduced.T, x)
        else:
            for grad, made in zip(grads[::2], torch.mm(d_reduced.T, x).split_with_sizes(self._ranks), strict=True):
                grad.add_(made)
        return [None if in_place else grad for grad in grads]

    @cached_property
    def _ranks(self) -> list[int]:
        return [adapter.lora_A.shape[0] for adapter in self.adapters if adapter]

    def _every_a(self, dtype: torch.dtype) -> Tensor:
        """Every A, one below the other: (sum of ranks, in). They read x once."""
        downs = [cast_of(adapter.lora_A, dtype) for adapter in self.adapters if adapter]
        together = _as_one(downs)
        return torch.cat(downs) if together is None else together

    def _adapted(self, ys: Sequence[Tensor], reduced: Tensor) -> Iterator[tuple[LowRank, Tensor, Tensor]]:
        """Each adapter with its y (N, out) and its columns of x A^T."""
        bare = (y[:, : weight.shape[0]] for y, weight in zip(ys, self.weights, strict=True))
        with_adapter = [(adapter, y) for adapter, y in zip(self.adapters, bare, strict=True) if adapter]
        for (adapter, y), part in zip(with_adapter, reduced.split_with_sizes(self._ranks, dim=1), strict=True):
            yield adapter, y, part


def _joins(weight: NF4Tensor | Tensor, rank: int) -> bool:
    """Whether an adapter joins the product: where the weight is decoded, which gives B a place beside it; where rows of
    so many more are a multiple of 16 numbers, else Triton moves them by 2 bytes, not 16; and on a GPU, which waits for
    memory: on a CPU the longer sums take the time that is saved."""
    return isinstance(weight, NF4Tensor) and has_kernels(weight.packed.device) and rank % WHOLE == 0


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices (n, in), one below the other, without a copy; None where they do not lie so in memory."""
    at, first = parts[0].storage_offset(), parts[0]
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == at):
            return None
        at += part.numel()
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())
