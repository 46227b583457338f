"""Cost grows as it should: what the committed figures say, and that the command makes such figures."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.harness import RESULTS
from benchmarks.scaling import FIGURE, line, main, says, slope


def test_line_and_slope() -> None:
    assert line([1, 2, 4], [5, 7, 11]) == pytest.approx(0, abs=1e-9)
    assert line([1, 2, 4], [1, 4, 16]) > 0.2
    assert slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_the_committed_figures_are_linear() -> None:
    found = json.loads((RESULTS / "scaling.json").read_text())["scaling"]
    said = found["says"]
    assert said == pytest.approx(says(found), rel=1e-3)
    assert said["rows_level"] < 0.15  # tokens a second, of 2, 4 and 8 rows
    assert said["tokens_line"] < 0.02
    assert said["tokens_ledger"] < 0.10
    for what in ("step", "pieces"):
        assert said[f"{what}_seconds_slope"] < 1.1
        assert said[f"{what}_bytes_slope"] < 1.1
    assert said["mask_seconds_slope"] > 1.5  # what it would be otherwise
    assert FIGURE.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    assert main(["--quick", "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["scaling"]
    assert {len(found["rows"]), len(found["tokens"]), len(found["window"])} == {2, 4, 18}
    assert found["machine"]["cores"] >= 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "pieces_seconds_slope" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "words"), [(None, "no such file"), ("{}", "not one of python -m benchmarks.scaling")])
def test_what_cannot_be_drawn_is_one_line(
    text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.json"
    if text is not None:
        out.write_text(text)
    assert main(["--draw", "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"scaling: {out}: {words}\n"
    assert not out.with_suffix(".png").exists()


def test_without_a_round_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--rounds", "0"])
