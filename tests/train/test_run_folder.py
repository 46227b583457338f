"""The run folder: whose it is, what may be deleted, and logs that survive a full disk."""

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from disks import dead_pid
from tiny_runs import MakeConfig, Quiet

from minilora.checkpoint.json_file import to_json
from minilora.checkpoint.write import atomic_folder
from minilora.config import RunConfig, to_dict
from minilora.errors import UserError
from minilora.report.facts import gather
from minilora.toml import config_toml
from minilora.train import run_folder
from minilora.train.loop import fine_tune
from minilora.train.run_folder import FILES, LEARNT, LineLog, RunFolder


def open_folder(config: RunConfig, resume: bool = False, overwrite: bool = False) -> RunFolder:
    return RunFolder(config, resume, overwrite)


@pytest.fixture
def a_run(make_config: MakeConfig, tmp_path: Path) -> Path:
    """What a finished run leaves, and a file and a folder of somebody else."""
    path = tmp_path / "run"
    for name in (*LEARNT, "checkpoints/step-00000001", "checkpoints/best-00000001"):
        with atomic_folder(path / name) as folder:
            (folder / "file").write_text(name)
    for name in ("tensorboard", "theirs"):
        (path / name).mkdir()
    (path / "tensorboard" / "events.out.tfevents.1.host").write_text("events")
    (path / "theirs" / "file").write_text("theirs")
    for name in (*FILES, "notes.txt", "my.png"):
        (path / name).write_text(name)
    (path / "config.toml").write_text(config_toml(make_config()))
    return path


def test_a_new_folder_is_made_with_its_parents(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(train__output=str(tmp_path / "a" / "b"))
    folder = open_folder(config)
    folder.begin(config)
    folder.close()
    assert tomllib.loads((tmp_path / "a" / "b" / "config.toml").read_text())["train"]["lr"] == config.train.lr


def test_an_empty_folder_is_as_good(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    open_folder(make_config()).close()
    open_folder(make_config()).close()  # what a start that failed leaves is nothing


def test_a_run_is_not_begun_again_unasked(make_config: MakeConfig, a_run: Path) -> None:
    with pytest.raises(UserError, match=r"run holds a run; add --resume .*, --overwrite"):
        open_folder(make_config())
    assert (a_run / "metrics.jsonl").read_text() == "metrics.jsonl"


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_else_s_folder_is_refused_in_any_case(
    make_config: MakeConfig, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty, and holds no run"):
        open_folder(make_config(), overwrite=overwrite)
    assert (tmp_path / "run" / "adapter").exists()


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(make_config: MakeConfig, a_run: Path) -> None:
    config = make_config(train__lr=0.5)
    folder = open_folder(config, overwrite=True)
    assert (a_run / "adapter" / "file").exists(), "nothing goes before the new run is set up"
    folder.begin(config)
    folder.close()
    assert {child.name for child in a_run.iterdir()} == {"config.toml", ".lock", "theirs", "notes.txt", "my.png"}
    assert (a_run / "theirs" / "file").exists()
    assert "lr = 0.5" in (a_run / "config.toml").read_text()


def test_what_lies_beside_checkpoints_and_figures_stays(make_config: MakeConfig, a_run: Path) -> None:
    theirs = [a_run / "checkpoints" / "step-old" / "file", a_run / "tensorboard" / "notes.txt"]
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    folder = open_folder(make_config(), overwrite=True)
    folder.begin(make_config())
    folder.close()
    assert all(file.exists() for file in theirs)
    assert folder.latest() is None
    assert [file.name for file in (a_run / "tensorboard").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", LEARNT)
def test_a_stranger_s_file_in_what_was_learnt_is_in_the_way(make_config: MakeConfig, a_run: Path, name: str) -> None:
    (a_run / name / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=rf"{name} is to be written anew, but minilora did not write thesis\.txt there"):
        open_folder(make_config(), overwrite=True)
    folder = open_folder(make_config(), resume=True)
    with pytest.raises(UserError, match="did not write thesis"):
        folder.begin(make_config())
    folder.close()
    assert (a_run / name / "thesis.txt").exists()
    assert folder.latest() is not None, "nothing was deleted"


@pytest.mark.parametrize("name", LEARNT)
def test_a_link_or_a_file_in_place_of_what_was_learnt_is_in_the_way(
    make_config: MakeConfig, a_run: Path, name: str
) -> None:
    (a_run / name).rename(a_run / "elsewhere")
    (a_run / name).symlink_to("elsewhere")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name} is to be written anew as a folder, but is a link or a file"):
            open_folder(make_config(), overwrite=True)
        (a_run / name).unlink()
        (a_run / name).write_text("mine")
    assert (a_run / "elsewhere" / "file").exists()


def test_a_config_toml_alone_is_no_run(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("somebody's")
    with pytest.raises(UserError, match="is not empty, and holds no run"):
        open_folder(make_config(), overwrite=True)
    with pytest.raises(UserError, match="no run to resume here"):
        open_folder(make_config(), resume=True)
    (tmp_path / "run" / ".lock").write_text("")  # as of a run that was killed before it had measured its base
    open_folder(make_config(), resume=True).close()


def test_resume_needs_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume here"):
        open_folder(make_config(), resume=True)
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite_contradict_each_other(make_config: MakeConfig, a_run: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        open_folder(make_config(), resume=True, overwrite=True)
    assert (a_run / "checkpoints" / "step-00000001" / "file").exists()


def test_a_file_is_no_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run is a file"):
        open_folder(make_config())
    with pytest.raises(UserError, match=r"cannot write here: Not a directory"):
        open_folder(make_config(train__output=str(tmp_path / "run" / "below")))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that even root cannot write to")
def test_where_nothing_can_be_written(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"/proc/minilora: cannot write here: .*; name another --train.output"):
        open_folder(make_config(train__output="/proc/minilora"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot write here: Permission denied"):
        open_folder(make_config())


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_do_not_share_a_folder(make_config: MakeConfig, a_run: Path, overwrite: bool) -> None:
    with (a_run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run writes here"):
            open_folder(make_config(), resume=not overwrite, overwrite=overwrite)
    assert (a_run / "checkpoints" / "step-00000001" / "file").exists()
    open_folder(make_config(), resume=True).close()


def test_a_folder_that_cannot_be_locked_or_swept(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails there, the line says what to do, and the lock's file is closed: the next one can have it."""

    def fails(at: object, *_: object) -> None:
        files.append(at)
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "run").mkdir()
    for module, name in ((fcntl, "flock"), (run_folder, "sweep_stale")):
        files: list[object] = []
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(UserError, match=r"run: cannot write here: Permission denied; name another --train\."):
                open_folder(make_config())
        assert all(getattr(file, "closed", True) for file in files)
        open_folder(make_config()).close()


def test_what_killed_processes_left_is_swept(make_config: MakeConfig, a_run: Path) -> None:
    dead = dead_pid()
    stale = [
        a_run / "checkpoints" / f".step-00000009.minilora-tmp-{dead}",
        a_run / f".adapter.minilora-tmp-{dead}",
    ]
    for folder in stale:
        folder.mkdir()
        (folder / "half").write_text("half")
    (a_run / f".summary.json.minilora-tmp-{dead}").write_text("{")
    aside = a_run / "checkpoints" / f".step-00000007.minilora-old-{dead}"
    aside.mkdir()
    folder = open_folder(make_config(), resume=True)
    folder.close()
    assert not any(path.exists() for path in (*stale, aside, a_run / f".summary.json.minilora-tmp-{dead}"))
    assert folder.latest() == a_run / "checkpoints" / "step-00000007", "what was set aside for a new one is back"


def test_the_latest_and_what_is_pruned(make_config: MakeConfig) -> None:
    folder = open_folder(make_config())
    assert folder.latest() is None
    for kind, step in (("step", 2), ("step", 10), ("step", 9), ("best", 8), ("best", 4), ("best", 11)):
        folder.checkpoint(kind, step).mkdir(parents=True)
    assert folder.latest() == folder.checkpoint("step", 10)
    folder.prune(2, 8)
    assert {c.name for c in folder.checkpoints.iterdir()} == {"step-00000009", "step-00000010", "best-00000008"}
    for step in (10, 11, 13):
        folder.checkpoint("best", step).mkdir()
    folder.drop_unsaved_best()
    assert {c.name for c in folder.checkpoints.glob("best*")} == {"best-00000008", "best-00000010"}
    folder.close()


def test_what_a_user_put_beside_the_checkpoints_is_none(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = open_folder(make_config())
    folder.begin(make_config())
    for step in (1, 2, 3):
        folder.checkpoint("step", step).mkdir(parents=True)
    theirs = ["step-old_copy", "best-old_copy", "best-1234567x", "step-00000000"]
    for name in theirs[:-1]:
        (folder.checkpoints / name).mkdir()
    (folder.checkpoints / theirs[-1]).symlink_to(tmp_path)
    (folder.checkpoints / "step-00000009").write_text("a file")
    assert folder.latest() == folder.checkpoint("step", 3)
    assert gather(folder.path)["latest_checkpoint"] == "step-00000003"
    folder.prune(1, 0)
    assert {c.name for c in folder.checkpoints.iterdir()} == {*theirs, "step-00000003", "step-00000009"}
    folder.close()


# --- Files ----------------------------------------------------------------------------------------------------------


def test_config_toml_is_the_configuration(make_config: MakeConfig) -> None:
    config = make_config(
        data__train='C:\\x "y" \u00e9\u4e2d \t.jsonl',
        data__validation=None,
        lora__targets=("q_proj",),
        train__lr=1e-300,
    )
    assert tomllib.loads(config_toml(config)) == to_dict(config)
    named = {
        line.removeprefix("# ").split()[0] for line in config_toml(config).splitlines() if line[:1] not in ("[", "")
    }
    assert named == {f.name for section in fields(config) for f in fields(getattr(config, section.name))}


def test_json_is_strict() -> None:
    text = to_json({"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": "NaN", "e": 3, "f": True, "g": "é"})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [None, 1.5, {"c": None}], "d": "NaN", "e": 3, "f": True, "g": "é",
    }  # fmt: skip


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_log_grows_and_is_cut(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "m.jsonl")
    sizes = []
    for step in range(4):
        assert log.append({"step": step}) is None
        sizes.append(log.size)
    assert sizes[-1] == (tmp_path / "m.jsonl").stat().st_size
    log.cut(sizes[1])
    log.append({"step": 9})
    assert lines(tmp_path / "m.jsonl") == [0, 1, 9]
    again = LineLog(tmp_path / "m.jsonl")
    again.append({"step": 10})
    assert lines(tmp_path / "m.jsonl") == [0, 1, 9, 10]


def test_lines_wait_while_they_cannot_be_written(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "logs" / "m.jsonl")
    trouble = log.append({"step": 0})
    assert trouble is not None
    assert "m.jsonl: No such file or directory; training goes on" in trouble
    assert log.append({"step": 1}) is None, "it is said once"
    assert log.size == 0
    (tmp_path / "logs").mkdir()
    assert log.append({"step": 2}) is None
    assert lines(log.path) == [0, 1, 2]
    assert log.size == log.path.stat().st_size
    log.path.unlink()
    log.path.mkdir()
    assert log.append({"step": 3}) is not None, "a new trouble is said anew"


def test_half_a_line_of_a_failed_write_is_written_over(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "m.jsonl")
    log.append({"step": 0})
    with log.path.open("ab") as file:
        file.write(b'{"st')
    log.append({"step": 1})
    assert lines(log.path) == [0, 1]


def test_a_log_that_vanished_or_shrank_is_not_filled_with_zeros(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "m.jsonl")
    log.append({"step": 0})
    log.path.unlink()
    log.append({"step": 1})
    assert lines(log.path) == [1]
    log.cut(log.size + 1000)  # a checkpoint that knows of lines which are lost
    log.append({"step": 2})
    assert lines(log.path) == [1, 2]
    log.path.unlink()
    log.cut(10)
    assert log.path.read_bytes() == b"", "a run has its logs"
    log.append({"step": 3})
    assert lines(log.path) == [3]


@pytest.mark.parametrize("lost", [1, 8, 100])
def test_a_log_is_cut_where_a_line_ends(tmp_path: Path, lost: int) -> None:
    """A checkpoint is on the disk, but the end of the lines before it was lost."""
    log = LineLog(tmp_path / "m.jsonl")
    for step in range(4):
        log.append({"step": step})
    size = log.size
    os.truncate(log.path, max(0, size - lost))
    log.cut(size)
    log.append({"step": 4})
    assert lines(log.path) == {1: [0, 1, 2, 4], 8: [0, 1, 2, 4], 100: [4]}[lost]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs RLIMIT_FSIZE")
def test_a_file_size_limit_stops_no_log(tmp_path: Path) -> None:
    """EFBIG comes in the middle of a line: the file keeps whole lines, and all are there once the limit is lifted."""
    code = f"""
import resource
from pathlib import Path
from minilora.train.run_folder import LineLog
log = LineLog(Path({str(tmp_path / "m.jsonl")!r}))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
said = [log.append({{"step": i}}) for i in range(20)]
assert sum(map(bool, said)) == 1 and "File too large" in "".join(filter(None, said)), said
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert log.append({{"step": 20}}) is None
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
    assert lines(tmp_path / "m.jsonl") == list(range(21))


def test_a_run_that_never_began_leaves_nothing(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        fine_tune(make_config(data__train="/nowhere.jsonl"), quiet)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="nowhere"):
        fine_tune(make_config(data__train="/nowhere.jsonl"), quiet)
    assert os.listdir(tmp_path / "run") == []  # it may be the folder that a shell is in
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")  # another run's: it stays
    with pytest.raises(UserError, match="nowhere"):
        fine_tune(make_config(data__train="/nowhere.jsonl"), quiet, overwrite=True)
    assert (tmp_path / "run" / "config.toml").exists()
