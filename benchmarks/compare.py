"""The strategies on the embedded base, with and without replay: python -m benchmarks.compare

Runs `minilora compare` as it stands, in a folder that is thrown away, and keeps its figures and its picture. The table
in docs/strategies.md is made of them; --draw makes both anew of the figures that are there.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, write_result
from benchmarks.table import between
from minilora.checkpoint.json_file import read_json
from minilora.cli import main as minilora
from minilora.report.comparison import COLUMNS, comparison_figure, ranked
from minilora.report.figures import figures_of, text_of

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- compared: by python -m benchmarks.compare -->", "<!-- end compared -->"


SHOWN = {name: column for name, column in COLUMNS.items() if name != "tokens/s"}  # of one run each: noise


def compared(result: Mapping[str, Any]) -> str:
    """The runs as a Markdown table, the best first; the winner's test below it."""
    head = ["run", *SHOWN]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in ranked(result):
        cells = [row["name"], *(text_of(column(row)) for column in SHOWN.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"The winner's test, opened once: {figures_of(result['test'])}."])


def main(args: Sequence[str] | None = None) -> int:
    """Measure; write benchmarks/results/compare.json, picture and table. The exit status of `minilora compare`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--draw", action="store_true", help="only the picture and the table, of the result that is there"
    )
    if parser.parse_args(args).draw:
        draw(read_json(RESULTS / "compare.json")["comparison"])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        if status := minilora(["compare", "--output", f"{folder}/compare"]):
            return status
        seconds = time.perf_counter() - began
        comparison = read_json(Path(folder) / "compare" / "compare.json")
    path = write_result("compare", {"comparison": comparison, "seconds": seconds})
    draw(read_json(path)["comparison"])
    print(f"{path}, {seconds:.0f} s in all")
    return 0


def draw(comparison: Mapping[str, Any]) -> None:
    """The picture and the table of docs/strategies.md."""
    (DOCS / "compare.png").write_bytes(comparison_figure(comparison))
    write_table(DOCS / "strategies.md", comparison)


def write_table(page: Path, comparison: Mapping[str, Any]) -> None:
    """Put the table between the page's markers."""
    page.write_text(between(page.read_text(), compared(comparison), BEGIN, END))


if __name__ == "__main__":
    sys.exit(main())
