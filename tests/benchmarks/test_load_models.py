"""The benchmark of loading goes its whole way on a tiny shape, both sides, and ours on a checkpoint that is there."""

import json
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load
from benchmarks.harness import Measured, Record
from benchmarks.load import WORKS, _figures, _text, main
from minilora.config import base_folder

FIGURES = {"seconds", "weights_per_s", "peak_private_bytes", "beyond_bytes", "weights_bytes"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_every_work_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    flags = ["--shape", "tiny", "--model", str(base_folder("demo")), "--rounds", "1", "--work", str(tmp_path)]
    assert main([*flags, "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert parts.keys() == {"tiny", "model"}
    assert len(parts["tiny"]["rows"]) == len(parts["model"]["rows"]) == len(WORKS)
    for part, sides in (("tiny", 2), ("model", 1)):
        assert "commit" in parts[part]["machine"]
        for figures in parts[part]["works"].values():
            measured = [side for side in figures.values() if "seconds" in side]
            assert len(measured) == sides
            assert all(side.keys() >= FIGURES for side in measured)
    tiny = parts["tiny"]["works"]["load"]
    ours, theirs = tiny["minilora"]["weights_bytes"], tiny["transformers + bitsandbytes"]["weights_bytes"]
    assert ours == pytest.approx(theirs, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


def test_a_model_that_is_not_there_is_found_before_the_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "compare", lambda *_: pytest.fail("raced"))
    assert main(["--model", str(tmp_path / "typo"), "--out", str(tmp_path / "load.json")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"load: {tmp_path / 'typo'}")
    assert err.count("\n") == 1


def test_what_goes_wrong_late_leaves_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> dict[str, Any]:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(load, "compare", lambda *_: {"rows": [], "works": {}})
    monkeypatch.setattr(load, "alone", full)
    out = tmp_path / "load.json"
    assert main(["--shape", "tiny", "--model", str(base_folder("demo")), "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"load: [Errno {ENOSPC}] No space left on device\n"
    assert json.loads(out.read_text())["parts"].keys() == {"tiny"}


def test_a_place_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "tiny", "--work", str(tmp_path / "none"), "--out", str(tmp_path / "load.json")]) == 1
    err = capsys.readouterr().err
    assert "No such file or directory" in err
    assert err.count("\n") == 1


def test_a_mapped_model_is_called_so() -> None:
    figures = {"seconds": 2.0, "weights_per_s": 5e6, "weights_bytes": 10**9, "beyond_bytes": -(9 * 10**8)}
    assert _text("load", figures) == "2 s, 5 million weights/s, 0.00 GB beyond the model's, which is mapped"
    assert _text("load", figures | {"beyond_bytes": -1000}) == "2 s, 5 million weights/s, 0.00 GB beyond the model's"


def test_memory_is_of_the_very_first_step_and_speed_of_those_that_count() -> None:
    """10 MB before it, 46 MB at its peak, 30 of them the model's."""
    result = {"weights_bytes": 30_000_000}
    first = Measured(9.0, 46_000_000, 90_000_000, result)
    steps = [Measured(s, 50_000_000, 80_000_000, result) for s in (1.0, 4.0, 2.0)]
    figures = _figures(Record("minilora", steps, first, rest_bytes=10_000_000), 8_000_000)
    assert figures == {
        "seconds": 2.0,
        "seconds_of_each": [1.0, 4.0, 2.0],
        "peak_private_bytes": 50_000_000,
        "max_rss_bytes": 80_000_000,
        "rest_private_bytes": 10_000_000,
        "weights_bytes": 30_000_000,
        "beyond_bytes": 6_000_000,
        "weights_per_s": 4_000_000.0,
    }
    assert _text("quantize", figures) == "2 s, 4 million weights/s, 0.01 GB beyond the model's"
    assert _text("write", figures) == "2 s, 4 million weights/s, 0.04 GB in all"
    assert _figures(Record("minilora", error="no room"), 8_000_000) == {"error": "no room"}
