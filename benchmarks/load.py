"""Checkpoints to NF4 and back, beside transformers + bitsandbytes: python -m benchmarks.load [--model FOLDER]

    write     a bf16 checkpoint to an NF4 one on the disk: `quantize` / from_pretrained in 4 bit and save_pretrained
    quantize  a bf16 checkpoint to an NF4 model in memory: load_model(quantize="nf4") / from_pretrained in 4 bit
    load      an NF4 checkpoint to a model: load_model / from_pretrained; both read the one that we wrote

Random weights of a shape that fits anywhere; with --model, ours alone also on that checkpoint, such as a real 7B. All
files lie in the page cache but for the first reading of --model. "Beyond" is the most private memory in the very first
step, whose process is fresh, less what it had before and the bytes of the model's tensors; of "write", where ours makes
no model, all of it is told.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import (
    Contestant,
    Record,
    Step,
    check_result,
    machine,
    race,
    ratio,
    ratio_text,
    row,
    show,
    started,
    write_result,
)
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.shapes import SHAPES, shape
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.errors import UserError

WORKS = {
    "write": "bf16 checkpoint to an NF4 checkpoint",
    "quantize": "bf16 checkpoint to an NF4 model",
    "load": "NF4 checkpoint to a model",
}
SIDES = {"minilora": "ours", "transformers + bitsandbytes": "theirs"}


# -- in the contestants' processes -------------------------------------------------------------------------------------


def ours() -> Step:
    def step(work: str, source: str, packed: str, out: str) -> dict[str, Any]:
        if work == "write":
            shutil.rmtree(out, ignore_errors=True)
            quantize_checkpoint(source, out)
            return {"weights_bytes": 0}
        return {"weights_bytes": _tensor_bytes(load_model(packed if work == "load" else source, quantize="nf4"))}

    return step


def theirs() -> Step:
    import transformers
    from bitsandbytes.nn import Linear4bit

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def step(work: str, source: str, packed: str, out: str) -> dict[str, Any]:
        options: dict[str, Any] = {} if work == "load" else {"quantization_config": config}
        model = transformers.MistralForCausalLM.from_pretrained(
            packed if work == "load" else source, dtype=torch.bfloat16, device_map="cpu", **options
        )
        assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 7 * model.config.num_hidden_layers
        if work == "write":
            shutil.rmtree(f"{out}-theirs", ignore_errors=True)
            model.save_pretrained(f"{out}-theirs")
        return {"weights_bytes": _tensor_bytes(model)}

    return step


def _tensor_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, and of what bitsandbytes keeps beside a weight."""
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for state in (getattr(weight, "quant_state", None) for weight in model.parameters()):
        for part in (state, state and state.state2):
            total += part.absmax.nbytes if part else 0
    return total


# -- in the parent -----------------------------------------------------------------------------------------------------


def compare(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Both sides on random weights of the shape `name`, in turns."""
    source = folder / "bf16"
    make_checkpoint(shape(name), source)
    found = measure(source, folder, list(SIDES), rounds, warm_ups=1)
    rows = []
    for work, figures in found["works"].items():
        if "ratio" in figures:
            mine, peer = (_text(work, figures[side]) for side in SIDES)
            rows.append(row(f"{WORKS[work]}, {name}", mine, peer, ratio_text(figures["ratio"])))
    return found | {"shape": name, "rows": rows}


def alone(source: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Ours on a checkpoint that is there."""
    found = measure(source, folder, ["minilora"], rounds, warm_ups=0)
    size = f"{found['weights'] / 1e9:.2g} billion weights"
    rows = [
        row(f"{WORKS[work]}, {size}", _text(work, figures["minilora"]), "", "")
        for work, figures in found["works"].items()
        if "seconds" in figures["minilora"]
    ]
    return found | {"rows": rows}


def measure(source: Path, folder: Path, sides: Sequence[str], rounds: int, warm_ups: int) -> dict[str, Any]:
    """Each work of `sides`, a fresh process for each."""
    weights = open_checkpoint(source).config.n_parameters
    paths: dict[str, Any] = {"source": str(source), "packed": str(folder / "out"), "out": str(folder / "out")}
    works: dict[str, Any] = {}
    for work in WORKS:
        contestants = [Contestant(side, f"benchmarks.load:{SIDES[side]}") for side in sides]
        with started(contestants) as entrants:
            records = race(entrants, rounds, warm_ups, work=work, **paths)
        works[work] = {record.name: _figures(record, weights) for record in records}
        if len(records) == 2 and all(record.steps for record in records):
            works[work]["ratio"] = ratio(*records)
    return {"weights": weights, "works": works}


def _figures(record: Record, weights: int) -> dict[str, Any]:
    found = record.figures()
    if record.steps and record.first:
        held = int(record.first.result["weights_bytes"])
        found |= {
            "weights_bytes": held,
            "beyond_bytes": record.first.private_bytes - record.rest_bytes - held,
            "weights_per_s": weights / record.seconds,
        }
    return found


def _text(work: str, figures: dict[str, Any]) -> str:
    """One cell of the table."""
    speed = f"{figures['seconds']:.3g} s, {figures['weights_per_s'] / 1e6:,.0f} million weights/s"
    beyond, held = figures["beyond_bytes"], figures["weights_bytes"]
    if work == "write":
        return f"{speed}, {(beyond + held) / 1e9:.2f} GB in all"
    mapped = ", which is mapped" if beyond < -held / 2 < 0 else ""  # from its file, so most of it is not private
    return f"{speed}, {max(0, beyond) / 1e9:.2f} GB beyond the model's{mapped}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.1b", choices=SHAPES, help="of the random weights that both sides take")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="ours also on this; needs 30 %% of its size on the disk"
    )
    parser.add_argument("--only_model", action="store_true", help="ours on --model, and nothing else")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", metavar="FOLDER", help="where files may lie meanwhile, instead of the system's place")
    parser.add_argument("--out", metavar="FILE", help="instead of results/load.json")
    parsed = parser.parse_args(argv)
    if parsed.rounds < 1 or (parsed.only_model and not parsed.model):
        parser.error("--rounds must be above 0, and --only_model needs --model")
    wanted = {} if parsed.only_model else {parsed.shape: partial(compare, parsed.shape)}
    try:
        check_result("load", parsed.out)
        if parsed.model:
            open_checkpoint(parsed.model)  # the race before it takes minutes
            wanted["model"] = partial(alone, parsed.model)
        parts = _run(wanted, parsed.rounds, parsed.work, parsed.out)
    except (UserError, OSError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    show({"parts": parts})
    sides = [side for part in parts.values() for work in part["works"].values() for side in work.values()]
    return 1 if any("error" in side for side in sides) else 0


def _run(
    wanted: Mapping[str, Callable[[Path, int], dict[str, Any]]], rounds: int, work: str | None, out: str | None
) -> dict[str, Any]:
    """Measure the parts and write each at once, so that what goes wrong with the next one leaves it."""
    parts: dict[str, Any] = {}
    before = machine()  # the load of the machine before ours is on it
    for name, measured in wanted.items():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            parts[name] = measured(Path(folder), rounds) | {"machine": before}
        write_result("load", {"parts": {name: parts[name]}}, out)
    return parts


if __name__ == "__main__":
    sys.exit(main())
