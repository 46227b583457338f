"""The ledger against the facts: python -m benchmarks.ledger [--shape NAME] [--model PATH]

Each cell is one QLoRA step in a process of its own: its bytes by owner as `minilora.memory_of_step` predicts them, and
as `benchmarks.watch` finds them in the second step, when the optimizer's moments are there.

    other = private memory at the peak - the process before loading - all owned bytes

What imports and the libraries' work buffers take is the process's: a step of one layer of the same size comes first.
The share of "other" is of all: process, tensors and other.
glibc gives back at once what is freed (MALLOC_MMAP_THRESHOLD_); else what it keeps for later would hide all else. A run
that does not ask for that takes so much more than its owners do.

The weights are random NF4 bytes, made in place: no file of full size is needed. --model takes a checkpoint instead.
"""

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import ALPHA, LEARNING_RATE, RANK
from benchmarks.feeds import random_batch
from benchmarks.harness import Contestant, ContestantError, Step, Worker, check_result, write_result
from benchmarks.shapes import SHAPES, shape
from benchmarks.watch import StepWatch
from minilora import scratch
from minilora.backend import pick_device
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import open_checkpoint
from minilora.config import BaseConfig, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from minilora.errors import UserError
from minilora.fused import Keep
from minilora.linear import NF4Linear
from minilora.memory import PeakMemory, private_bytes
from minilora.model import Mistral
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, NF4Tensor
from minilora.train.ledger import Ledger
from minilora.train.setup import optimizer_for, settle_heap
from minilora.train.step import LossScale, backward_of, train_step
from minilora.train.strategies import apply_strategy, trainable

STEP_CAP_S = 1800.0
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
CLOSE, OTHER = 0.10, 0.05  # how far predicted may be from measured, and the largest share of "other"
NO_BYTES = ("norm_eps", "rope_theta", "max_seq_len")  # of a model's sizes, those that no owner's bytes depend on


@dataclass(frozen=True)
class Cell:
    """rows x length random tokens, each of them a target."""

    shape: str
    rows: int
    length: int
    dtype: str
    keep: str = Keep.ALL.name  # in every block

    @property
    def name(self) -> str:
        return f"{self.shape} {self.rows}x{self.length} {self.dtype}, {self.keep.lower()} kept"

    def ledger(self, sizes: ModelConfig) -> Ledger:
        """Of a run on rows of that many random tokens."""
        batch = random_batch(self.rows, self.length, sizes.vocab_size)
        return Ledger(run_config(self), sizes, pick_device("cpu"), batch, self.length, self.kept(sizes))

    def kept(self, sizes: ModelConfig) -> tuple[Keep, ...]:
        """Of each block."""
        return (Keep[self.keep],) * sizes.n_layers


def cells(name: str) -> list[Cell]:
    """Those of a shape."""
    if name == "mistral-7b-v0.3":
        return [Cell(name, 1, 64, "bfloat16")]
    batches = [(8, 256)] if name == "demo" else [(4, 256), (1, 1024)]
    return [Cell(name, *batch, dtype, k.name) for batch in batches for dtype in ("float32", "bfloat16") for k in Keep]


def sizes_of(name: str, model: str | None) -> ModelConfig:
    """Of a shape, or of a checkpoint of it. Raises UserError for a checkpoint of another shape, or none."""
    wanted = open_checkpoint("demo").config if name == "demo" else shape(name)
    found = open_checkpoint(model).config if model else wanted
    for key, value in asdict(wanted).items():
        if key not in NO_BYTES and getattr(found, key) != value:
            what = f"{key} is {getattr(found, key)}, but --shape {name} has {value}"
            raise UserError(f"{model}: {what}; name its own shape")
    return found


# -- in the contestant's process ---------------------------------------------------------------------------------------


def one_step(cell: Mapping[str, Any], model: str | None) -> Step:
    """A step of `cell` that tells its bytes by owner, predicted and measured."""
    own = Cell(**cell)
    sizes, dtype = sizes_of(own.shape, model), getattr(torch, own.dtype)
    _step(own, random_model(replace(sizes, n_layers=1, vocab_size=1024), dtype))()
    scratch._held.__dict__.clear()  # what the warm-up decoded into is the step's, not the process's
    start = _private_now()
    predicted = own.ledger(sizes).predict() | {"process": start}
    step = _step(own, load_model(model, quantize="nf4", dtype=dtype) if model else random_model(sizes, dtype))

    def told() -> dict[str, Any]:
        measured, peak = step()
        other = peak - start - sum(measured.values())
        return {"predicted": predicted, "measured": {"process": start} | measured, "other": other}

    return told


def _step(cell: Cell, base: Mistral) -> Callable[[], tuple[dict[str, int], int]]:
    """A training step: bytes by owner, and the most private memory while it ran."""
    run = run_config(cell)
    kept = cell.kept(base.config)
    settle_heap(run.train, kept)
    model = apply_strategy(base, run, kept).train()
    optimizer = optimizer_for(trainable(model), run)
    backward, loss_scale = backward_of(model, optimizer), LossScale.of(torch.float32)
    batch = random_batch(cell.rows, cell.length, model.config.vocab_size)

    def step() -> tuple[dict[str, int], int]:
        _private_now()
        peak = PeakMemory(torch.device("cpu"))
        peak.start()
        with StepWatch(model, optimizer) as watch:
            train_step(backward, optimizer, [batch], batch.n_targets, LEARNING_RATE, 0.0, loss_scale)
        peak.note()
        return watch.owners(), peak.private

    return step


def _private_now() -> int:
    """Private memory, without what glibc keeps of what was freed: that is no owner's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return private_bytes()


def run_config(cell: Cell, rank: int = RANK) -> RunConfig:
    return RunConfig(
        model=BaseConfig(dtype=cell.dtype),  # type: ignore[arg-type]
        lora=LoraConfig(rank=rank, alpha=ALPHA),
        data=DataConfig(max_seq_len=cell.length),
        train=TrainConfig(batch_size=cell.rows),
    )


def random_model(config: ModelConfig, dtype: torch.dtype) -> Mistral:
    """A base in NF4 whose every byte is random, its absmax around what weights of std 0.02 have."""
    with torch.device("meta"):
        model = Mistral(config)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, torch.nn.Linear) and name.startswith("layers."):
            model.set_submodule(name, NF4Linear(_random_nf4(layer.weight.shape, dtype)))
    for layer in model.modules():
        for name, weight in [*layer.named_parameters(recurse=False)]:
            made = (
                torch.empty(weight.shape, dtype=dtype).normal_(std=0.02)
                if weight.dim() > 1
                else torch.ones(weight.shape, dtype=dtype)
            )
            setattr(layer, name, torch.nn.Parameter(made))
    if config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(False)


def _random_nf4(shape: Sequence[int], dtype: torch.dtype) -> NF4Tensor:
    n = shape[0] * shape[1]
    packed = torch.empty(ceil(n / 2), dtype=torch.uint8).random_()
    absmax = torch.empty(ceil(n / BLOCK_SIZE), dtype=torch.uint8).random_()
    nested = torch.full((ceil(len(absmax) / NESTED_BLOCK_SIZE),), 0.01)
    return NF4Tensor(packed, absmax, tuple(shape), dtype, BLOCK_SIZE, nested, torch.tensor(0.05))


# -- the command -------------------------------------------------------------------------------------------------------


def measure(cell: Cell, model: str | None) -> dict[str, Any]:
    """Both columns of a cell, and how far apart they are."""
    arguments = {"cell": asdict(cell), "model": model}
    contestant = Contestant(cell.name, "benchmarks.ledger:one_step", arguments, ENVIRONMENT)
    try:
        with Worker(contestant, STEP_CAP_S) as worker:
            worker.step(STEP_CAP_S, watch=False)
            found = worker.step(STEP_CAP_S, watch=False).result
    except ContestantError as error:
        return {"cell": asdict(cell), "error": str(error)}
    predicted, measured = found["predicted"], found["measured"]
    owners = dict.fromkeys([*measured, *predicted])
    process = measured["process"]  # the same on both sides
    totals = {"predicted": sum(predicted.values()) - process, "measured": sum(measured.values()) - process}
    other = found["other"]
    return {
        "cell": asdict(cell) | {"lora_rank": RANK},
        "owners": {o: {"predicted": predicted.get(o, 0), "measured": measured.get(o, 0)} for o in owners},
        "totals": totals | {"difference": totals["predicted"] / totals["measured"] - 1},
        "other": {"bytes": other, "share": abs(other) / (process + totals["measured"] + abs(other))},
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """A table of MB by owner."""
    cell = Cell(**{key: value for key, value in result["cell"].items() if key != "lora_rank"})
    if "error" in result:
        console.print(f"{cell.name}: {result['error']}", markup=False)
        return
    table = Table(cell.name, "predicted MB", "measured MB", "difference")
    for owner, both in [*result["owners"].items(), ("all tensors", result["totals"])]:
        predicted, measured = both["predicted"], both["measured"]
        off = f"{predicted / measured - 1:+.1%}" if measured else "-"
        table.add_row(owner, f"{predicted / 1e6:,.2f}", f"{measured / 1e6:,.2f}", off)
    other = result["other"]
    table.add_row("other", "", f"{other['bytes'] / 1e6:,.2f}", f"{other['share']:.1%} of all")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where a cell failed or is not close enough."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__.split("\n")[0])
    default = ("demo", "135m")
    parser.add_argument("--shape", choices=["demo", *SHAPES], action="append", help=f"if not {', '.join(default)}")
    parser.add_argument("--model", metavar="PATH", help="a checkpoint of that shape, instead of random bytes")
    parser.add_argument("--out", metavar="FILE", help="instead of results/ledger.json")
    parsed = parser.parse_args(argv)
    if parsed.model and len(parsed.shape or default) != 1:
        parser.error("--model needs one --shape, the checkpoint's")
    try:
        return _run(parsed.shape or default, parsed.model, parsed.out)
    except UserError as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 1


def _run(names: Sequence[str], model: str | None, out: str | None) -> int:
    """Measure the cells of these shapes; 1 where one failed or is not close enough."""
    check_result("ledger", out)
    for name in names:
        sizes_of(name, model)  # a wrong model is no failure of a cell, which would be written over its figures
    console, failed, parts = Console(), 0, {}
    for name in names:
        for cell in cells(name):
            parts[cell.name] = result = measure(cell, model or ("demo" if name == "demo" else None))
            show(result, console)
            close = "error" not in result and abs(result["totals"]["difference"]) <= CLOSE
            failed += not (close and result["other"]["share"] <= OTHER)
            write_result("ledger", {"parts": parts}, out)  # at once: a run that is stopped keeps what it has
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
