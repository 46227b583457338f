"""The comparison's table and figure, of rows as compare.json holds them."""

import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from matplotlib.cbook import is_math_text

from minilora.report import comparison
from minilora.report.comparison import (
    COLUMNS,
    _kind,
    best_of,
    comparison_figure,
    comparison_table,
    forgetting_of,
    ranked,
    show,
)
from minilora.report.console import Console


def row(name: str, loss: float | None, changes: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    figures = {
        "lr": 1e-3,
        "after": {"loss": loss, "exact_match": 0.5},
        "forgetting": {"before": {"perplexity": 3.0}, "after": {"perplexity": 4.5}, "kl": 0.25},
        "peak_memory_bytes": {"private": 2_500_000_000},
        "tok_per_s": 1234.5,
        "trainable_parameters": 1_000_000,
    }
    return {"name": name, "changes": changes or {}, **(figures if loss is not None else {}), **more}


ROWS = [
    row("full", 0.4, {"train.strategy": "full"}),
    row("full-share=0.5", 0.6, {"train.strategy": "full", "data.share": "0.5"}),
    row("prefix", None, {"train.strategy": "prefix"}, failed="out of [memory]"),
    row("qlora", 0.3, {"train.strategy": "qlora"}),
]
RESULT = {"ranked_by": "loss", "winner": "qlora", "test": {}, "rows": ROWS}


def shown(result: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison_table(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_has_the_best_first_and_what_failed_last() -> None:
    lines = [line for line in shown(RESULT) if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == ["qlora", "full", "full-share=0.5", "prefix"]
    assert [cell.strip() for cell in lines[0].split("│")[2:10]] == [
        "1", "0.001", "2.5", "1,234", "0.3", "0.5", "1.5", "0.25"
    ]  # fmt: skip


def test_below_the_table_it_says_what_its_speeds_are_worth(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    show(RESULT, tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    told = "tokens/s: the median step of a single run each, one after another; no race"
    assert told in console.file.getvalue().splitlines()


def test_it_says_for_how_many_runs_the_test_was_opened(tmp_path: Path) -> None:
    one, two = {"test_seen_by": ["qlora"]}, {"test_seen_by": ["a", "b"]}
    once, often = "its test, opened once", "warning: its test was opened for 2 runs (a, b) and is unseen no longer"
    for seen_by, how in (({}, once), (one, once), (two, often)):
        console = Console(file=io.StringIO(), width=200)
        show(RESULT | {"test": {"loss": 0.5}} | seen_by, tmp_path, console)
        assert isinstance(console.file, io.StringIO)
        assert f"{how}: loss 0.5" in console.file.getvalue().splitlines()


def test_a_share_of_right_answers_ranks_the_other_way() -> None:
    rows = [row("worse", 0.1), row("better", 0.9)]
    rows[0]["after"]["exact_match"], rows[1]["after"]["exact_match"] = 0.2, 0.7
    lines = [line for line in shown({"ranked_by": "exact_match", "rows": rows}) if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == ["better", "worse"]


@pytest.mark.parametrize("by", ["loss", "exact_match", "perplexity", "rougeL"])
def test_what_they_are_ranked_by_has_a_column(by: str) -> None:
    rows = [row(name, 0.5) for name in ("a", "b")]
    for made, value in zip(rows, (0.25, 0.125), strict=True):
        made["after"][by] = value
    head, *lines = (line for line in shown({"ranked_by": by, "rows": rows}) if line[:1] in "┃│")
    at = [cell.strip() for cell in head.split("┃")].index({"loss": "val loss", "exact_match": "exact"}.get(by, by))
    best_first = ["0.125", "0.25"] if by in ("loss", "perplexity") else ["0.25", "0.125"]
    assert [line.split("│")[at].strip() for line in lines] == best_first
    assert len(head.split("┃")) == 11 + (by in ("perplexity", "rougeL"))


def test_a_best_run_that_is_not_the_first_says_why(tmp_path: Path) -> None:
    rows = [row("all", 0.5), row("half", 0.4, {"data.share": "0.5"})]
    for loss, of in ((0.4, ", of the runs on all of the data"), (0.6, "")):
        rows[1]["after"]["loss"] = loss
        console = Console(file=io.StringIO(), width=200)
        show(RESULT | {"rows": rows, "winner": best_of(rows, "loss")}, tmp_path, console)
        assert isinstance(console.file, io.StringIO)
        assert f"best on validation by loss{of}: all\n" in console.file.getvalue()


def test_of_equal_runs_the_one_of_less_loss_is_first() -> None:
    rows = [row("more", 0.9), row("less", 0.1)]
    for made in rows:
        made["after"]["exact_match"] = 0.0
    assert [made["name"] for made in ranked({"ranked_by": "exact_match", "rows": rows})] == ["less", "more"]


def test_a_loss_that_was_not_finite_is_as_bad_as_none() -> None:
    rows = [{"name": "failed", "failed": "x"}, {"name": "null", "after": {"loss": None}}, row("best", 0.1)]
    assert [made["name"] for made in ranked({"ranked_by": "loss", "rows": rows})] == ["best", "failed", "null"]


def test_what_was_not_measured_is_left_out() -> None:
    assert forgetting_of({"forgetting": {}}) is None
    assert forgetting_of({}) is None
    peak_of = COLUMNS["peak GB"]
    assert peak_of({}) is None
    assert peak_of({"peak_memory_bytes": {"device_allocated": 3e9, "private": 1e9}}) == 3.0


def test_values_with_an_exponent_have_a_colour_each() -> None:
    assert [_kind(row(name, 1.0)) for name in ("lr=1e-4", "lr=1e-5", "qlora-lr=1e-4", "qlora-share=0.5", "qlora")] == [
        "lr=1e-4", "lr=1e-5", "qlora", "qlora", "qlora"
    ]  # fmt: skip


def test_the_figure_is_a_picture_and_the_same_each_time() -> None:
    first = comparison_figure(RESULT)
    assert first == comparison_figure(RESULT)
    assert image.imread(io.BytesIO(first), format="png").shape[2] == 4
    more = [*ROWS, row("qlora-share=0.5", 0.5, {"train.strategy": "qlora", "data.share": "0.5"})]
    assert comparison_figure({**RESULT, "rows": more}) != first, "a learning curve more"


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, list[float]]]:
    """(the names beside the bars, points of each learning curve by its name)."""
    kept: list[Any] = []
    monkeypatch.setattr(comparison, "to_png", lambda figure: kept.append(figure) or b"")
    comparison_figure({"ranked_by": "loss", "rows": rows})
    bars, *_, curves = kept[0].axes
    return [label.get_text() for label in bars.get_yticklabels()], {
        line.get_label(): [*zip(*line.get_data(), strict=True)] for line in curves.get_lines()
    }


def test_a_grid_of_shares_is_a_learning_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"share={share}", 1 - float(share) / 2, {"data.share": share}) for share in ("0.25", "0.5", "1")]
    points = [(25.0, 0.875), (50.0, 0.75), (100.0, 0.5)]
    assert drawn(monkeypatch, rows) == (["share=1"], {"share=1": points})


def test_a_run_on_less_than_all_of_the_data_stands_at_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("run", 0.3, share=0.5), row("share=0.25", 0.6, {"data.share": "0.25"}, share=0.25)]
    assert drawn(monkeypatch, rows) == (["run"], {"run": [(25.0, 0.6), (50.0, 0.3)]})


def test_dollars_in_a_name_are_no_tex_and_a_long_one_leaves_the_panels_their_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = r"targets=(.*\.q_proj|$a_{$)-" + "x" * 60
    rows = [row(name, 0.3), row(f"{name}-share=0.5", 0.6, {"data.share": "0.5"})]
    assert comparison_figure({"ranked_by": "loss", "rows": rows})
    [label], _ = drawn(monkeypatch, rows)
    assert label.replace(r"\$", "$") == name
    assert not is_math_text(label)
    kept: list[Any] = []
    monkeypatch.setattr(comparison, "to_png", lambda figure: kept.append(figure) or b"")
    for drawn_rows in (ROWS, rows):
        comparison_figure({"ranked_by": "loss", "rows": drawn_rows})
        kept[-1].draw_without_rendering()
    widths = [figure.axes[-1].get_window_extent().width / figure.dpi for figure in kept]
    assert min(widths) > 2.8, "inches, which the last title takes"


def test_a_picture_that_cannot_be_drawn_costs_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bytes:
        raise ValueError("no TeX")

    monkeypatch.setattr(comparison, "comparison_figure", fail)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(ValueError, match="no TeX"):
        show(RESULT, tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    assert "best on validation by loss: qlora\n" in console.file.getvalue()
