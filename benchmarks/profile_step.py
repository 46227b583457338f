"""Where the seconds of our QLoRA step go: python -m benchmarks.profile_step

One step under torch's profiler, each operation's own time given to a group by where it was called from, its name and
its shapes. Beside it stands what the step's matrix products alone would take at the rate that torch's own product
reaches on this machine, in the step's dtype or in float32 (`ceiling`): what is above it is there to be won. Writes the
result and docs/profile_step.png; --draw makes the figure anew of the result that is there.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import RANK, ours
from benchmarks.feeds import Feed
from benchmarks.harness import (
    RESULTS,
    ROOT,
    Contestant,
    ContestantError,
    Step,
    Worker,
    check_result,
    machine,
    write_result,
)
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.shapes import qlora_step_flops, shape
from minilora.adamw import FlatAdamW
from minilora.attention import attend_back, attend_kept
from minilora.checkpoint.json_file import read_json
from minilora.errors import UserError
from minilora.loss import cross_entropy_sum
from minilora.nf4 import NF4Tensor

STEP_CAP_S = 3600.0  # a bf16 step takes minutes on a CPU that has no instructions for it
DTYPES = ("float32", "bfloat16")
FIGURE = ROOT / "docs" / "profile_step.png"
GROUPS = {
    "frozen weights": "#4269d0",
    "head and loss": "#6cc5b0",
    "attention": "#efb118",
    "LoRA products": "#3ca951",
    "dequantize": "#ff725c",
    "elementwise": "#a463f2",  # norms, rotary embedding, SwiGLU, residual sums, casts
    "optimizer": "#9c6b4e",
    "rest": "#c9ccd1",  # Python, autograd's bookkeeping, the profiler itself
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "aten::_mm", "mkldnn::")


# -- in the contestant's process ---------------------------------------------------------------------------------------


def profiled(base: str, dtype: str, feed: Feed, vocab_size: int) -> Step:
    """Our step; with profile=True it returns its seconds by group."""
    _name_ranges()
    step = ours(base, dtype, feed, checkpointing=False)

    def run(profile: bool) -> dict[str, Any]:
        if not profile:
            return dict(step() or {})
        for _ in range(2):  # in the first the profiler's memory is new, and the step's for it
            start = perf_counter()
            with torch.profiler.profile(record_shapes=True) as profiler:
                step()
                seconds = perf_counter() - start
        groups = dict.fromkeys(GROUPS, 0.0)
        for event in profiler.events() or []:
            groups[_group(event, vocab_size)] += event.self_cpu_time_total / 1e6
        groups["rest"] += max(0.0, seconds - sum(groups.values()))
        return {"groups": groups, "profiled_seconds": seconds}

    return run


def _name_ranges() -> None:
    """Put the profiler's names around the functions whose inside looks like any other operation."""
    labels = (attend_kept, "attention"), (attend_back, "attention"), (cross_entropy_sum, "head and loss")
    for function, label in labels:
        named = _named(label, function)
        for module in [module for name, module in sys.modules.items() if name.startswith("minilora.")]:
            if getattr(module, function.__name__, None) is function:  # each module that imported it
                setattr(module, function.__name__, named)
    for method in ("dequantize", "decode"):  # of a whole weight, of some of its rows
        setattr(NF4Tensor, method, _named("dequantize", getattr(NF4Tensor, method)))
    for method in ("zero_grad", "grad_norm", "step"):
        setattr(FlatAdamW, method, _named("optimizer", getattr(FlatAdamW, method)))


def _named(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(label):
            return function(*args, **kwargs)

    return call


def _group(event: Any, vocab_size: int) -> str:
    """The group of an operation's own time."""
    around = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        around.append(parent.name)
        parent = parent.cpu_parent
    names = " ".join(around)
    if "optimizer" in around:
        return "optimizer"
    if "attention" in around or "scaled_dot_product" in names or "ScaledDotProduct" in names or "bmm" in event.name:
        return "attention"
    if "head and loss" in around or "CrossEntropy" in names:
        return "head and loss"
    if "dequantize" in around:
        return "dequantize"
    if event.name.startswith(PRODUCTS):
        return _product_group(event.input_shapes, vocab_size)
    return "elementwise" if event.name.startswith("aten::") else "rest"


def _product_group(shapes: Sequence[Sequence[int]], vocab_size: int) -> str:
    """A product with the rank among its sizes is an adapter's, one with the vocabulary the head's."""
    sizes = {size for shape_ in shapes if isinstance(shape_, list | tuple) for size in shape_}
    if RANK in sizes:
        return "LoRA products"
    return "head and loss" if vocab_size in sizes else "frozen weights"


# -- in the parent -----------------------------------------------------------------------------------------------------


def measure(shape_name: str, dtypes: Sequence[str], rows: int, length: int, console: Console) -> dict[str, Any]:
    """Groups, plain seconds and ceiling by dtype. A dtype that fails has its error instead."""
    config = shape(shape_name)
    gflop = qlora_step_flops(config, rows, length) / 1e9
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        make_checkpoint(config, base)
        feed = {"rows": rows, "length": length, "vocab_size": config.vocab_size}
        for dtype in dtypes:
            console.print(f"{dtype} ...")
            try:
                found[dtype] = _measure(dtype, str(base), feed, gflop)
            except ContestantError as error:
                found[dtype] = {"error": str(error)}
    return {"shape": shape_name, "batch": [rows, length], "model_gflop_per_step": gflop, "dtypes": found}


def _measure(dtype: str, base: str, feed: dict[str, Any], gflop: float) -> dict[str, Any]:
    rates = {}
    for product in {dtype, "float32"}:  # a CPU without bf16 instructions is faster if it widens first
        with Worker(Contestant("ceiling", "benchmarks.contestants:matmul_ceiling", {"dtype": product})) as worker:
            rates[product] = max(worker.step(watch=False).result["gflop_per_s"] for _ in range(3))
    rate = max(rates.values())
    arguments = {"base": base, "dtype": dtype, "feed": feed, "vocab_size": feed["vocab_size"]}
    with Worker(Contestant("minilora", "benchmarks.profile_step:profiled", arguments)) as worker:
        worker.step(STEP_CAP_S, watch=False, profile=False)
        seconds = worker.step(STEP_CAP_S, watch=False, profile=False).seconds
        profile = worker.step(STEP_CAP_S, watch=False, profile=True).result
    return {
        **profile,
        "seconds": seconds,
        "matmul_gflop_per_s": rates,
        "ceiling_seconds": gflop / rate,
        "share_of_ceiling": gflop / rate / seconds,
    }


def title(dtype: str, figures: dict[str, Any]) -> str:
    """Of a panel, whose bars add up to the second figure."""
    return f"{dtype}: {figures['seconds']:.2f} s a step, {figures['profiled_seconds']:.2f} s under the profiler"


def draw(result: dict[str, Any], file: Path) -> None:
    """Two stacks a dtype: the step's groups, and the ceiling."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from minilora.report.plots import STYLE

    found = {dtype: figures for dtype, figures in result["dtypes"].items() if "groups" in figures}
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.4 + 0.9 * len(found)), layout="constrained")
        FigureCanvasAgg(figure)
        # A panel each: where bf16 is slow, its seconds would make all others too short to be seen.
        for i, (dtype, figures) in enumerate(found.items()):
            axes = figure.add_subplot(len(found), 1, i + 1)
            left = 0.0
            for group, colour in GROUPS.items():
                seconds = figures["groups"][group]
                axes.barh(1, seconds, left=left, color=colour, label=group if i == 0 else None, height=0.7)
                left += seconds
            axes.barh(0, figures["ceiling_seconds"], color="#64748b", height=0.7)
            axes.set_yticks([0, 1], ["products alone", "step"])
            axes.set_title(title(dtype, figures))
            axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds (under the profiler)")
        figure.legend(loc="outside lower center", ncols=4)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata={"Software": None})


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("seconds", *result["dtypes"])
    figures = list(result["dtypes"].values())
    for group in GROUPS:
        table.add_row(group, *(f"{f['groups'][group]:.3f}" if "groups" in f else "-" for f in figures))
    for name in ("profiled_seconds", "seconds", "ceiling_seconds", "error"):
        if any(name in f for f in figures):
            cells = (f.get(name, "-") for f in figures)
            table.add_row(name, *(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="some of them; needs --out")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all of it runs")
    parser.add_argument("--out", metavar="FILE", help="instead of results/profile_step.json; the figure lies beside it")
    parser.add_argument("--draw", action="store_true", help="only the figure, of the result that is there")
    parsed = parser.parse_args(argv)
    figure = Path(parsed.out).with_suffix(".png") if parsed.out else FIGURE
    keeps = bool(parsed.out) or not parsed.quick
    if keeps and not (parsed.out or parsed.draw or {*parsed.dtypes} == {*DTYPES}):
        parser.error("--dtypes needs --out: the result and its figure are of both")
    try:
        if parsed.draw:
            draw(read_json(Path(parsed.out or RESULTS / "profile_step.json")), figure)
            return 0
        if keeps:
            check_result("profile_step", parsed.out, parts=False)
    except UserError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return 1
    console = Console()
    before = machine()
    name, rows, length = ("tiny", 2, 32) if parsed.quick else ("135m", 4, 256)
    result = measure(name, parsed.dtypes, rows, length, console)
    if keeps:
        write_result("profile_step", result | {"machine": before}, parsed.out)
        if any("groups" in figures for figures in result["dtypes"].values()):
            draw(result, figure)
    _show(result, console)
    if errors := [figures["error"] for figures in result["dtypes"].values() if "error" in figures]:
        print(f"profile_step: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
