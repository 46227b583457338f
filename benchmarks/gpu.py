"""Everything that needs a GPU, in one command: python -m benchmarks.gpu [--only PART ...]

    equality    each kernel against its definition and float64, first: a figure of a wrong kernel is worth nothing
    ceilings    what the card copies and multiplies, by torch
    ops         the ceilings, and each kernel beside bitsandbytes, plain torch and a copy, with its share of them
    train       a QLoRA step of the 7B beside transformers + peft + bitsandbytes, each length a part, and its memory
    decode      generating with the 7B beside transformers + bitsandbytes

Each part is written once it is measured, train and decode after each race; a card has a file of its own, such as
results/gpu_h200.json (results/gpu.json is an H100's). One that fails is told and the next one runs. Needs torch, triton
and numpy, and takes the peers where they are installed; no network. `--dry` runs all of it on a CPU on small data, to
see that it runs.
"""

import argparse
import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_harness import in_turns, matmul_tflop_per_s, n_sets
from benchmarks.harness import check_result, machine, show, write_result
from minilora.errors import UserError

# What a part's function gives: all of it, or again and again what there is so far.
Measure = Callable[[torch.device], dict[str, Any] | Iterator[dict[str, Any]]]


def equality(device: torch.device) -> dict[str, Any]:
    """Every check of `minilora verify kernels`; an error if one failed."""
    from minilora.evaluate.kernel_check import check_kernels
    from minilora.kernels.nf4_matvec import shuffle_is_right

    checks = list(check_kernels(device))
    failed = [check for check in checks if not check.passed]
    found: dict[str, Any] = {
        "checks": len(checks),
        "worst": {check.operation: check.error for check in sorted(checks, key=lambda check: check.error)},
        "failed": [vars(check) for check in failed],
        "shuffle_is_right": device.type == "cuda" and shuffle_is_right(device),
    }
    return found | ({"error": f"{len(failed)} of {len(checks)} checks failed"} if failed else {})


def ceilings(device: torch.device) -> dict[str, Any]:
    """Bytes a second of a copy, read and written, and FLOP a second of a square product in 16 bits."""
    n_bytes = 256 << 20 if device.type == "cuda" else 1 << 16
    sources = torch.empty(n_sets(n_bytes, device), n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(sources[0])
    copies = [partial(target.copy_, source) for source in sources]
    copy = in_turns({"copy": copies}, device)["copy"]
    return {
        "copy_gb_per_s": 2 * n_bytes / copy.median_us / 1e3,
        "matmul_tflop_per_s": matmul_tflop_per_s(device),
        "copy": copy.figures(),
    }


def measured_by(module: str, function: str = "measure", **given: Any) -> Measure:
    """The part that benchmarks/MODULE.py measures: cases by name, whose rows become the part's."""

    def measure(device: torch.device) -> Iterator[dict[str, Any]]:
        from importlib import import_module

        found = getattr(import_module(f"benchmarks.{module}"), function)(device, **given)
        for cases in [found] if isinstance(found, dict) else found:
            without = {what: {key: case[key] for key in case if key != "rows"} for what, case in cases.items()}
            yield {"cases": without, "rows": [line for case in cases.values() for line in case["rows"]]}

    return measure


def so_far(measure: Measure, device: torch.device) -> Iterator[dict[str, Any]]:
    """A part, as often as it has more; one that fails ends with an error beside what there was."""
    part = dict[str, Any]()
    try:
        found = measure(device)
        for part in [found] if isinstance(found, dict) else found:
            yield part
    except Exception as error:
        traceback.print_exc()
        yield part | {"error": f"{type(error).__name__}: {error}"[:500]}


def add_shares(cases: Mapping[str, Any], ceilings: Mapping[str, Any]) -> None:
    """Add `share_of_ceiling` to each case: the least time its bytes and FLOP need at the ceilings over what ours took.

    Where the ceilings could not be measured, nothing.
    """
    if "copy_gb_per_s" in ceilings:
        for case in cases.values():
            rates = ("gb_per_s", "copy_gb_per_s"), ("tflop_per_s", "matmul_tflop_per_s")
            case["share_of_ceiling"] = max(case[ours] / ceilings[most] for ours, most in rates)


PARTS: dict[str, tuple[str, Measure]] = {
    "equality": ("equality", equality),
    "ceilings": ("ceilings", ceilings),
    **{name: ("ops", measured_by(f"nf4_{name}")) for name in ("dequantize", "quantize", "matvec", "matmul")},
    **{name: ("ops", measured_by(name)) for name in ("norm", "rope", "swiglu", "softmax_gradient", "adamw")},
    **{f"train_{length}": ("train", measured_by("gpu_train", length=length)) for length in (512, 1024, 2048)},
    "train_memory": ("train", measured_by("gpu_train", "measure_memory")),
    "decode": ("decode", measured_by("gpu_decode")),
}

AGAIN = ("train_1024", "train_2048")  # which dry are train_512's step


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    kinds = sorted({*PARTS, *(kind for kind, _ in PARTS.values())})
    parser.add_argument("--only", nargs="+", choices=kinds, metavar="PART", help=f"some of: {', '.join(kinds)}")
    parser.add_argument("--dry", action="store_true", help="on a CPU, small: to see that all of it runs")
    parser.add_argument("--out", metavar="FILE", help="instead of results/gpu_CARD.json")
    parsed = parser.parse_args(argv)
    if parsed.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    elif not torch.cuda.is_available():
        print("gpu: there is no GPU; --dry runs all of it on a CPU, small", file=sys.stderr)
        return 1
    device = torch.device("cpu" if parsed.dry else "cuda")
    card = "none, a dry run" if parsed.dry else torch.cuda.get_device_name(device)
    writes, file = bool(parsed.out) or not parsed.dry, file_of(card)
    try:
        if writes:
            check_result(file, parsed.out)
    except UserError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    parts: dict[str, Any] = {}
    of_ceilings = {"ops", *(name for name, (kind, _) in PARTS.items() if kind == "ops")}  # whose shares are of them
    for name, (kind, measure) in PARTS.items():
        if parsed.dry and name in AGAIN and name not in (parsed.only or ()):
            continue
        if parsed.only and not ({name, kind} | (of_ceilings if name == "ceilings" else set())) & set(parsed.only):
            continue
        start = time.monotonic()
        for part in so_far(measure, device):
            parts[name] = part
            if kind == "ops" and "cases" in part:
                add_shares(part["cases"], parts.get("ceilings", {}))
            part |= {"seconds_in_all": time.monotonic() - start, "machine": machine() | {"gpu": card}}
            if writes:
                write_result(file, {"parts": {name: part}}, parsed.out)
        print(f"{name}: {parts[name]['seconds_in_all']:.0f} s", flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # the processes of what follows need the room
    show({"parts": parts})
    return 1 if any(map(_failed, parts.values())) else 0


def file_of(card: str) -> str:
    """The result's name: figures of unlike cards don't mix."""
    return "gpu_" + re.sub(r"\W+", "_", card.lower()).removeprefix("nvidia_")


def _failed(part: Mapping[str, Any]) -> bool:
    """The whole part, or ours in one of its cases."""
    cases = part.get("cases", {}).values()
    ours = (case.get("sides", case).get("minilora", case) for case in cases)
    return "error" in part or any("error" in figures for figures in ours)


if __name__ == "__main__":
    sys.exit(main())
