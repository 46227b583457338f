"""A comparison of runs as one table and one figure."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minilora.checkpoint.write import atomic_write
from minilora.data.duplicates import groups_of_equal
from minilora.errors import UserError
from minilora.memory import peak_bytes
from minilora.report.console import Console, Table, say, table
from minilora.report.figures import LOWER_IS_BETTER, figures_of, text_of
from minilora.report.plots import BLUE, GREEN, GREY, ORANGE, RED, STYLE, legend, to_png

Row = Mapping[str, Any]
SHARE = "data.share"
PANELS = {
    "Weights that learn, millions": "learn M",
    "Peak memory, GB": "peak GB",
    "Tokens a second": "tokens/s",
    "Validation loss": "val loss",
    "Perplexity of general text, after / before": "forgot ×",
}
COLOURS = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0891b2")


def forgetting_of(row: Row) -> float | None:
    """By what factor the perplexity of general text grew: 1 where nothing was forgotten."""
    forgetting = row.get("forgetting") or {}
    before, after = (forgetting.get(key, {}).get("perplexity") for key in ("before", "after"))
    return after / before if before and after else None


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "learn M": lambda row: row["trainable_parameters"] / 1e6 if "trainable_parameters" in row else None,
    "lr": lambda row: row.get("lr"),
    "peak GB": lambda row: peak_bytes(row.get("peak_memory_bytes") or {}) / 1e9 or None,
    "tokens/s": lambda row: row.get("tok_per_s"),
    "val loss": lambda row: (row.get("after") or {}).get("loss"),
    "exact": lambda row: (row.get("after") or {}).get("exact_match"),
    "forgot ×": forgetting_of,
    "KL": lambda row: (row.get("forgetting") or {}).get("kl"),
}


def comparison_table(result: Mapping[str, Any]) -> Table:
    """A row a run, the best on validation first; what failed last. What they are ranked by has a column, too."""
    by = result["ranked_by"]
    called = {"loss": "val loss", "exact_match": "exact"}.get(by, by)
    columns = COLUMNS | {called: lambda row: (row.get("after") or {}).get(by)}
    cells = [[row["name"], *(text_of(column(row)) for column in columns.values())] for row in ranked(result)]
    runs = table(("run", *columns), cells)
    runs.columns[0].no_wrap = True
    return runs


def show(result: Mapping[str, Any], output: Path, console: Console) -> None:
    """Print the table, the best run and its test, then draw compare.png into the folder `output`."""
    console.print(comparison_table(result))
    say(console, "tokens/s: the median step of a single run each, one after another; no race")
    of = "" if ranked(result)[0]["name"] == result["winner"] else ", of the runs on all of the data"
    say(console, f"best on validation by {result['ranked_by']}{of}: {result['winner']}")
    if result["test"]:
        seen_by = result.get("test_seen_by", ())  # older results have none
        often = f"warning: its test was opened for {len(seen_by)} runs ({', '.join(seen_by)}) and is unseen no longer"
        say(console, f"{often if len(seen_by) > 1 else 'its test, opened once'}: {figures_of(result['test'])}")
    atomic_write(output / "compare.png", comparison_figure(result))
    say(console, f"all figures in {output / 'compare.json'}, the picture in {output / 'compare.png'}")


def ranked(result: Mapping[str, Any]) -> list[Row]:
    """The rows, the best on validation first, of equal ones that of less loss; those that failed last."""
    by = result["ranked_by"]
    sign = 1 if by.endswith(LOWER_IS_BETTER) else -1

    def place(row: Row) -> tuple[bool, float, float]:
        after = row.get("after") or {}
        loss = after.get("loss")  # None, too, where it was not finite
        return after.get(by) is None, sign * (after.get(by) or 0.0), inf if loss is None else loss

    return sorted(result["rows"], key=place)


def best_of(rows: Sequence[Row], rank_by: str) -> str:
    """The name of the best run, of those on all of the data if there are some. Raises UserError if none was measured.

    rank_by: "loss", "perplexity" or a figure of eval.metrics
    """
    in_order = ranked({"rows": rows, "ranked_by": rank_by})
    done = [row for row in in_order if (row.get("after") or {}).get(rank_by) is not None]
    if not done:
        raise UserError(f"no run has a {rank_by} to rank by; the first: {rows[0].get('failed', 'it is not measured')}")
    best: str = next((row for row in done if SHARE not in row["changes"]), done[0])["name"]
    return best


def comparison_figure(result: Mapping[str, Any]) -> bytes:
    """What each run took and gave, a panel a measure, and the loss over the share of the data; a PNG file."""
    curves = _curves([row for row in result["rows"] if "failed" not in row])
    whole = [curve[-1] for curve in curves]
    kinds = list(dict.fromkeys(_kind(row) for row in whole))
    colours = {row["name"]: COLOURS[kinds.index(_kind(row)) % len(COLOURS)] for row in whole}
    names = [_no_math(row["name"]) for row in whole]
    width = max([13.0, *(7.6 + 0.3 * len(name) for name in names)])  # inches: names stand beside three panels
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 3 + 0.45 * len(whole)), layout="constrained")
        panels: list[Axes] = list(figure.subplots(2, 3).flat)
        for axes, (title, of) in zip(panels, PANELS.items(), strict=False):
            axes.set_title(title)
            values = [COLUMNS[of](row) for row in whole]
            bars = axes.barh(names, [value or 0 for value in values], color=list(colours.values()))
            axes.bar_label(bars, list(map(text_of, values)), padding=3)
            axes.invert_yaxis()
            axes.margins(x=0.25)
            if of == "learn M":
                axes.set_xscale("log")
            if of == "forgot ×":
                axes.axvline(1, color=GREY, linewidth=1)
        _learning_curves(panels[-1], curves, colours)
        return to_png(figure)


def _kind(row: Row) -> str:
    """What a run has its colour by: its strategy, or else its name."""
    name: str = row["name"]
    first = name.partition("-")[0]
    return name if "=" in first else first  # which an exponent has cut


def _no_math(name: str) -> str:
    """The name as it is drawn as it stands, for between two $ matplotlib reads TeX."""
    return name.replace("$", r"\$")


def _curves(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ in nothing but their share of the data together, that of the largest share last."""
    others = (tuple(change for change in row["changes"].items() if change[0] != SHARE) for row in rows)
    return [sorted((rows[i] for i in group), key=_share) for group in groups_of_equal(others)]


def _share(row: Row) -> float:
    return float(row.get("share", row["changes"].get(SHARE, 1)))  # older results have no "share"


def _learning_curves(axes: Axes, curves: Sequence[Sequence[Row]], colours: Mapping[str, str]) -> None:
    axes.set_title("Validation loss, by share of data")
    for curve in (curve for curve in curves if len(curve) > 1):
        name, points = curve[-1]["name"], [(100 * _share(row), row["after"]["loss"]) for row in curve]
        axes.plot(*zip(*points, strict=True), marker="o", color=colours[name], label=_no_math(name))
    axes.set_xlabel("% of the data")
    legend(axes)
