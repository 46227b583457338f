"""NF4 against bitsandbytes' CPU code, one operation at a time: python -m benchmarks.nf4_cpu

    decode        to float32 and bfloat16, absmax plain and in 8 bits ("nested"), as each does it within a training
                  step: ours into memory that is used again, theirs into new memory (its CPU code takes no `out`)
    dequantize    the same with new memory on both sides, whose mapping takes longer than the decoding
    linear        y = x W'^T for M = 512 rows of x, W in NF4, nested
    quantize      from bfloat16, plain and nested

Ours as it stands and, but for quantizing, as a run with `train.compile` has it, its decoding one compiled loop.

Both sides work on the same weight. Ours keeps what it frees, as `minilora train` does: a result of less than 32 MB lies
in memory that was there before. Before anything is timed, one process with both libraries checks that they do the same:
packed bytes and absmax equal, dequantized values equal.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.harness import (
    Contestant,
    ContestantError,
    Entrant,
    Step,
    Worker,
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
from minilora.compiled import compile_loops
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.nf4 import quantize_nf4
from minilora.scratch import keep_freed_memory

SHAPES = ((4096, 4096), (14336, 4096))  # (out, in): an attention projection of the 7B, and its gate
M = 512  # rows of x: a short prompt, or a small micro-batch
QUICK_SHAPES = ((128, 256),)
STORAGES = {"plain": False, "nested": True}
DTYPES = ("float32", "bfloat16")

SIDES = {"minilora": "ours", "minilora, compiled": "ours_compiled", "bitsandbytes": "bitsandbytes"}

Operation = Callable[[], object]


def cases(shapes: Sequence[tuple[int, int]]) -> list[str]:
    """Names of all that is timed; a name says operation, dtype or storage, and shape."""
    found = []
    for out, in_ in shapes:
        for operation in ("decode", "dequantize"):
            found += [f"{operation} {dtype} {storage} {out}x{in_}" for dtype in DTYPES for storage in STORAGES]
        found += [f"linear {dtype} nested {out}x{in_}" for dtype in DTYPES]
        found += [f"quantize bfloat16 {storage} {out}x{in_}" for storage in STORAGES]
    return found


# -- in the contestants' processes -------------------------------------------------------------------------------------


def ours() -> Step:
    keep_freed_memory(large_pages=True)  # as a run does where memory is plentiful
    return _in_turn(_our_operation)


def ours_compiled() -> Step:
    compile_loops(True)
    return ours()


def bitsandbytes() -> Step:
    return _in_turn(_their_operation)


def _in_turn(make: Callable[[str, torch.dtype, bool, Tensor], Operation]) -> Step:
    """A step runs the named case. What it needs is made when the case is new, in a step that is a warm-up."""
    ready: dict[str, Operation] = {}

    def step(case: str) -> None:
        if case not in ready:
            operation, dtype, storage, size = case.split()
            out, in_ = map(int, size.split("x"))
            ready.clear()
            ready[case] = make(operation, getattr(torch, dtype), STORAGES[storage], _weight(out, in_))
        ready[case]()

    return step


def _weight(out: int, in_: int) -> Tensor:
    return torch.empty(out, in_).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def _x(in_: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(M, in_).normal_(generator=torch.Generator().manual_seed(1)).to(dtype)


def _our_operation(operation: str, dtype: torch.dtype, nested: bool, weight: Tensor) -> Operation:
    if operation == "quantize":
        return lambda: quantize_nf4(weight, double_quant=nested)
    packed = quantize_nf4(weight, double_quant=nested)
    if operation == "decode":
        buffer = torch.empty(packed.shape, dtype=dtype)
        return lambda: packed.dequantize(dtype, out=buffer)
    if operation == "dequantize":
        return lambda: packed.dequantize(dtype)
    layer, x = NF4Linear(packed), _x(weight.shape[1], dtype)
    return lambda: layer(x)


def _their_operation(operation: str, dtype: torch.dtype, nested: bool, weight: Tensor) -> Operation:
    import bitsandbytes.functional as bnb

    if operation == "quantize":
        return lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    if operation in ("decode", "dequantize"):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        state.dtype = dtype  # what dequantize_4bit decodes to
        return lambda: bnb.dequantize_4bit(packed, state)
    layer, x = _their_layer(weight, dtype, nested), _x(weight.shape[1], dtype)
    return lambda: layer(x)


def _their_layer(weight: Tensor, dtype: torch.dtype, nested: bool) -> torch.nn.Module:
    """Linear4bit in train mode; in eval mode it would repack the weight where the CPU has AVX512_BF16."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    out, in_ = weight.shape
    layer = Linear4bit(in_, out, bias=False, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    trained: torch.nn.Module = layer.to("cpu").train()
    return trained


def check() -> Step:
    """Both libraries in one process: a step returns what differs between them for a weight's shape."""
    import bitsandbytes.functional as bnb

    def step(out: int, in_: int) -> dict[str, Any]:
        weight = _weight(out, in_)
        plain, nested = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
        _, nested_state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(plain.packed, packed.view(-1)), "packed bytes differ"
        assert torch.equal(plain.absmax, state.absmax), "absmax differs"
        for dtype in (torch.float32, torch.bfloat16):
            state.dtype = nested_state.dtype = dtype
            assert torch.equal(plain.dequantize(dtype), bnb.dequantize_4bit(packed, state)), f"{dtype} values differ"
        nested_state.dtype = torch.float32
        theirs = bnb.dequantize_4bit(packed, nested_state)
        off = float((nested.dequantize(torch.float32) - theirs).abs().max() / theirs.abs().max())
        # Their 8-bit codes go through a table and are one level off here and there (minilora/dynamic_8bit.py).
        assert off < 0.02, f"nested values differ by {off:.2g} of the largest"
        return {"nested_largest_difference": off}

    return step


# -- in the parent -----------------------------------------------------------------------------------------------------


def measure(shapes: Sequence[tuple[int, int]], rounds: int, cap_s: float, console: Console) -> dict[str, Any]:
    """Check, then time every case, both sides in turns. Raises ContestantError if they do not do the same."""
    equal: dict[str, Any] = {}
    with Worker(Contestant("check", "benchmarks.nf4_cpu:check")) as checker:
        for out, in_ in shapes:
            equal[f"{out}x{in_}"] = checker.step(out=out, in_=in_).result
    sides = [Contestant(name, f"benchmarks.nf4_cpu:{factory}") for name, factory in SIDES.items()]
    figures: dict[str, Any] = {}
    with started(sides) as entrants:
        for case in cases(shapes):
            figures[case] = _case(case, entrants, rounds, cap_s)
            console.print(case, *(f"{_ms(found)} ms" for found in figures[case]["sides"].values()), highlight=False)
    rows = [
        _row(case, side, found) for case, found in figures.items() for side in found["ratios"] if " nested " in case
    ]
    return {"equal_to_bitsandbytes": equal, "cases": figures, "rows": rows, "linear_rows": M}


def _case(case: str, entrants: Sequence[Entrant], rounds: int, cap_s: float) -> dict[str, Any]:
    """The times of each side, and for each of ours how many times as fast as the peer it is."""
    racing = [entrant for entrant in entrants if "compiled" not in entrant.name or not case.startswith("quantize")]
    *ours, peer = race(racing, rounds, 2, cap_s, watch=False, case=case)
    sides = {record.name: _times(record.figures()) for record in (*ours, peer)}
    ratios = {record.name: ratio(record, peer) for record in ours if record.steps and peer.steps}
    return {"sides": sides, "ratios": ratios}


def _row(case: str, side: str, found: dict[str, Any]) -> dict[str, str]:
    operation, dtype, _, size = case.split()
    what = {
        "decode": f"NF4 to {dtype}",
        "dequantize": f"NF4 to new {dtype} memory",
        "linear": f"NF4 linear, {dtype}, {M} rows",
        "quantize": f"{dtype} to NF4",
    }
    said = f"{what[operation]}, {size.replace('x', ' x ')}{side.removeprefix('minilora')}"
    ours, peer = (f"{_ms(found['sides'][one])} ms" for one in (side, "bitsandbytes"))
    return row(said, ours, peer, ratio_text(found["ratios"][side]))


def _ms(figures: dict[str, Any]) -> str:
    if "seconds" not in figures:
        return "-"
    ms = 1000 * figures["seconds"]
    return f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"


def _times(figures: dict[str, Any]) -> dict[str, Any]:
    """Without memory, which was not watched."""
    return {name: value for name, value in figures.items() if "bytes" not in name}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nf4_cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="pairs of each case")
    parser.add_argument("--cap", type=float, default=60.0, metavar="SECONDS", help="for each case")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, to see that all of it runs")
    parser.add_argument("--out", metavar="FILE", help="instead of results/nf4_cpu.json")
    parsed = parser.parse_args(argv)
    if parsed.rounds < 1:
        parser.error("--rounds must be above 0")
    before, keeps = machine(), bool(parsed.out) or not parsed.quick
    try:
        if keeps:
            check_result("nf4_cpu", parsed.out, parts=False)
        result = measure(QUICK_SHAPES if parsed.quick else SHAPES, parsed.rounds, parsed.cap, Console())
    except (ContestantError, UserError) as error:
        print(f"nf4_cpu: {error}", file=sys.stderr)
        return 1
    if keeps:
        write_result("nf4_cpu", result | {"machine": before}, parsed.out)
    show(result)
    return 1 if any("error" in side for case in result["cases"].values() for side in case["sides"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
