"""The README's "Measured" and its page are what the results say, to the letter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.harness import machine, row
from benchmarks.table import PAGE, README, between, measured, shown


@pytest.mark.parametrize(("page", "text"), [(README, shown), (PAGE, measured)])
def test_a_page_says_what_the_results_say(page: Path, text: Callable[[], str]) -> None:
    assert between(page.read_text(), text()) == page.read_text(), "run python -m benchmarks.table"


def test_a_row_of_the_readme_that_nothing_measured_is_missed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no result has a row 'QLoRA step"):
        shown(tmp_path)


def test_only_results_with_rows_make_lines(tmp_path: Path) -> None:
    stamp = {"machine": machine(), "command": "python -m benchmarks.x"}
    assert measured(tmp_path) == "Nothing has been measured yet."
    (tmp_path / "demo.json").write_text('{"summary": {}}')
    parts = {"p": {**stamp, "rows": [row("second", "1 s", "2 s", "2.00")]}}
    (tmp_path / "x.json").write_text(json.dumps({**stamp, "rows": [row("first", "1", "2", "2")], "parts": parts}))
    lines = measured(tmp_path).splitlines()
    assert lines[2:5] == [
        "| first | 1 | 2 | 2 | `x.json` |",
        "| second | 1 s | 2 s | 2.00 | `x.json` |",
        "",
    ]
    assert len(lines) == 6  # one command on one machine, said once
    assert lines[5].startswith(f"- `x.json`: `python -m benchmarks.x`, on {machine()['cpu']}")


def test_help_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "measured.md"
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(table, "PAGE", page)
    empty = f"{table.BEGIN}\n\n{table.END}\n"
    readme.write_text(empty)
    page.write_text("# minilora")
    with pytest.raises(SystemExit, match="0"):
        table.main(["--help"])
    assert "usage: python -m benchmarks.table" in capsys.readouterr().out
    assert page.read_text() == "# minilora"
    assert table.main([]) == 1
    assert readme.read_text() == empty  # both or none
    page.write_text(empty)
    assert table.main([]) == 0
    for file, text in ((readme, shown()), (page, measured())):
        assert file.read_text() == f"{table.BEGIN}\n{text}\n{table.END}\n"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        between("# minilora", "x")
