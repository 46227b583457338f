"""The roofline's picture from a result."""

import json
from pathlib import Path

import pytest

from benchmarks.plot import main, points

TIMINGS = {"minilora": {"median_us": 10.0}}
RESULT = {
    "parts": {
        "ceilings": {
            "copy_gb_per_s": 3000.0,
            "matmul_tflop_per_s": 700.0,
            "machine": {"gpu": "a card", "date": "2026-01-01", "commit": "abc"},
        },
        "matvec": {"cases": {"one": {"timings": TIMINGS, "bytes": 1e7, "tflop_per_s": 4.0}}},
        "matmul": {"error": "did not run"},
    }
}


def test_where_a_point_lies() -> None:
    # 4 TFLOP/s for 10 us are 40 MFLOP, over 10 MB
    assert points(RESULT) == {"matvec": [(pytest.approx(4.0), 4.0, "one")]}


def test_the_figure(tmp_path: Path) -> None:
    result, out = tmp_path / "gpu.json", tmp_path / "roofline.png"
    result.write_text(json.dumps(RESULT))
    assert main([str(result), str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_place_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, out = tmp_path / "gpu.json", tmp_path / "no" / "roofline.png"
    result.write_text(json.dumps(RESULT))
    assert main([str(result), str(out)]) == 1
    assert capsys.readouterr().err == f"plot: {out}: No such file or directory\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ('{"parts": {}}', "no ceilings or no products"),
        ("[]", "not one of python -m benchmarks.gpu"),
        ("{}", "not one of python -m benchmarks.gpu ('parts')"),
        ('{"parts": []}', "not one of python -m benchmarks.gpu"),
        ('{"parts": {"matvec": {"cases": {"one": {}}}}}', "not one of python -m benchmarks.gpu ('timings')"),
        ('{"parts": {"ceilings": {"copy_gb_per_s": 1}, "matvec": {"cases": []}}}', "not one of"),
    ],
)
def test_what_cannot_be_drawn(text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "gpu.json"
    if text is not None:
        result.write_text(text)
    assert main([str(result), str(tmp_path / "x.png")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"plot: {result}: ")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
