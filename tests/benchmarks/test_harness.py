"""The harness measures what it says: steps in turns, memory of steps alone, failures on record."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import count_step, nf4_cpu, profile_step, sass, scaling, train_step
from benchmarks.harness import (
    ROOT,
    Contestant,
    Measured,
    Record,
    machine,
    race,
    ratio,
    rows_of,
    screen,
    started,
    write_result,
)

HERE = str(Path(__file__).parent)


def toy(function: str, **arguments: Any) -> Contestant:
    return Contestant(function, f"toys:{function}", arguments, {"PYTHONPATH": HERE})


def record(*seconds: float) -> Record:
    return Record("x", [Measured(s, 10, 20, {}) for s in seconds])


def test_alone_it_says_who_runs_it() -> None:
    command = [sys.executable, "-m", "benchmarks.harness"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "python -m benchmarks.train_step" in done.stderr


def test_steps_are_counted_and_arguments_arrive() -> None:
    with started([toy("counter"), toy("counter", start=100)]) as entrants:
        first, second = race(entrants, rounds=3, warm_ups=2, size=5)
    assert [step.result["done"] for step in first.steps] == [3, 4, 5]
    assert [step.result["done"] for step in second.steps] == [103, 104, 105]
    assert first.first
    assert first.first.result == {"done": 1, "arguments": {"size": 5}}
    assert all(step.seconds > 0 for step in first.steps)


def test_a_path_is_read_from_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("read")
    with started([toy("reader")]) as entrants:
        [found] = race(entrants, rounds=1, file="here.txt")
    assert found.steps[0].result == {"said": "read"}


def test_peak_memory_is_of_the_steps_and_not_of_building() -> None:
    with started([toy("hog", build_mb=300, step_mb=100)]) as entrants:
        [hog] = race(entrants, rounds=2)
    assert 95e6 < hog.peak_bytes - hog.rest_bytes < 130e6
    assert hog.steps[0].max_rss_bytes > 300e6  # which counts building


def test_who_fails_is_out_and_the_others_go_on() -> None:
    missing = Contestant("missing", "toys:nobody", {}, {"PYTHONPATH": HERE})
    with started([missing, toy("fails_in_step", after=3), toy("dies"), toy("counter")]) as entrants:
        missing_, fails, dies, counter = race(entrants, rounds=5, warm_ups=1)
    assert missing_.error == "AttributeError: module 'toys' has no attribute 'nobody'"
    assert fails.error == "ValueError: no such file: 'file.txt'"
    assert len(fails.steps) == 2
    assert dies.error == "ended with status 7: last words"
    assert "error" in dies.figures()
    assert len(counter.steps) == 5


def test_a_step_that_takes_too_long_fails() -> None:
    with started([toy("sleeps", seconds=30)]) as entrants:
        [slow] = race(entrants, rounds=1, step_cap_s=0.2)
    assert slow.error == "took longer than 0 s"


def test_a_race_ends_after_its_time_but_has_one_round() -> None:
    with started([toy("sleeps", seconds=0.05)]) as entrants:
        [slow] = race(entrants, rounds=50, warm_ups=0, cap_s=0.01)
    assert len(slow.steps) == 1


def test_the_time_of_a_race_begins_after_all_warm_ups() -> None:
    with started([toy("wakes", seconds=0.4)]) as entrants:
        [wakes] = race(entrants, rounds=3, warm_ups=2, cap_s=0.3)
    assert len(wakes.steps) == 3
    assert wakes.seconds < 0.3
    with started([toy("counter")]) as entrants:
        [counter] = race(entrants, rounds=3, warm_ups=2, cap_s=0.0)
    assert [step.result["done"] for step in counter.steps] == [3]


def test_a_slow_first_step_is_screened_by_itself() -> None:
    assert len(screen(toy("sleeps", seconds=0.05), steps=2, slow_s=0.01, step_cap_s=10).steps) == 1
    assert len(screen(toy("sleeps", seconds=0.01), steps=2, slow_s=10, step_cap_s=10).steps) == 2
    assert screen(toy("dies"), steps=2, slow_s=10, step_cap_s=10).error == "ended with status 7: last words"


def test_the_ratio_is_of_medians_with_the_spread_of_pairs() -> None:
    found = ratio(record(1.0, 2.0, 3.0), record(4.0, 4.0, 3.0))
    assert found["of_medians"] == 2.0
    assert found["of_pairs"] == {"min": 1.0, "quarter": 1.5, "three_quarters": 3.0, "max": 4.0}
    assert found["n_pairs"] == 3
    assert ratio(record(), record(1.0)) == {"n_pairs": 0}


def test_the_machine_is_described_without_names_and_paths() -> None:
    said = json.dumps(machine())
    assert platform.node() not in said
    assert "/" not in machine()["cpu"]
    assert {"cpu", "cores", "threads", "ram_gib", "python", "versions", "date", "commit", "dirty"} <= machine().keys()
    assert machine()["versions"]["torch"]


def test_results_are_rounded_sorted_and_stamped(tmp_path: Path) -> None:
    file = write_result("x", {"b": 1 / 3, "a": [2, {"c": 1e-9 / 7}], "rows": [{"what": "w"}]}, tmp_path / "x.json")
    text = file.read_text()
    assert text.endswith("}\n")
    result = json.loads(text)
    assert list(result) == sorted(result)
    assert result["b"] == 0.333333
    assert result["a"] == [2, {"c": 1.42857e-10}]
    assert result["machine"]["python"]
    [(line, source)] = rows_of(result)
    assert line == {"what": "w"}
    assert source["command"]


def test_parts_that_were_not_measured_anew_stay(tmp_path: Path) -> None:
    for value in (1, 2):
        write_result("x", {"parts": {f"part {value}": {"value": value}}}, tmp_path / "x.json")
    parts = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert {name: part["value"] for name, part in parts.items()} == {"part 1": 1, "part 2": 2}
    assert all(part["machine"] for part in parts.values())


@pytest.mark.parametrize("failed", [{"error": "e", "rows": []}, {"cases": {"a": {"ours": {"error": "e"}}}, "rows": []}])
def test_a_part_that_failed_takes_no_figures_place(
    failed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But that of a part that has none."""
    for whole, error in (({"rows": [{"what": "w"}]}, "first"), (failed, "second")):
        write_result("x", {"parts": {"whole": whole, "failed": {"error": error}}}, tmp_path / "x.json")
    parts = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert parts["failed"]["error"] == "second"
    assert parts["whole"]["rows"] == [{"what": "w"}]
    assert not parts["whole"].keys() & failed.keys() - {"rows"}
    assert capsys.readouterr().err == "x.json: whole failed, and keeps the figures that it had\n"


MEASURE = {nf4_cpu: "measure", profile_step: "measure", scaling: "measure", train_step: "measure"}
MEASURE |= {sass: "_cases", count_step: "differences"}


@pytest.mark.parametrize("module", MEASURE, ids=lambda module: module.__name__)
def test_where_nothing_can_be_written_nothing_is_measured(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, MEASURE[module], lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert module.main(["--out", str(tmp_path / "file" / "x.json")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{module.__name__.partition('.')[2]}: {tmp_path}/file/x.json: ")
    assert err.count("\n") == 1


def test_a_file_that_takes_no_parts_is_found_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "measure", lambda *_: pytest.fail("measured"))
    out = tmp_path / "x.json"
    out.write_text("{}")
    assert train_step.main(["--quick", "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f'train_step: {out}: is no object with "parts"')
