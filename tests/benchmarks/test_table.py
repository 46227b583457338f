"""The README's "Measured" is what the results say, to the letter."""

import json
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.harness import machine, row
from benchmarks.table import README, between, measured


def test_the_readme_says_what_the_results_say() -> None:
    readme = README.read_text()
    assert between(readme, measured()) == readme, "run python -m benchmarks.table"


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
    page = tmp_path / "README.md"
    page.write_text("# minilora")
    monkeypatch.setattr(table, "README", page)
    with pytest.raises(SystemExit, match="0"):
        table.main(["--help"])
    assert "usage: python -m benchmarks.table" in capsys.readouterr().out
    assert page.read_text() == "# minilora"
    assert table.main([]) == 1
    page.write_text(f"{table.BEGIN}\n\n{table.END}\n")
    assert table.main([]) == 0
    assert page.read_text() == f"{table.BEGIN}\n{measured()}\n{table.END}\n"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        between("# minilora", "x")
