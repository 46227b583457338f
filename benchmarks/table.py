"""What was measured: python -m benchmarks.table writes docs/measured.md and README's table anew from results/*.json.

Every line of a table is a "rows" entry of a result, with the file it comes from. The page has all of them, and below
them the commands and machines; the README has those that say most. So no figure is typed by hand;
`tests/benchmarks/test_table.py` holds both to it.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, rows_of

README, PAGE = ROOT / "README.md", ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- measured: by python -m benchmarks.table -->", "<!-- end measured -->"
STEP = "QLoRA step, 135m,"
# The README's rows, in its order.
SHOWN = (
    *(
        f"{STEP} {contents}, {dtype}"
        for contents in ("4 x 256 tokens", "1 x 1024 tokens", "docstrings, rows of 1024")
        for dtype in ("bfloat16", "float32")
    ),
    f"{STEP} docstrings, rows of 1024, bfloat16: peak memory",
    f"{STEP} docstrings, rows of 1024, float32: peak memory",
    "bf16 checkpoint to an NF4 model, 1.1b",
    "bf16 checkpoint to an NF4 checkpoint, 7.2 billion weights",
    "merge with audit on 256 tokens, 7.2 billion weights",
    "bfloat16 to NF4, 14336 x 4096",
    "NF4 to bfloat16, 14336 x 4096",
    "NF4 linear, bfloat16, 512 rows, 14336 x 4096",
    "dequantize, nested, 14336 x 4096 to bfloat16",
    # Of a shape that gpu.json has and `nf4_matvec.SHAPES`, by which it is measured again, no longer.
    "matvec, M = 1, nested, 28672 x 4096",
    "matmul, M = 16, nested, 28672 x 4096",
    "norm, forward after a sum, 2048 x 4096",
)
HEAD = ["| what | minilora | peer | ratio | result |", "|---|---|---|---|---|"]


def measured(folder: Path = RESULTS) -> str:
    """The page's rows, commands and machines; of results that have rows."""
    lines, origins = [], []
    for file, line, source in _rows(folder):
        lines.append(_line(file, line))
        origins.append(f"- `{file.name}`: `{source['command']}`, on {_machine(source['machine'])}")
    if not lines:
        return "Nothing has been measured yet."
    return "\n".join([*HEAD, *lines, "", *dict.fromkeys(origins)])


def shown(folder: Path = RESULTS) -> str:
    """The README's rows. Raises ValueError for one that no result has."""
    found: dict[str, str] = {}
    for file, line, _ in _rows(folder):
        found.setdefault(line["what"], _line(file, line))  # of two machines the first file's, such as nf4_cpu.json's
    if missing := [what for what in SHOWN if what not in found]:
        raise ValueError(f"no result has a row {missing[0]!r}")
    return "\n".join([*HEAD, *(found[what] for what in SHOWN)])


def between(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `text` between the two markers. Raises ValueError if they are not there once each."""
    pattern = re.compile(f"({re.escape(begin)}\n).*?(\n{re.escape(end)})", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"a page must have {begin} and {end} once each")
    return pattern.sub(lambda found: found[1] + text + found[2], page)


def _rows(folder: Path) -> Iterator[tuple[Path, dict[str, str], Mapping[str, Any]]]:
    for file in sorted(folder.glob("*.json")):
        for line, source in rows_of(json.loads(file.read_text())):
            yield file, line, source


def _line(file: Path, line: Mapping[str, str]) -> str:
    return f"| {line['what']} | {line['ours']} | {line['peer']} | {line['ratio']} | `{file.name}` |"


def _machine(machine: Mapping[str, Any]) -> str:
    """Where, with what, when."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["versions"].items()))
    flags = ", ".join(machine["cpu_flags"])
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    commit = f"{machine['commit']}{' and changes' if machine['dirty'] else ''}"
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores ({flags}), {machine['ram_gib']:.0f} GiB; "
        f"Python {machine['python']}, {versions}; {machine['date']}, commit {commit}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=(__doc__ or "").split("\n")[0])
    parser.parse_args(argv)
    try:
        made = {page: between(page.read_text(), text()) for page, text in ((README, shown), (PAGE, measured))}
    except ValueError as error:
        print(f"table: {error}", file=sys.stderr)
        return 1
    for page, text in made.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
