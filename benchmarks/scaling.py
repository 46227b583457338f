"""Whether cost grows as it should: python -m benchmarks.scaling [--draw]

A QLoRA step of a small Mistral and its attention alone, on a CPU, in three series:

    rows      tokens a second for 1, 2, 4 and 8 rows of one length                   level, once fixed costs are small
    tokens    the most private memory of a step, beside what the ledger predicts     a line in the tokens
    window    time and memory against T under a window W, from W / 2 to 16 W         lines in T beyond W

Beside the windowed attention stands the same under a whole mask, which grows with the square of T. `says` has it in
numbers. Speed and memory are measured in processes of their own, for the second has its allocator give back what is
freed (`benchmarks.ledger`). Writes results/scaling.json and docs/scaling.png; --draw draws what was written.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import LEARNING_RATE
from benchmarks.feeds import random_batch
from benchmarks.harness import RESULTS, ROOT, Contestant, Step, Worker, check_result, machine, write_result
from benchmarks.ledger import ENVIRONMENT, STEP_CAP_S, Cell, _private_now, random_model, run_config
from benchmarks.shapes import shape
from minilora import scratch
from minilora.attention import attend
from minilora.checkpoint.json_file import read_json
from minilora.errors import UserError
from minilora.memory import PeakMemory
from minilora.train.ledger import Ledger
from minilora.train.setup import optimizer_for, settle_heap
from minilora.train.step import LossScale, backward_of, train_step
from minilora.train.strategies import apply_strategy, trainable
from minilora.visible import Pieces, visible

FIGURE = ROOT / "docs" / "scaling.png"
WHOLE = {"shape": "135m", "n_layers": 4, "rows": [1, 2, 4, 8], "length": 512, "shortest": 256, "window": 256}
QUICK = {"shape": "tiny", "n_layers": 1, "rows": [1, 2], "length": 32, "shortest": 16, "window": 32}
TIMES = (0.5, 1, 2, 4, 8, 16)  # T as multiples of the window


# -- in the contestant's process ---------------------------------------------------------------------------------------


def stepping(shape_name: str, n_layers: int) -> Step:
    """A step of (rows, length) under a window, or attention alone; seconds and bytes of it."""
    sizes = replace(shape(shape_name), n_layers=n_layers)
    _step(_Model(shape_name, 1), 1, 32)()  # what libraries take at first use is the process's
    scratch._held.__dict__.clear()
    start = _private_now()
    model = _Model(shape_name, n_layers)

    def step(what: str, rows: int, length: int, window: int | None = None) -> dict[str, Any]:
        model.base.config = replace(sizes, sliding_window=window)
        run = _step(model, rows, length) if what == "step" else _attention(what, model, length, window)
        before, peak = _private_now(), PeakMemory(torch.device("cpu"))
        peak.start()
        seconds = run()
        peak.note()
        found = {"seconds": seconds, "bytes": peak.private - (start if what == "step" else before)}
        if what == "step":
            batch, cell = random_batch(rows, length, sizes.vocab_size), Cell(shape_name, rows, length, "float32")
            ledger = Ledger(run_config(cell), model.base.config, torch.device("cpu"), batch, length)
            found["predicted_bytes"] = sum(n for owner, n in ledger.predict().items() if owner != "process")
        return found

    return step


class _Model:
    """A random base in NF4 with adapters, and what updates them."""

    def __init__(self, shape_name: str, n_layers: int) -> None:
        base = random_model(replace(shape(shape_name), n_layers=n_layers), torch.float32)
        run = run_config(Cell(shape_name, 1, 2, "float32"))
        settle_heap(run.train, ())
        self.base = apply_strategy(base, run).train()
        self.optimizer = optimizer_for(trainable(self.base), run)


def _step(model: _Model, rows: int, length: int) -> Callable[[], float]:
    batch = random_batch(rows, length, model.base.config.vocab_size)
    backward, scale = backward_of(model.base, model.optimizer), LossScale.of(torch.float32)
    settings = (batch.n_targets, LEARNING_RATE, 0.0, scale)
    return _timed(partial(train_step, backward, model.optimizer, [batch], *settings))


def _attention(what: str, model: _Model, length: int, window: int | None) -> Callable[[], float]:
    """Forward and backward of one layer's heads over a row, "in pieces" or under a whole "mask"."""
    sizes, positions = model.base.config, torch.arange(length)[None]
    heads = sizes.n_heads, sizes.n_kv_heads, sizes.n_kv_heads, sizes.n_heads
    q, k, v, dy = (torch.randn(1, length, n, sizes.head_dim) for n in heads)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def both() -> None:
        sees = visible(positions, positions, window) if what == "mask" else Pieces.of((length,), window)
        torch.autograd.grad(attend(q, k, v, sees), inputs, dy)

    return _timed(both)


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        begin = perf_counter()
        work()
        return perf_counter() - begin

    return run


# -- in the parent -----------------------------------------------------------------------------------------------------


def measure(settings: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """The three series, each point the median of `rounds` that go through all points in turn."""
    length, shortest, window, rows = (settings[name] for name in ("length", "shortest", "window", "rows"))
    sizes = [(1, shortest), (2, shortest), *((n, 2 * shortest) for n in rows[1:]), (rows[-1], 4 * shortest)]
    lengths = [int(window * times) for times in TIMES]
    points = {
        "rows": [{"what": "step", "rows": n, "length": length} for n in rows],
        "tokens": [{"what": "step", "rows": n, "length": t} for n, t in sizes],
        "window": [
            {"what": what, "rows": 1, "length": t, "window": window}
            for what in ("step", "pieces", "mask")
            for t in lengths
        ],
    }
    arguments = {"shape_name": settings["shape"], "n_layers": settings["n_layers"]}
    factory = "benchmarks.scaling:stepping"
    with (
        Worker(Contestant("speed", factory, arguments)) as speed,
        Worker(Contestant("memory", factory, arguments, ENVIRONMENT)) as memory,
    ):
        found: dict[str, Any] = {
            name: [point | _measured(memory, point) for point in points[name]] for name in ("tokens", "window")
        }
        found["rows"] = points["rows"]
        for name in ("rows", "window"):
            turns = [[_measured(speed, point)["seconds"] for point in points[name]] for _ in range(rounds + 1)]
            for point, *seconds in zip(found[name], *turns[1:], strict=True):  # the first is a warm-up
                point["seconds"] = median(seconds)
    return found | {"says": says(found)}


def _measured(worker: Worker, point: Mapping[str, Any]) -> dict[str, Any]:
    return worker.step(STEP_CAP_S, watch=False, **point).result


def says(found: Mapping[str, Any]) -> dict[str, float]:
    """In numbers what the series show.

    rows_level: by how much the fastest batch of two rows and more has more tokens a second than the slowest
    rows_line: the largest distance of a step's seconds from a line in the tokens, as a share of it
    tokens_line: the same of its bytes; tokens_ledger: their distance from what is predicted
    ..._slope: exponents of growth in T, from 2 W on; of a whole mask, in memory and in time, to compare
    """
    memory, rates = found["tokens"], [_tokens(point) / point["seconds"] for point in found["rows"]]
    said = {
        "rows_level": max(rates[1:]) / min(rates[1:]) - 1,
        "rows_line": line(*zip(*((_tokens(point), point["seconds"]) for point in found["rows"]), strict=True)),
        "tokens_line": line(*zip(*((_tokens(point), point["bytes"]) for point in memory), strict=True)),
        "tokens_ledger": max(abs(point["predicted_bytes"] / point["bytes"] - 1) for point in memory),
    }
    for what in ("step", "pieces", "mask"):
        beyond = [p for p in found["window"] if p["what"] == what and p["length"] >= 2 * p["window"]]
        for of in ("seconds", "bytes"):
            said[f"{what}_{of}_slope"] = slope([p["length"] for p in beyond], [p[of] for p in beyond])
    return said


def _tokens(point: Mapping[str, Any]) -> int:
    return int(point["rows"] * point["length"])


def line(xs: Sequence[float], ys: Sequence[float]) -> float:
    """How far the farthest point is from the line of least squares, as a share of it."""
    fitted = np.polyval(np.polyfit(xs, ys, 1), xs)
    return float(np.max(np.abs(np.asarray(ys) / fitted - 1)))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """n of y ~ x^n; a constant beside it makes it smaller."""
    return float(np.polyfit([log(x) for x in xs], [log(max(y, 1e-9)) for y in ys], 1)[0])


def draw(result: Mapping[str, Any], file: Path) -> None:
    """The three series, the third in time and in memory."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from minilora.report.plots import BLUE, GREEN, GREY, ORANGE, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        speed, memory, seconds, n_bytes = figure.subplots(2, 2).flat
        rows = result["rows"]
        rates = [_tokens(point) / point["seconds"] for point in rows]
        speed.plot([point["rows"] for point in rows], rates, "o-", color=BLUE)
        speed.set(title="tokens a second", xlabel=f"rows of {rows[0]['length']}", ylim=(0, 1.2 * max(rates)))
        points = sorted(result["tokens"], key=_tokens)
        at = [_tokens(point) for point in points]
        memory.plot(at, [point["bytes"] / 1e9 for point in points], "o", color=BLUE, label="measured")
        memory.plot(at, [point["predicted_bytes"] / 1e9 for point in points], "--", color=ORANGE, label="the ledger")
        memory.set(title="GB of a step", xlabel="tokens", ylim=(0, None))
        memory.legend()
        window = result["window"][0]["window"]
        names = {"step": "a step", "pieces": "attention, a layer", "mask": "the same under a whole mask"}
        for axes, of, unit in ((seconds, "seconds", 1e-6), (n_bytes, "bytes", 1e3)):
            for (what, name), colour in zip(names.items(), (BLUE, GREEN, GREY), strict=True):
                series = [point for point in result["window"] if point["what"] == what]
                values = [point[of] / point["length"] / unit for point in series]
                axes.plot([point["length"] for point in series], values, "o-", color=colour, label=name)
            axes.axvline(window, color=ORANGE, linestyle=":", label=f"the window, {window}")
            title = "microseconds a token" if of == "seconds" else "kB a token"
            axes.set(title=title, xlabel="T", xscale="log", yscale="log")
            axes.set_xticks([point["length"] for point in series], [str(point["length"]) for point in series])
            axes.minorticks_off()
        figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all of it runs")
    parser.add_argument("--draw", action="store_true", help="draw the result that there is")
    parser.add_argument("--out", metavar="FILE", help="instead of results/scaling.json; the figure lies beside it")
    parsed = parser.parse_args(argv)
    if parsed.rounds < 1:
        parser.error("--rounds must be above 0")
    try:
        _run(parsed.rounds, parsed.quick, parsed.draw, parsed.out)
    except UserError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 1
    return 0


def _run(rounds: int, quick: bool, only_draw: bool, out: str | None) -> None:
    """Measure, unless the result that there is shall be drawn; and draw, where there is one."""
    file, figure = (Path(out), Path(out).with_suffix(".png")) if out else (RESULTS / "scaling.json", FIGURE)
    keeps = bool(out) or not quick
    if not only_draw:
        if keeps:
            check_result("scaling", out, parts=False)
        before, settings = machine(), QUICK if quick else WHOLE
        result = measure(settings, rounds) | {"settings": settings, "machine": before}
        if keeps:
            write_result("scaling", {"scaling": result}, out)
        for name, value in result["says"].items():
            print(f"{name:22} {value:.3f}")
    if keeps or only_draw:
        draw(_written(file), figure)


def _written(file: Path) -> dict[str, Any]:
    """The result in a file. Raises UserError for another file, or none."""
    found = read_json(file).get("scaling")
    if not isinstance(found, dict):
        raise UserError(f"{file}: not one of python -m benchmarks.scaling")
    return found


if __name__ == "__main__":
    sys.exit(main())
