"""AdamW's state in 32 and in 8 bits, what is learnt and what it takes: python -m benchmarks.optimizer_state

All weights of the embedded base learn the demo's 2,000 questions, one epoch, by three seeds. Losses are of the
validation file; the table in docs/optimizer_state.md is made of them. Updates are timed in turns.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from benchmarks.harness import ROOT, check_result, write_result
from benchmarks.table import between
from minilora.adamw import FlatAdamW, state_bytes
from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.open import open_checkpoint
from minilora.config import Optimizer, RunConfig
from minilora.demo.story import comparison_config
from minilora.errors import UserError
from minilora.train.loop import fine_tune

PAGE, BEGIN = ROOT / "docs" / "optimizer_state.md", "<!-- measured: by python -m benchmarks.optimizer_state -->"
SEEDS = 3
TURNS = 11  # of the updates that are timed
KINDS: dict[str, Optimizer] = {"32 bits": "adamw", "8 bits": "adamw_8bit"}


class Silent:
    """A reporter that keeps the losses of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def say(self, text: str) -> None:
        pass

    def begin(self, step: int, n_steps: int) -> None:
        pass

    def step(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:  # noqa: ARG002
        self.losses.append(metrics["loss"])

    def end(self) -> None:
        pass


def learnt(config: RunConfig, name: str) -> dict[str, Any]:
    """Losses of a run with the state of that name."""
    reporter = Silent()
    with tempfile.TemporaryDirectory() as folder:
        train = replace(config.train, output=f"{folder}/run", optimizer=KINDS[name])
        run = fine_tune(replace(config, train=train), reporter)
        summary = read_json(run.folder.path / "summary.json")
    return {"validation_loss": summary["after"]["loss"], "training_losses": reporter.losses}


def run_config(seed: int, max_steps: int | None) -> RunConfig:
    config = comparison_config()
    return replace(
        config,
        data=replace(config.data, general=None, test=None),
        train=replace(config.train, strategy="full", lr=3e-4, seed=seed, max_steps=max_steps),
        eval=replace(config.eval, answers=0, samples=0),
    )


def update_times(n: int) -> dict[str, float]:
    """Milliseconds of one update of n numbers on this CPU, medians of turns."""
    groups = {name: {(0.0, 1.0): [nn.Parameter(torch.zeros(n))]} for name in KINDS}
    optimizers = {name: FlatAdamW(groups[name], kind=kind) for name, kind in KINDS.items()}
    taken: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(TURNS):
        for name, optimizer in optimizers.items():
            for gradient in optimizer._gradients:
                gradient.normal_()
            start = time.perf_counter()
            optimizer.step(1e-4)
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(ms) for name, ms in taken.items()}


def table(result: Mapping[str, Any]) -> str:
    """For the chapter."""
    lines = [
        "| state | bytes a number | validation loss, by seed | mean | an update on the CPU |",
        "|---|---|---|---|---|",
    ]
    for name, runs in result["runs"].items():
        losses = [run["validation_loss"] for run in runs]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        ms = f"{result['update_ms'][name]:.0f} ms"
        lines.append(f"| {name} | {result['bytes_a_number'][name]:.3g} | {each} | {mean(losses):.4f} | {ms} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_state", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"if not {SEEDS}; needs --out")
    parser.add_argument("--max_steps", type=int, help="instead of an epoch; needs --out")
    parser.add_argument("--out", metavar="FILE", help="instead of results/optimizer_state.json and the chapter's table")
    parsed = parser.parse_args(argv)
    if parsed.seeds < 1 or (parsed.max_steps is not None and parsed.max_steps < 1):
        parser.error("--seeds and --max_steps must be above 0")
    if (parsed.max_steps or parsed.seeds != SEEDS) and not parsed.out:
        parser.error(f"--seeds and --max_steps need --out: the chapter's table is of {SEEDS} seeds and whole epochs")
    try:
        _run(parsed.seeds, parsed.max_steps, parsed.out)
    except UserError as error:
        print(f"optimizer_state: {error}", file=sys.stderr)
        return 1
    return 0


def _run(seeds: int, max_steps: int | None, out: str | None) -> None:
    """Measure and write all of it."""
    check_result("optimizer_state", out)
    began, runs = time.perf_counter(), {name: list[dict[str, Any]]() for name in KINDS}
    for seed in range(seeds):
        for name in KINDS:
            runs[name].append(learnt(run_config(seed, max_steps), name))
            print(f"seed {seed}, {name}: {runs[name][-1]['validation_loss']:.4f}", flush=True)
    n = open_checkpoint("demo").config.n_parameters
    result = {
        "runs": runs,
        "update_ms": update_times(n),
        "bytes_a_number": {name: state_bytes(kind, n) / n for name, kind in KINDS.items()},
        "seconds": time.perf_counter() - began,
    }
    write_result("optimizer_state", {"parts": {"full, the embedded base": result}}, out)
    if not out:
        PAGE.write_text(between(PAGE.read_text(), table(result), BEGIN))
    print(table(result))


if __name__ == "__main__":
    sys.exit(main())
