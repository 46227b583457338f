"""The test file: opened once, and whoever looks again is told so, in the run's folder and on its page."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import MakeConfig, Quiet

from minilora.base import Base
from minilora.cli import main
from minilora.config import DataConfig, RunConfig
from minilora.data.sources import fingerprints
from minilora.errors import UserError
from minilora.report.page import write_report
from minilora.train import looks as looks_module
from minilora.train.looks import looks, note_look, run_tested_on
from minilora.train.loop import fine_tune


def summary(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return document


@pytest.mark.parametrize("line", ["{}", "3", '{"command": "train", "figures": [1]}'])
def test_what_is_no_look_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "test_looks.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"test_looks\.jsonl: cannot be read: .*nobody knows"):
        looks(tmp_path)


def test_a_damaged_before_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text('{"data": []}')
    with pytest.raises(UserError, match=r"before\.json: data is \[\], as no run writes it"):
        run_tested_on(str(tmp_path / "before.json"), str(tmp_path / "adapter"))


def test_a_test_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text("text\nHi\n")
    (tmp_path / "before.json").write_text(
        json.dumps({"data": fingerprints(RunConfig(data=DataConfig(test=str(file))))})
    )
    other = file.rename(tmp_path / "renamed.txt")
    assert run_tested_on(str(other), str(tmp_path / "adapter")) == tmp_path.resolve()


@pytest.fixture
def unseen(data_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "test.jsonl"
    lines = (data_folder / "validation.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    return file


def test_a_run_looks_once_also_where_it_is_resumed_after_its_end(
    make_config: MakeConfig, quiet: Quiet, unseen: Path
) -> None:
    config = make_config(data__test=str(unseen))
    path = fine_tune(config, quiet).folder.path
    [look] = looks(path)
    assert look["command"] == "train"
    assert look["figures"] == summary(path)["test"]
    assert summary(path)["test_looks"] == 1
    fine_tune(config, quiet, resume=True)
    assert looks(path) == [look]
    assert summary(path)["test"] == look["figures"]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run whose test is a file."""
    (tmp_path / "before.json").write_text(json.dumps({"data": {"train": "0" * 64, "test": "1" * 64 + ".csv"}}))
    return tmp_path


def test_no_look_is_lost_where_several_look_at_once(begun: Path) -> None:
    with ThreadPoolExecutor(8) as several:
        said = list(several.map(lambda n: note_look(begun, f"evaluate {n}", {}), range(24)))
    assert sorted(look["command"] for look in looks(begun)) == sorted(f"evaluate {n}" for n in range(24))
    assert len({*said}) == 24


def test_a_look_is_written_down_where_folders_cannot_be_locked(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says of what is not open for writing")

    monkeypatch.setattr(looks_module.fcntl, "flock", refuses)
    assert note_look(begun, "evaluate", {}) is None
    assert [look["command"] for look in looks(begun)] == ["evaluate"]


def test_a_run_can_leave_it_closed_until_it_is_asked(make_config: MakeConfig, quiet: Quiet, unseen: Path) -> None:
    config = make_config(data__test=str(unseen))
    path = fine_tune(config, quiet, with_test=False).folder.path
    assert (summary(path)["test"], summary(path)["test_looks"], looks(path)) == ({}, 0, [])
    fine_tune(config, quiet, resume=True)
    assert len(looks(path)) == 1
    assert summary(path)["test"]["loss"] > 0


def test_whoever_evaluates_on_it_looks_again(
    make_config: MakeConfig, quiet: Quiet, unseen: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fine_tune(make_config(data__test=str(unseen)), quiet).folder.path
    write_report(path)
    assert "The test file was opened once." in (path / "report.html").read_text()
    flags = ["--adapter", str(path / "adapter"), "--eval.max_new_tokens", "4", "--eval.answers", "2"]
    assert main(["evaluate", str(data_folder / "validation.jsonl"), *flags]) == 0
    assert len(looks(path)) == 1, "another file"
    capsys.readouterr()

    moved = unseen.with_name("renamed.jsonl")  # it is known by its bytes
    unseen.rename(moved)
    assert main(["evaluate", str(moved), *flags]) == 0
    out, err = capsys.readouterr()
    assert "look 2 at the test file" in err
    assert err.count("\n") == 4, "device, memory, what is scored, and that"
    assert [look["command"].split()[0] for look in looks(path)] == ["train", "evaluate"]
    assert looks(path)[1]["figures"]["loss"] == json.loads(out)["loss"]
    assert looks(path)[1]["sha256"] == looks(path)[0]["sha256"]
    assert summary(path)["test_looks"] == 2
    assert "opened 2 times: only the first figure counts" in (path / "report.html").read_text()


def test_what_was_seen_is_shown_once_it_is_noted_and_before_it_is_drawn(
    make_config: MakeConfig, quiet: Quiet, unseen: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And nothing is looked at where that cannot be noted."""
    path = fine_tune(make_config(data__test=str(unseen)), quiet).folder.path

    def fail(*_: object) -> None:
        raise UserError("no page")

    monkeypatch.setattr("minilora.report.page.write_report", fail)
    command = ["evaluate", str(unseen), "--adapter", str(path / "adapter"), "--eval.answers", "0"]
    capsys.readouterr()
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["loss"] == looks(path)[1]["figures"]["loss"]
    assert "no page" in err
    monkeypatch.setattr(Base, "load", lambda _: pytest.fail("loaded"))
    monkeypatch.setattr(looks_module.os, "access", lambda *_: False)
    assert main(command) == 1
    assert "run: its test file may be looked at only where that can be written down" in capsys.readouterr().err
    assert len(looks(path)) == 2


def test_a_model_is_known_by_its_run_too(make_config: MakeConfig, quiet: Quiet, unseen: Path) -> None:
    path = fine_tune(make_config(data__test=str(unseen), train__strategy="full"), quiet).folder.path
    assert run_tested_on(str(unseen), str(path / "model")) == path
    assert run_tested_on(str(unseen), str(path.parent)) is None


def test_another_model_is_no_look_also_where_the_run_is_the_current_folder(
    make_config: MakeConfig, quiet: Quiet, unseen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fine_tune(make_config(data__test=str(unseen)), quiet).folder.path
    monkeypatch.chdir(path)
    for named in ([], ["--model.path", "demo"]):
        assert main(["evaluate", str(unseen), "--eval.answers", "0", *named]) == 0
    assert len(looks(path)) == 1


def test_a_damaged_list_is_not_begun_anew(make_config: MakeConfig, quiet: Quiet, unseen: Path) -> None:
    config = make_config(data__test=str(unseen))
    path = fine_tune(config, quiet).folder.path
    (path / "test_looks.jsonl").write_text('{"time": "20')
    with pytest.raises(UserError, match=r"test_looks\.jsonl: cannot be read.*nobody knows"):
        looks(path)


def test_a_look_may_hold_any_character(begun: Path) -> None:
    """Python's splitlines() takes some for line ends that JSON leaves as they are."""
    command = "evaluate a\u2028b\u0085c.jsonl"
    for n in (1, 2):
        note_look(begun, command, {"loss": 1.0})
        assert [look["command"] for look in looks(begun)] == [command] * n


def test_answers_are_written_line_by_line(make_config: MakeConfig, quiet: Quiet, data_folder: Path) -> None:
    run = fine_tune(make_config(eval__answers=3, eval__metrics=("exact_match", "f1", "bleu")), quiet)
    lines = [json.loads(line) for line in (run.folder.path / "generated.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{data_folder / 'validation.jsonl'}:{n}" for n in (1, 2, 3)]
    after = summary(run.folder.path)["after"]
    for metric in ("exact_match", "f1"):
        assert sum(line[metric] for line in lines) / 3 == pytest.approx(after[metric])
    assert [line["before"] for line in lines] == [a["given"] for a in run.before["answers"]]
    assert [line["after"] for line in lines] == [a.given for a in run.after]


def test_evaluate_writes_its_answers(
    make_config: MakeConfig, quiet: Quiet, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(fine_tune(make_config(), quiet).folder.path / "adapter")
    command = ["evaluate", str(data_folder / "validation.jsonl"), "--adapter", adapter, "--eval.max_new_tokens", "4"]
    command += ["--out", str(tmp_path / "answers.jsonl"), "--eval.metrics", '["rouge"]']
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == figures["answers"] == 6
    assert sum(line["rougeL"] for line in lines) / 6 == pytest.approx(figures["rougeL"])
    assert lines[0].keys() >= {"where", "prompt", "expected", "given"}
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:-1], '["blue"]']) == 2
    assert "names 'blue'" in capsys.readouterr().err
