"""The README's "Measured": python -m benchmarks.table writes it anew from results/*.json.

Every line of the table is a "rows" entry of a result, with the file it comes from, and below it stand the
commands and machines. So no figure is typed by hand; `tests/benchmarks/test_table.py` holds the README to it.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, rows_of

README = ROOT / "README.md"
BEGIN, END = "<!-- measured: by python -m benchmarks.table -->", "<!-- end measured -->"
# Of the sizes that a GPU is measured at, those that a 7B's step and decoding spend the most time on.
OF_GPU = re.compile(
    r"quantize.* 14336 x|M = (1|2|3|16|64|256), nested, 28672 x|norm, .* 2048 x 4096|rope, .* 32 heads|"
    r"swiglu, .* 14336|softmax_gradient, .* 32768|adamw|QLoRA|decoding"
)
HEAD = ["| what | minilora | peer | ratio | result |", "|---|---|---|---|---|"]


def measured(folder: Path = RESULTS) -> str:
    """The section's text; of results that have rows."""
    lines, origins = [], []
    for file, line, source in _rows(folder):
        lines.append(f"| {line['what']} | {line['ours']} | {line['peer']} | {line['ratio']} | `{file.name}` |")
        origins.append(f"- `{file.name}`: `{source['command']}`, on {_machine(source['machine'])}")
    if not lines:
        return "Nothing has been measured yet."
    return "\n".join([*HEAD, *lines, "", *dict.fromkeys(origins)])


def between(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `text` between the two markers. Raises ValueError if they are not there once each."""
    pattern = re.compile(f"({re.escape(begin)}\n).*?(\n{re.escape(end)})", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must have {begin} and {end} once each")
    return pattern.sub(lambda found: found[1] + text + found[2], page)


def _rows(folder: Path) -> Iterator[tuple[Path, dict[str, str], Mapping[str, Any]]]:
    for file in sorted(folder.glob("*.json")):
        for line, source in rows_of(json.loads(file.read_text())):
            if file.stem != "gpu" or OF_GPU.search(line["what"]):
                yield file, line, source


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
        README.write_text(between(README.read_text(), measured()))
    except ValueError as error:
        print(f"table: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
