"""From measured times to the table of ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import interpreted

import minilora.dispatch as dispatch
from benchmarks import calibrate
from benchmarks.calibrate import as_text, entry, limits, measure, with_entry
from benchmarks.gpu_harness import Timing
from minilora.dispatch import TABLE


def grid(**us: list[float]) -> dict[str, dict[int, float]]:
    """Times at 1, 2, 4 and 8 rows, matvec at the first two."""
    return {way: dict(zip((1, 2, 4, 8), times, strict=False)) for way, times in us.items()}


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ({"matvec": [1, 2], "matmul": [3, 3, 3, 4], "dequantize": [5, 5, 5, 5]}, (2, 8)),
        ({"matvec": [1, 4], "matmul": [3, 3, 3, 6], "dequantize": [5, 5, 5, 5]}, (1, 4)),
        ({"matvec": [9, 9], "matmul": [3, 3, 3, 6], "dequantize": [5, 5, 5, 5]}, (0, 4)),
        ({"matvec": [1, 9], "matmul": [9, 9, 3, 3], "dequantize": [5, 5, 5, 5]}, (1, 1)),  # no slower way up to there
        ({"matvec": [9, 1], "matmul": [3, 9, 9, 9], "dequantize": [5, 5, 5, 5]}, (0, 1)),  # two rows would take matmul
        ({"matvec": [9, 9], "matmul": [9, 9, 9, 9], "dequantize": [5, 5, 5, 5]}, (0, 0)),
    ],
)
def test_limits(times: dict[str, list[float]], found: tuple[int, int]) -> None:
    assert limits(grid(**times)) == found


def test_an_entry() -> None:
    fast = grid(matvec=[1, 2], matmul=[3, 3, 3, 4], dequantize=[5, 5, 5, 5])
    slow = grid(matvec=[2, 3], matmul=[4, 4, 4, 6], dequantize=[5, 5, 5, 5])
    made = entry(90, "a card", {100: slow, 200: fast, 300: fast}, None)
    assert made["limits"] == [
        {"least_weights": 0, "matvec": 2, "matmul": 4},
        {"least_weights": 200, "matvec": 2, "matmul": 8},
    ]
    assert (made["card"], made["shuffle"]) == ("a card", False)
    assert entry(90, "", {100: slow}, {100: fast})["shuffle"] is True
    assert entry(90, "", {100: fast}, {100: slow})["shuffle"] is False


def test_the_table_with_another_entry() -> None:
    table: list[Any] = json.loads(TABLE.read_text())
    new = {"arch": 86, "card": "a card", "shuffle": True, "limits": []}
    assert [old["arch"] for old in with_entry(table, new)] == [75, 80, 86, 90, 100, 120]
    assert with_entry(with_entry(table, new), new) == with_entry(table, new)
    assert as_text(table) == TABLE.read_text()


def test_a_damaged_table_is_found_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "TABLE", tmp_path / "dispatch.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch.table.cache_clear()
    assert calibrate.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"calibrate: {tmp_path / 'dispatch.json'} is damaged")
    assert err.count("\n") == 1


def test_a_table_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the new entry; what is printed is the file's text, and the package's own stays."""
    before, out = TABLE.read_text(), tmp_path / "a folder" / "table.json"
    made = grid(matvec=[1, 2], matmul=[3, 3, 3, 4], dequantize=[5, 5, 5, 5])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr("minilora.kernels.nf4_matvec.architecture", lambda _: 86)
    monkeypatch.setattr("minilora.kernels.nf4_matvec.shuffle_is_right", lambda _: False)
    monkeypatch.setattr(calibrate, "measure", lambda *_: {100: made})
    assert calibrate.main(["--out", str(out)]) == 0
    table = with_entry(json.loads(before), entry(86, "a card", {100: made}, None))
    assert capsys.readouterr().out == out.read_text() == as_text(table)
    assert TABLE.read_text() == before


def test_where_nothing_can_be_written_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert calibrate.main(["--out", str(tmp_path / "file" / "x.json")]) == 1
    assert capsys.readouterr().err.startswith(f"calibrate: {tmp_path}/file/x.json: ")


def test_weights_of_one_size_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """(N, K) and (K, N) are the same to `Limits`, so what both take counts, way by way."""
    us = {(64, 128): 1.0, (128, 64): 10.0, (64, 64): 100.0}

    def timed(ways: dict[str, list[Any]], *_: Any, **__: Any) -> dict[str, Timing]:
        x, weight = ways["matmul"][0].args[:2]
        return {way: Timing((i + len(x) * us[weight.shape],)) for i, way in enumerate(ways)}

    monkeypatch.setattr(calibrate, "in_turns", timed)
    monkeypatch.setattr(calibrate, "ROWS", (1, 3))
    grids = measure(torch.device("cpu"), False, list(us))
    assert grids == {
        64 * 128: {"matmul": {1: 11, 3: 33}, "dequantize": {1: 11 + 2, 3: 33 + 2}, "matvec": {1: 11 + 4}},
        64 * 64: {"matmul": {1: 100, 3: 300}, "dequantize": {1: 101, 3: 301}, "matvec": {1: 102}},
    }


@interpreted
def test_a_measurement_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ROWS", (1, 3))
    grids = measure(torch.device("cpu"), False, [(48, 128)])
    assert grids[48 * 128].keys() == {"matvec", "matmul", "dequantize"}
    assert grids[48 * 128]["matvec"].keys() == {1}
    assert grids[48 * 128]["matmul"].keys() == {1, 3}
