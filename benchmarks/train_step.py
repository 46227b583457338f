"""A whole QLoRA step against transformers + peft + bitsandbytes: python -m benchmarks.train_step

Each cell is a batch and a dtype. First every variant of both sides is screened alone: a warm-up and two steps. Then the
fastest of each run in turns, which gives the speed, and with them the fastest of each that torch's compiler has not
touched; the peer's leanest and ours with the same checkpointing give the memory. A peer whose losses are not ours
did other work and is out of the comparison. For random tokens one more runs in turn, which does only what every step
has to do, with torch's products and attention: the most that a ratio could be.

    4x256, 1x1024    random tokens, each of them a target
    instructions     real samples of unlike lengths: ours in packed rows, the peer's padding-free or padded, the same
                     samples in the same step; only real tokens count; the peer's fastest padding-free one runs, too
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.contestants import ALPHA, RANK
from benchmarks.feeds import Feed, save_samples
from benchmarks.harness import (
    Contestant,
    Record,
    check_result,
    machine,
    race,
    ratio,
    ratio_text,
    row,
    same_losses,
    screen,
    show,
    started,
    write_result,
)
from benchmarks.instructions import distribution, instruction_samples
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.shapes import qlora_step_flops, shape
from minilora.data.pack import epoch_rows
from minilora.errors import UserError

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
FIRST_RTOL = {"float32": 1e-5, "bfloat16": 3e-4}  # of the first losses of both sides; other tokens' differ by 4e-3
RTOL = {"float32": 1e-4, "bfloat16": 5e-3}  # of those after updates, which rounding drives apart
SLOW_S = 20.0  # a first step that takes longer needs no second one to be screened
STEP_CAP_S = 3600.0
HOPELESS = 10.0  # times the fastest step so far, and a minute at least: no screening waits longer for one
COMPILED = ", compiled"  # in the name of what torch's compiler has touched
N_ROWS = 6  # packed rows of docstrings that the steps go round


@dataclass(frozen=True)
class Cell:
    """What is measured. rows x length tokens a step; with `samples`, one row of real samples."""

    shape: str
    dtype: str
    rows: int
    length: int
    samples: bool = False
    quick: bool = False  # one variant of each side, few samples: to see that all of it runs

    @property
    def contents(self) -> str:
        return "instructions" if self.samples else f"{self.rows}x{self.length}"


def cells() -> dict[str, Cell]:
    """All cells by name, those in bfloat16, which are slow without its instructions, last."""
    found = {}
    for short, dtype in DTYPES.items():
        for cell in (Cell("135m", dtype, 4, 256), Cell("135m", dtype, 1, 1024), Cell("135m", dtype, 1, 1024, True)):
            found[f"{cell.contents}-{short}"] = cell
    return found


QUICK = {
    "quick": Cell("tiny", "float32", 2, 32, quick=True),
    "quick-instructions": Cell("tiny", "float32", 1, 256, samples=True, quick=True),
}


# -- contestants of a cell ---------------------------------------------------------------------------------------------


def our_variants(cell: Cell, base: str, feed: Feed) -> dict[str, Contestant]:
    """minilora with and without activation checkpointing; and compiled, for speed."""
    found = {}
    for checkpointing, compiled in ((False, False),) if cell.quick else ((False, False), (True, False), (False, True)):
        name = "minilora" + ", checkpointing" * checkpointing + COMPILED * compiled
        arguments = {
            "base": base, "dtype": cell.dtype, "feed": feed, "checkpointing": checkpointing, "compiled": compiled,
        }  # fmt: skip
        found[name] = Contestant(name, "benchmarks.contestants:ours", arguments)
    return found


def peer_variants(cell: Cell, base: str, feed: Feed) -> dict[str, Contestant]:
    """{sdpa, eager} x {checkpointing off, on} x {plain, prepared}; real samples flat, and padded (sdpa).

    For speed, of sdpa without checkpointing, also each layer compiled; in bf16 cells both under autocast, too, and
    prepared with float32 as the compute dtype of the 4-bit layers, which a user whose CPU has no bf16 instructions
    would set. What may be fastest comes first.
    """
    forms = ("flat", "padded") if cell.samples else ("rows",)
    ways = [
        {"form": form, "attention": attention, "checkpointing": checkpointing, "prepared": prepared}
        for form, attention, checkpointing, prepared in product(forms, ("sdpa", "eager"), (False, True), (False, True))
        if not (form == "padded" and attention == "eager")
    ]
    fast = [way for way in ways if way["attention"] == "sdpa" and not way["checkpointing"]]
    plain = fast if cell.dtype == "float32" else [*fast, *(way | {"autocast": True} for way in fast)]
    first = plain + [way | {"compiled": True} for way in plain]
    if cell.dtype != "float32":
        wide = [way | {"compute": "float32"} for way in ways if way["attention"] == "sdpa" and way["prepared"]]
        wide += [way | {"compiled": True} for way in wide if not way["checkpointing"]]
        first = wide + first  # before all others, which are measured by their speed where bf16 is slow
    ways = ways[:1] if cell.quick else first + [way for way in ways if way not in fast]
    found = {}
    for way in ways:
        name = f"peft, {way['attention']}"
        name += ", checkpointing" if way["checkpointing"] else ""
        name += ", prepared" if way["prepared"] else ""
        name += ", computes in float32" if "compute" in way else ""
        name += ", autocast" if "autocast" in way else ""
        name += COMPILED if "compiled" in way else ""
        name += f", {way['form']}" if cell.samples else ""
        arguments = {"base": base, "dtype": cell.dtype, "feed": feed, **way}
        found[name] = Contestant(name, "benchmarks.contestants:peer", arguments)
    return found


def make_feed(cell: Cell, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the feed, what the result says of it)."""
    vocab_size = shape(cell.shape).vocab_size
    if not cell.samples:
        return {"rows": cell.rows, "length": cell.length, "vocab_size": vocab_size}, {}
    samples = instruction_samples(cell.length, limit=60 if cell.quick else None)
    file = folder / "samples.npz"
    save_samples(samples, file)
    steps = epoch_rows([sample.length for sample in samples], cell.length, seed=0, epoch=0)[:N_ROWS]
    feed = {"samples": str(file), "steps": steps, "max_seq_len": cell.length}
    about = {**distribution(samples), "steps": [[samples[i].length for i in step] for step in steps]}
    return feed, {"samples": about}


# -- a cell ------------------------------------------------------------------------------------------------------------


def measure(cell: Cell, rounds: int, cap_s: float, console: Console) -> dict[str, Any]:
    """All figures of a cell. cap_s: no further screening begins after 2/3 of it, no further pair after all of it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        make_checkpoint(shape(cell.shape), base)
        feed, about = make_feed(cell, Path(name))
        ours, peers = our_variants(cell, str(base), feed), peer_variants(cell, str(base), feed)
        if cell.quick:  # nothing to choose between: the race tells all
            with started([*ours.values(), *peers.values(), *_shared(cell, feed)]) as entrants:
                fastest = race(entrants, rounds)
            records = {record.name: record for record in fastest}
        else:
            about["matmul_ceiling"] = _ceilings(console)
            records = _screen_all([*ours.values(), *peers.values()], start + cap_s * 2 / 3, console)
            fastest = _race_of_the_fastest(cell, feed, records, ours, peers, rounds, start + cap_s)
    report = _report(cell, records, list(ours), list(peers), fastest)
    return report | about | {"seconds_in_all": time.monotonic() - start}


def _shared(cell: Cell, feed: Feed) -> list[Contestant]:
    """What both sides have to do, where it is the same in each step."""
    arguments = {"dtype": cell.dtype, "feed": feed, "shape_name": cell.shape}
    return [] if cell.samples else [Contestant("shared work", "benchmarks.contestants:shared_work", arguments)]


def _race_of_the_fastest(
    cell: Cell,
    feed: Feed,
    records: Mapping[str, Record],
    ours: Mapping[str, Contestant],
    peers: Mapping[str, Contestant],
    rounds: int,
    deadline: float,
) -> list[Record]:
    """The fastest of ours and of the peers that do the same work, what they share, the fastest that are not compiled,
    and of the peers the fastest without padding, in turns; none where there are no such two."""
    agree = _agreeing(cell, records, ours, peers)
    if not agree:
        return []
    own = _agreeing(cell, records, ours, ours)
    pair = [ours[_fastest(records, own)], peers[_fastest(records, agree)]]
    sides = (ours, own), (peers, agree)
    plain = [side[_fastest(records, some)] for side, names in sides if (some := list(filter(_is_plain, names)))]
    flat = list(filter(_is_flat, agree))
    rest = {contestant.name: contestant for contestant in plain}
    rest |= {name: peers[name] for name in ([_fastest(records, flat)] if flat else [])}
    is_slow = any(records[contestant.name].seconds > SLOW_S for contestant in pair)
    with started([*pair, *_shared(cell, feed), *(c for c in rest.values() if c not in pair)]) as entrants:
        left = max(0.0, deadline - time.monotonic())
        return race(entrants, rounds, 0 if is_slow else 2, left, STEP_CAP_S)


def _screen_all(contestants: Sequence[Contestant], deadline: float, console: Console) -> dict[str, Record]:
    """Each alone. One whose step is hopelessly slow is given up; one whose turn comes too late is not run."""
    records: dict[str, Record] = {}
    for contestant in contestants:
        if time.monotonic() > deadline:
            record = Record(contestant.name, error="not run: the time of this cell was used up")
        else:
            fastest = min((found.seconds for found in records.values() if found.steps), default=inf)
            record = screen(contestant, 2, SLOW_S, min(STEP_CAP_S, max(60.0, HOPELESS * fastest)))
        records[contestant.name] = record
        said = f"{record.seconds:.2f} s, {record.peak_bytes / 1e9:.2f} GB" if record.steps else record.error
        console.print(f"  {contestant.name}: {said}", markup=False, highlight=False)
    return records


def _ceilings(console: Console) -> dict[str, Any]:
    """torch's own matrix products on this machine, now: GFLOP/s by dtype."""
    found: dict[str, Any] = {}
    for dtype in DTYPES.values():
        contestant = Contestant(f"matmul {dtype}", "benchmarks.contestants:matmul_ceiling", {"dtype": dtype})
        with started([contestant]) as entrants:
            [record] = race(entrants, rounds=3, watch=False)
        rates = [step.result["gflop_per_s"] for step in record.steps]
        found[f"{dtype}_gflop_per_s"] = max(rates) if rates else {"error": record.error}
    console.print(f"  {found}", markup=False, highlight=False)
    return found


def _agreeing(
    cell: Cell, records: Mapping[str, Record], ours: Mapping[str, Any], peers: Mapping[str, Any]
) -> list[str]:
    """Those of `peers` that can be compared: they ran, with the losses, step by step, of our first that ran."""
    of_ours = next((losses for name in ours if (losses := records[name].losses)), [])
    return [name for name in peers if _are_equal(cell, of_ours, records[name].losses)]


def _are_equal(cell: Cell, ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return same_losses(ours, theirs, FIRST_RTOL[cell.dtype], RTOL[cell.dtype])


def _is_plain(name: str) -> bool:
    return COMPILED not in name


def _is_flat(name: str) -> bool:
    return name.endswith(", flat")


def _fastest(records: Mapping[str, Record], names: Iterable[str]) -> str:
    return min(names, key=lambda name: records[name].seconds if records[name].steps else inf)


def _leanest(records: Mapping[str, Record], names: Sequence[str]) -> str:
    return min(names, key=lambda name: records[name].peak_bytes if records[name].steps else inf)


# -- the report of a cell ----------------------------------------------------------------------------------------------


def _report(
    cell: Cell, records: Mapping[str, Record], ours: list[str], peers: list[str], fastest: Sequence[Record]
) -> dict[str, Any]:
    agree = _agreeing(cell, records, dict.fromkeys(ours), dict.fromkeys(peers))
    losses = {
        name: record.first.result["loss"]
        for name, record in records.items()
        if record.first and "loss" in record.first.result
    }
    report: dict[str, Any] = {
        "cell": asdict(cell) | {"lora_rank": RANK, "lora_alpha": ALPHA},
        "variants": {name: record.figures() for name, record in records.items()},
        "first_losses": losses,
        "loss_rtol": {"first": FIRST_RTOL[cell.dtype], "later": RTOL[cell.dtype]},
        "left_out_for_another_loss": [name for name in peers if records[name].steps and name not in agree],
        "rows": [],
    }
    if len(fastest) < 2 or not all(record.steps for record in fastest[:2]) or not agree:
        failed = [f"{record.name}: {record.error}" for record in fastest if record.error]
        return report | {"error": "; ".join(failed) or "no pair of equal losses to compare"}
    mine, peer, *others = fastest
    if not _are_equal(cell, mine.losses, peer.losses):
        return report | {"error": f"{mine.name} and {peer.name} came to other losses in the race"}
    shared = others.pop(0) if others and not cell.samples else None
    report["speed"] = _speed(cell, mine, peer, shared) | {"not_compiled": _not_compiled([mine, peer, *others], ours)}
    if flat := [record for record in (peer, *others) if record.steps and _is_flat(record.name)]:
        unpadded = min(flat, key=lambda record: record.seconds)
        report["speed"]["padding_free"] = {"ratio": ratio(mine, unpadded), "peer": _rate(unpadded)}
    report["memory"] = _memory(records, ours, agree)
    report["rows"] = _rows(cell, report["speed"], report["memory"])
    return report


def _speed(cell: Cell, ours: Record, peer: Record, shared: Record | None = None) -> dict[str, Any]:
    speed: dict[str, Any] = {"ratio": ratio(ours, peer), "same_losses": _losses_agree(ours, peer)}
    if shared and not shared.steps:
        speed["shared_work"] = {"error": shared.error}
    elif shared:
        rate = cell.rows * cell.length / shared.seconds
        speed["shared_work"] = {"ratio": ratio(shared, peer), "tok_per_s": rate, **shared.figures()}
    speed |= {side: _rate(record) for side, record in (("ours", ours), ("peer", peer))}
    if not cell.samples:
        gflop = qlora_step_flops(shape(cell.shape), cell.rows, cell.length) / 1e9
        speed["model_gflop_per_step"] = gflop
        for side, record in (("ours", ours), ("peer", peer)):
            speed[side]["model_gflop_per_s"] = gflop / record.seconds
    return speed


def _not_compiled(fastest: Sequence[Record], ours: Sequence[str]) -> dict[str, Any]:
    """Ours and the peer's fastest that torch's compiler has not touched; and against that peer our fastest of all."""
    plain = [record for record in fastest if record.steps and _is_plain(record.name)]
    mine, peer = (next((record for record in plain if (record.name in ours) == own), None) for own in (True, False))
    if mine is None or peer is None:
        return {"error": "one of the two did not run"}
    found: dict[str, Any] = {"ratio": ratio(mine, peer), "ratio_of_our_fastest": ratio(fastest[0], peer)}
    return found | {"ours": _rate(mine), "peer": _rate(peer)}


def _rate(record: Record) -> dict[str, Any]:
    rate = median(step.result["tokens"] / step.seconds for step in record.steps)
    return {"variant": record.name, "tok_per_s": rate, **record.figures()}


def _losses_agree(ours: Record, peer: Record) -> dict[str, Any]:
    """The losses step by step, after updates too: equal losses need equal gradients."""
    pairs = [(a.result["loss"], b.result["loss"]) for a, b in zip(ours.steps, peer.steps, strict=False)]
    off = max(abs(a - b) / abs(a) for a, b in pairs)
    return {"ours": [a for a, _ in pairs], "peer": [b for _, b in pairs], "largest_relative_difference": off}


def _memory(records: Mapping[str, Record], ours: list[str], agree: list[str]) -> dict[str, Any]:
    """The leanest peer against ours with the same checkpointing; and against our leanest."""
    ran = [name for name in ours if records[name].steps]
    lean = _leanest(records, agree)
    same = next((name for name in ran if ("checkpointing" in name) == ("checkpointing" in lean)), ran[0])
    ours_lean = _leanest(records, ran)
    peaks = {name: records[name].peak_bytes for name in (lean, same, ours_lean)}
    return {
        "peer": {"variant": lean, "peak_private_bytes": peaks[lean]},
        "ours": {"variant": same, "peak_private_bytes": peaks[same]},
        "ours_leanest": {"variant": ours_lean, "peak_private_bytes": peaks[ours_lean]},
        "ratio": peaks[lean] / peaks[same],
        "ratio_of_leanest": peaks[lean] / peaks[ours_lean],
    }


def _rows(cell: Cell, speed: Mapping[str, Any], memory: Mapping[str, Any]) -> list[dict[str, str]]:
    batch = f"docstrings, rows of {cell.length}" if cell.samples else f"{cell.rows} x {cell.length} tokens"
    what = f"QLoRA step, {cell.shape}, {batch}, {cell.dtype}"
    rates = {side: f"{speed[side]['tok_per_s']:.0f} tokens/s" for side in ("ours", "peer")}
    peaks = {side: f"{memory[side]['peak_private_bytes'] / 1e9:.2f} GB" for side in ("ours", "peer")}
    rows = [
        row(what, **rates, ratio=ratio_text(speed["ratio"])),
        row(f"{what}: peak memory", **peaks, ratio=f"{memory['ratio']:.2f}"),
    ]
    plain = speed["not_compiled"]
    if "error" not in plain and any(plain[side]["variant"] != speed[side]["variant"] for side in ("ours", "peer")):
        told = {side: f"{plain[side]['tok_per_s']:.0f} tokens/s" for side in ("ours", "peer")}
        rows.append(row(f"{what}: neither compiled", **told, ratio=ratio_text(plain["ratio"])))
    if (flat := speed.get("padding_free")) and flat["peer"]["variant"] != speed["peer"]["variant"]:
        told = {"ours": rates["ours"], "peer": f"{flat['peer']['tok_per_s']:.0f} tokens/s"}
        rows.append(row(f"{what}: the peer without padding", **told, ratio=ratio_text(flat["ratio"])))
    if "ratio" in (shared := speed.get("shared_work", {})):
        rates["ours"] = f"{shared['tok_per_s']:.0f} tokens/s"
        rows.append(
            row(f"{what}: were it frozen products and attention alone", **rates, ratio=ratio_text(shared["ratio"]))
        )
    return rows


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="CELL", help=f"some of: {', '.join(cells() | QUICK)}")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of steps in each cell's race")
    parser.add_argument("--cap", type=float, default=1200.0, metavar="SECONDS", help="for each cell, about")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all of it runs")
    parser.add_argument("--out", metavar="FILE", help="instead of results/train_step.json")
    parsed = parser.parse_args(argv)
    if parsed.rounds < 1 or not parsed.cap > 0:
        parser.error("--rounds and --cap must be above 0")
    named = parsed.only or [*QUICK] if parsed.quick else parsed.only or [*cells()]
    if unknown := [name for name in named if name not in cells() | QUICK]:
        parser.error(f"there is no cell {unknown[0]!r}; there are {', '.join(cells() | QUICK)}")
    try:
        if parsed.out or any(not (cells() | QUICK)[name].quick for name in named):
            check_result("train_step", parsed.out)
        return _run(named, parsed.rounds, parsed.cap, parsed.out)
    except UserError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 1


def _run(names: Sequence[str], rounds: int, cap_s: float, out: str | None) -> int:
    """Measure the cells and write each at once, so that a run that is stopped keeps what it has."""
    console = Console()
    parts: dict[str, Any] = {}
    for name in names:
        cell = (cells() | QUICK)[name]
        console.print(name)
        before = machine()  # the load of the machine before ours is on it
        try:
            parts[name] = measure(cell, rounds, cap_s, console) | {"machine": before}
        except (OSError, RuntimeError) as error:
            parts[name] = {"error": f"{type(error).__name__}: {error}"}
        if out or not cell.quick:
            write_result("train_step", {"parts": {name: parts[name]}}, out)
    show({"parts": parts})
    return 1 if any("error" in part for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
