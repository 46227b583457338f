"""Steps replayed as CUDA graphs against steps as they come: the same losses, gradients and updates."""

import copy
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tiny_runs import TINY, step_of, tiny_model

from minilora.ahead import Ahead
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import BaseConfig, DataConfig, LoraConfig, RunConfig, TrainConfig
from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, make_batch
from minilora.fused import Keep
from minilora.generation import generate
from minilora.model import Mistral
from minilora.train import graph
from minilora.train.graph import MOST_GRAPHS, StepGraphs
from minilora.train.ledger import Ledger
from minilora.train.setup import optimizer_for
from minilora.train.step import backward_of
from minilora.train.strategies import apply_strategy, trainable

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
LENGTH = 64


def test_without_a_gpu_steps_run_as_they_come() -> None:
    model = apply_strategy(tiny_model(), RunConfig(lora=LoraConfig(rank=4)))
    assert not StepGraphs.can_record(model)


def test_a_step_runs_as_it_comes_only_beside_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would need a step's memory twice. Recording itself needs a GPU."""
    done = list[str]()

    class Recorded:
        def __init__(self, *_: object) -> None:
            done.append("record")

        def replay(self, *_: object) -> torch.Tensor:
            done.append("replay")
            return torch.zeros(())

    monkeypatch.setattr(graph, "_Recorded", Recorded)
    model = apply_strategy(tiny_model(), RunConfig(lora=LoraConfig(rank=4)))
    steps = StepGraphs(model, optimizer_for(trainable(model), RunConfig()))

    def plain(*_: object) -> torch.Tensor:
        assert not steps._graphs
        done.append("as it comes")
        return torch.zeros(())

    monkeypatch.setattr(steps, "_plain", plain)
    few, many, other = (batch_of([[length] * (LENGTH // length)]) for length in (LENGTH, 4, LENGTH // 2))
    taller = batch_of([[LENGTH], [LENGTH]])
    for batch in (few, few, many, few, other, taller, taller, few):
        steps(batch, 1.0)
    first = ["as it comes", "record", "replay", "record", "replay", "replay", "replay"]
    assert done == [*first, "as it comes", "record", "replay", "record", "replay"]


# (length, number) of runs in a row of 4096: (longest run, space for stops) of what records it
SHAPES = {(4096, 1): (4096, 4), (2048, 2): (2048, 4), (128, 32): (128, 64), (129, 31): (256, 64), (5, 800): (128, 1024)}


def test_a_recording_is_of_runs_about_as_long_as_the_longest() -> None:
    """Rows, length, longest run, space for the runs' stops, the tail's among them."""
    shapes = {(lengths, n): graph._shape(batch_of([[lengths] * n], length=4096)) for lengths, n in SHAPES}
    assert shapes == {(lengths, n): (1, 4096, longest, space) for (lengths, n), (longest, space) in SHAPES.items()}
    assert graph._shape(batch_of([[60]] * 3)) == (3, LENGTH, LENGTH, 8), "never longer than a row"


def test_a_recording_s_inputs_begin_where_a_batch_s_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16 bytes: for others Triton compiles a kernel anew, which may not be while a stream is recorded."""
    for name in ("CUDAGraph", "graph", "stream", "current_stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    seen = list[PackedBatch]()
    model = tiny_model()
    graph._Recorded(model, lambda batch, _: seen.append(batch) or torch.zeros(()), (3, 65, 65, 8), None)
    [batch] = seen
    inputs = (batch.tokens, batch.labels, batch.positions, batch.segments, batch.runs.stops)
    assert [x.data_ptr() % 16 for x in inputs] == [0] * 5


def test_where_recording_fails_steps_go_on_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph, "_Recorded", fail)
    steps, done = StepGraphs(tiny_model(), MagicMock()), list[PackedBatch]()
    monkeypatch.setattr(steps, "_plain", lambda batch, _: done.append(batch) or torch.ones(()))
    batch = batch_of([[LENGTH]])
    steps(batch, 1.0)
    with pytest.warns(
        UserWarning, match=r"^steps go on without CUDA graphs, slower: recording fails \(operation .*\)$"
    ):
        assert steps(batch, 1.0) == 1
    assert steps(batch, 1.0) == 1
    assert len(done) == 3


@pytest.mark.parametrize("lengths", [[[64]], [[4] * 16], [[20, 20, 20]] * 5, [[1] * 60, [30, 30]]])
def test_the_ledger_counts_the_runs_that_a_graph_is_told_of(
    lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty ones among them; where nothing is recorded, those of the batch, and one a row for what is left of it."""
    shapes = list[tuple[int, ...]]()
    monkeypatch.setattr(graph, "_Recorded", lambda _model, _plain, shape, _beside: shapes.append(shape) or MagicMock())
    steps, batch = StepGraphs(model := tiny_model(), MagicMock()), batch_of(lengths)
    monkeypatch.setattr(steps, "_plain", lambda *_: torch.zeros(()))
    for _ in range(2):
        steps(batch, 1.0)
    train, data = TrainConfig(batch_size=len(lengths)), DataConfig(max_seq_len=LENGTH)
    run = RunConfig(BaseConfig(dtype="bfloat16"), data=data, train=train)
    ledger = Ledger(run, model.config, torch.device("cuda"), batch, LENGTH, flash=True)
    assert [ledger._plan().runs] == [space - 1 for *_, space in shapes]
    n = sum(map(len, lengths)) + len(lengths)
    noisy = replace(ledger, config=replace(run, train=replace(train, neftune_alpha=5.0)))
    assert noisy._plan().runs == n <= ledger._plan().runs <= max(3, 2 * n)


@pytest.fixture
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Mistral]:
    """A QLoRA model on the GPU, in bfloat16; every call gives the same."""
    folder = tmp_path_factory.mktemp("base") / "m"
    save_hf(tiny_model(config=replace(TINY, n_layers=3, sliding_window=24)), folder, dtype=torch.float32)

    def make() -> Mistral:
        model = load_model(folder, quantize="nf4", dtype=torch.bfloat16, device="cuda")
        torch.manual_seed(0)
        return apply_strategy(model, RunConfig(lora=LoraConfig(rank=16, alpha=16))).train()

    return make


def batches(n: int, most_samples: int = 6, length: int = LENGTH) -> list[PackedBatch]:
    """One row each, or two of an even length, of unlike samples."""
    draw = np.random.default_rng(0)

    def lengths() -> list[int]:
        shares = [1 / most_samples] * int(draw.integers(1, most_samples + 1))
        return (draw.multinomial(LENGTH - 10, shares) + 1).tolist()

    return [batch_of([lengths() for _ in range(2 - length % 2)], draw, length) for _ in range(n)]


def batch_of(lengths: list[list[int]], draw: np.random.Generator | None = None, length: int = LENGTH) -> PackedBatch:
    """A row for each list, of samples that are so long."""
    draw, samples, rows = draw or np.random.default_rng(0), list[Sample](), list[list[int]]()
    for row in lengths:
        rows.append(list(range(len(samples), len(samples) + len(row))))
        for n in row:
            mask = draw.random(n + 1) < 0.5
            mask[-1] = True
            samples.append(Sample(draw.integers(14, TINY.vocab_size, n + 1, dtype=np.int32), mask, "f"))
    return make_batch(samples, rows, length)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("decode_ahead", [False, True])
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
def test_a_run_by_graphs_is_the_run_without(
    adapted: Callable[[], Mistral], checkpointing: bool, n_micro: int, decode_ahead: bool, length: int
) -> None:
    """Sums of FlashAttention's backward have no fixed order, so bits may differ: in bfloat16 2^-8 a number, and
    Adam's first steps are of the learning rate's size whatever the gradient is. So gradients are compared in norm,
    and losses over the run."""
    losses, grads = [], []
    for by_graphs in (False, True):
        model = adapted()
        for block in model.layers:
            block.keep = Keep.INPUT if checkpointing else Keep.ALL  # type: ignore[assignment]
        config = RunConfig(train=TrainConfig(weight_decay=0.0))
        optimizer = optimizer_for(trainable(model), config)
        assert StepGraphs.can_record(model)
        ahead = Ahead(model.device) if decode_ahead else None
        backward = StepGraphs(model, optimizer, ahead) if by_graphs else backward_of(model, optimizer)
        found, data = [], batches(12, length=length)
        for start in range(0, len(data), n_micro):
            step = data[start : start + n_micro]
            found.append(step_of(model, optimizer, step, 1e-3, 1.0, backward=backward).loss)
        losses.append(found)
        grads.append({name: copy.deepcopy(p.grad) for name, p in trainable(model).items()})
        if isinstance(backward, StepGraphs):
            assert 0 < len(backward._graphs) <= MOST_GRAPHS
            assert ahead is None or len(ahead._rooms) == 2
            assert ahead is None or any(asked.shape[1] == TINY.dim + 16 for asked in ahead._order), "B's columns"
    assert losses[1] == pytest.approx(losses[0], rel=2**-7)
    for name, expected in grads[0].items():
        assert expected is not None
        assert (grads[1][name] - expected).norm() <= 2**-4 * expected.norm(), name


@pytest.mark.gpu
@needs_gpu
def test_after_a_release_graphs_are_recorded_anew(adapted: Callable[[], Mistral]) -> None:
    """Also where texts are generated in between, whose steps are recorded too, in inference mode."""
    model = adapted()
    optimizer = optimizer_for(trainable(model), RunConfig())
    backward, [batch] = StepGraphs(model, optimizer), batches(1)
    losses = []
    for turn in range(6):
        if turn == 3:
            backward.release()
        if turn in (0, 2, 3):
            generate(model, torch.full((1, 5), 20), 20)
        losses.append(step_of(model, optimizer, [batch], 0.0, 0.0, backward=backward).loss)
    assert losses == pytest.approx([losses[0]] * 6, rel=2**-7)
