"""Forward and backward of a micro-batch as one CUDA graph: launched once, by the host, instead of some thousand times.

A 7B's step on a few hundred tokens is over on a fast GPU before its host has made all launches. Packed rows always have
one shape, so the launches of one step are those of the next: they are recorded once and replayed, on other numbers in
the same memory.

    first batch of such rows and runs    run as it comes: kernels are compiled, libraries choose theirs
    the next, and the first of a shape   recorded, and replayed
    all others                           copied to where the recorded kernels read, and replayed

A shape is rows, their length, the longest run, to the next power of two, and how many runs there is space for. Which
kernels run follows from all but the space. Attention is launched for each run as if it were the longest: were that the
row's length, short samples would cost as much as long ones.

Nothing in between may depend on a number that only the GPU knows: the loss goes over all rows, not over those with a
target.

Recorded memory is lent to no one else. So graphs share theirs, and a step runs as it comes only where there are none:
beside them it would need a step's memory again. Where recording fails, a warning says so, and all steps run as they
come.
"""

import warnings

import torch
from torch import Tensor

from minilora.adamw import FlatAdamW
from minilora.ahead import Ahead
from minilora.attention import has_flash_attention
from minilora.data.pack import PackedBatch
from minilora.fast_block import FusedBlock
from minilora.lora import TrainedCopy
from minilora.model import Mistral
from minilora.train.step import Backward, backward_of
from minilora.visible import Runs

MOST_GRAPHS = 12  # each holds its launches in the GPU's memory; the oldest goes first
SHORTEST = 128  # tokens; of shorter runs FlashAttention works on no less


def space_for(n_stops: int) -> int:
    """How many `Runs.stops` a recording has: a power of two, so that a few serve all batches."""
    return max(4, 1 << (n_stops - 1).bit_length())


def _shape(batch: PackedBatch) -> tuple[int, ...]:
    """Rows, length, longest run and space for runs of the recording that serves the batch."""
    (rows, length), longest = batch.tokens.shape, 1 << (batch.runs.longest - 1).bit_length()
    return rows, length, min(length, max(SHORTEST, longest)), space_for(len(batch.runs.stops))


class StepGraphs:
    """A `Backward` by CUDA graphs; the optimizer's parameters and gradients have memory that stays."""

    def __init__(self, model: Mistral, optimizer: FlatAdamW, ahead: Ahead | None = None) -> None:
        self._model, self._plain = model, backward_of(model, optimizer, ahead=ahead)
        self._seen, self._graphs = set[tuple[int, ...]](), dict[tuple[int, ...], _Recorded]()
        self._records = True

    @staticmethod
    def can_record(model: Mistral) -> bool:
        """Whether every launch of this model's step follows from a batch's shape alone."""
        return (
            has_flash_attention(model.device, model.dtype, model.config.head_dim)
            and all(isinstance(block, FusedBlock) for block in model.layers)
            and not any(isinstance(module, TrainedCopy) for module in model.modules())
            and model.prefix is None
            and not model.neftune_alpha
        )

    def __call__(self, batch: PackedBatch, factor: float | Tensor) -> Tensor:
        shape = _shape(batch)
        if self._records and shape[:3] not in self._seen:
            self._seen.add(shape[:3])
            self.release()
        elif self._records and shape not in self._graphs:
            self._records = self._record(shape)
            if not self._records:
                self.release()
        if shape in self._graphs:
            return self._graphs[shape].replay(batch, factor)
        return self._plain(batch, factor)

    def _record(self, shape: tuple[int, ...]) -> bool:
        """Whether it could be recorded."""
        if len(self._graphs) == MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        beside = next(iter(self._graphs.values()), None)  # they share memory: they never run at the same time
        try:
            self._graphs[shape] = _Recorded(self._model, self._plain, shape, beside)
        except RuntimeError as error:  # while only the host worked: no gradient was touched
            first_line = str(error).partition("\n")[0]
            warnings.warn(f"steps go on without CUDA graphs, slower: recording fails ({first_line:.200})", stacklevel=3)
            return False
        return True

    def release(self) -> None:
        """Give the recorded memory back: before work that has memory of its own."""
        self._graphs.clear()
        torch.cuda.empty_cache()


class _Recorded:
    """One graph, and the memory that it reads and writes."""

    def __init__(self, model: Mistral, backward: Backward, shape: tuple[int, ...], beside: "_Recorded | None") -> None:
        rows, length, longest, space = shape
        # Each by itself begins at a round address, as every batch does: Triton compiles a kernel anew for others.
        tokens, labels, positions = (
            torch.zeros(rows, length, dtype=torch.int64, device=model.device) for _ in range(3)
        )
        self._stops = torch.zeros(space, dtype=torch.int32, device=model.device)
        self._batch = PackedBatch(tokens, labels, positions, tokens.int(), Runs(self._stops, longest))
        self._factor = torch.ones((), device=model.device)
        torch.cuda.empty_cache()  # what the steps before have left; the graph takes memory anew
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a recording that fails would leave its own stream current
            torch.cuda.graph(self._graph, pool=beside._graph.pool() if beside else None),
        ):
            self._loss = backward(self._batch, self._factor)

    def replay(self, batch: PackedBatch, factor: float | Tensor) -> Tensor:
        stops = batch.runs.stops
        padded = torch.cat([stops, stops[-1:].expand(len(self._stops) - len(stops))])  # empty runs
        pairs = [(getattr(self._batch, name), getattr(batch, name)) for name in ("tokens", "labels", "positions")]
        for here, there in [*pairs, (self._stops, padded)]:
            here.copy_(there.pin_memory(), non_blocking=True)
        self._factor.fill_(factor)
        self._graph.replay()
        return self._loss
