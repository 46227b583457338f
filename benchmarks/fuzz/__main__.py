"""Spoilt files against every reader: python -m benchmarks.fuzz [FORMAT ...] [--cases 10000] [--seed 0]

Each case is a folder of a format's corpus, mutated (mutate.py), and read in a forked process that is watched from
outside (watch.py). It must end, within a second and 200 MB of new memory, in a load that is what the files say
(formats.py reads them again, by other means) or in our own error, of one printable line. Anything else is a finding:
its folder is written to --findings with what happened, and the exit status is 1. docs/hostile_files.md has the figures.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.formats import FORMATS, Format, refusing
from benchmarks.fuzz.mutate import Folder, Mutated, mutated, write
from benchmarks.fuzz.watch import Outcome, RefusedError, WrongError, outcomes
from benchmarks.harness import RESULTS, ROOT, check_result, write_result

PAGE = ROOT / "docs" / "hostile_files.md"
_KEEP = 3  # reproducers of findings that are alike


def drawn(name: str, corpus: dict[str, Folder], seed: int, number: int) -> Mutated:
    """One case of a format: a function of its seed and number."""
    draw = random.Random(f"{seed} {name} {number}")
    of = draw.choice(sorted(corpus))
    donors = [held for folder in corpus.values() for held in folder.values() if isinstance(held, bytes)]
    spoilt = mutated(draw, corpus[of], donors, FORMATS[name].seals)
    return Mutated(spoilt.folder, (of, *spoilt.labels), spoilt.harmless)


def cases(
    name: str, corpus: dict[str, Folder], seed: int, at: Path
) -> Callable[[int], tuple[Callable[[], Any], Callable[[Any], None]]]:
    """What `outcomes` prepares each case with; its folder lies at `at` until the next one is prepared."""
    form = FORMATS[name]
    read = refusing(form.read)

    def case(number: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        spoilt = drawn(name, corpus, seed, number)
        shutil.rmtree(at, ignore_errors=True)
        write(spoilt.folder, at)
        return lambda: _read(read, at, spoilt.harmless), lambda loaded: form.check(at, loaded)

    return case


def _read(read: Callable[[Path], Any], at: Path, harmless: bool) -> Any:
    try:
        return read(at)
    except RefusedError as error:
        if harmless:
            raise WrongError(f"nothing that matters was changed, yet it is refused: {error}") from error
        raise


def run(name: str, numbers: Sequence[int], seed: int, findings: Path | None = None) -> dict[str, Any]:
    """Go through cases of a format; figures. Findings go to a folder each below `findings`."""
    torch.set_num_threads(1)
    corpus, began = FORMATS[name].corpus(), time.perf_counter()
    found, reasons, alike = list[Outcome](), set[str](), Counter[str]()
    slowest, largest, kinds = 0.0, 0, Counter[str]()
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as temp:
        _check_corpus(FORMATS[name], corpus, Path(temp))
        for outcome in outcomes(cases(name, corpus, seed, Path(temp) / "case"), numbers):
            kinds[outcome.kind] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.peak_bytes)
            if outcome.kind == "refused":
                reasons.add(re.sub(r"\S*/\S*|'.*'|[\d,.]+", "#", outcome.text)[:60])
            if outcome.is_finding:
                found.append(outcome)
                like = f"{outcome.kind} {outcome.where} {re.sub('[0-9]+', '#', outcome.text)[:60]}"
                alike[like] += 1
                if findings and alike[like] <= _KEEP:
                    _keep(findings, name, drawn(name, corpus, seed, outcome.case), outcome)
    return {
        "cases": len(numbers),
        "loaded": kinds["loaded"],
        "refused": kinds["refused"],
        "reasons": len(reasons),
        "findings": dict(alike),
        "slowest_seconds": slowest,
        "most_bytes": largest,
        "seconds": time.perf_counter() - began,
        "seed": seed,
    }


def _check_corpus(form: Format, corpus: dict[str, Folder], temp: Path) -> None:
    """What is not spoilt must load; this also imports and fills whatever is made at a first use."""
    for name, folder in corpus.items():
        write(folder, temp / name)
        form.check(temp / name, form.read(temp / name))


def _keep(findings: Path, name: str, spoilt: Mutated, outcome: Outcome) -> None:
    folder = findings / name.replace(" ", "-") / str(outcome.case)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    write(spoilt.folder, folder)
    facts = {"done": spoilt.labels, "kind": outcome.kind, "text": outcome.text, "where": outcome.where}
    folder.with_name(f"{folder.name}.finding.json").write_text(json.dumps(facts, indent=1) + "\n")


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of all formats as a Markdown table."""
    head = ("files", "cases", "loaded", "refused", "reasons", "findings", "seconds", "MB")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in sorted(parts, key=list(FORMATS).index):
        part = parts[name]
        counts = [f"{part[key]:,}" for key in ("cases", "loaded", "refused", "reasons")]
        worst = [f"{part['slowest_seconds']:.2f}", f"{part['most_bytes'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join([name, *counts, str(sum(part['findings'].values())), *worst])} |")
    return "\n".join(lines)


def write_table(page: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table between the page's markers."""
    pattern = re.compile(r"(<!-- fuzzed: [^\n]*-->\n).*?(<!-- end fuzzed -->)", re.DOTALL)
    page.write_text(pattern.sub(lambda found: f"{found[1]}{table(parts)}\n{found[2]}", page.read_text()))


def _memory_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main(argv: Iterable[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}; all by default")
    parser.add_argument("--cases", type=int, default=10_000, help="of each format")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder for reproducers")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    args = parser.parse_args(argv if argv is None else list(argv))
    if unknown := set(args.formats) - FORMATS.keys():
        parser.error(f"there is no format {min(unknown)!r}; there are {', '.join(FORMATS)}")
    check_result("fuzz", args.out)
    n_findings = 0
    for name in args.formats or FORMATS:
        figures = run(name, range(args.first, args.first + args.cases), args.seed, args.findings)
        write_result("fuzz", {"parts": {name: figures}}, args.out)
        ends = f"{figures['loaded']:,} loaded, {figures['refused']:,} refused for {figures['reasons']:,} reasons"
        worst = f"slowest {figures['slowest_seconds']:.2f} s, most {figures['most_bytes'] / 1e6:.0f} MB"
        print(f"{name:26} {figures['cases']:,} cases in {figures['seconds']:.0f} s: {ends}; {worst}", flush=True)
        for what, n in sorted(figures["findings"].items(), key=lambda item: -item[1]):
            print(f"    {n:6,} x {what}", flush=True)
        n_findings += sum(figures["findings"].values())
    if args.out.resolve() == (RESULTS / "fuzz.json").resolve():
        write_table(PAGE, json.loads(args.out.read_text())["parts"])
    return 1 if n_findings else 0


if __name__ == "__main__":
    sys.exit(main())
