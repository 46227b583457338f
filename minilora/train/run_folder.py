"""The files of a run, and who may write them.

config.toml     complete and re-runnable          metrics.jsonl   a line a step, the same in every run of a seed
before.json     measured before the first step    timing.jsonl    a line a step: seconds, tokens/s, memory
checkpoints/    step-00000100/, best-00000050/    test_looks.jsonl   a line a look at the test file, see looks.py
tensorboard/    if train.tensorboard asks for it   generated.jsonl    a line an answer, before and after
validation.jsonl   where data.validation_share drew it; a merge is audited on it
at the end      summary.json, samples.md, report.html, *.png, and what was learnt: adapter/ or model/
"""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from minilora.checkpoint.adapter import adapter_folder
from minilora.checkpoint.json_file import read_json, to_json
from minilora.checkpoint.write import atomic_json, atomic_write, not_ours, sweep_stale
from minilora.config import RunConfig, base_folder
from minilora.data.sources import FILE_KEYS, sources
from minilora.errors import UsageError, UserError
from minilora.toml import config_toml

LOCK, HELD_OUT = ".lock", "validation.jsonl"
RUN_BYTES = 100_000_000  # of a file of JSON: before.json holds all answers
LEARNT = ("adapter", "model", "merged")
SIGNS = (LOCK, "before.json", "metrics.jsonl", "checkpoints")  # that a config.toml is a run's
FILES = (
    "config.toml", "before.json", "metrics.jsonl", "timing.jsonl", "summary.json", "samples.md",
    "generated.jsonl", "test_looks.jsonl", HELD_OUT, "report.html", "loss.png", "learning_rate.png", "speed.png",
)  # fmt: skip


class LineLog:
    """A JSONL file that grows by lines. A full disk must not end training: they wait until they can be written."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, b""
        self.size = path.stat().st_size if path.exists() else 0

    def append(self, record: dict[str, Any]) -> str | None:
        """Write the record and all that waits; return what went wrong, if it did for the first time."""
        in_trouble = bool(self.waiting)
        self.waiting += to_json(record).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                whole = min(self.size, file.tell())
                file.truncate(whole)  # half a line, from a write that failed
                file.write(self.waiting)
        except OSError as error:
            return None if in_trouble else f"{self.path}: {error.strerror}; training goes on, its lines wait in memory"
        self.size = whole + len(self.waiting)
        self.waiting = b""
        return None

    def cut(self, size: int) -> None:
        """Keep only the whole lines in the first `size` bytes, up to the checkpoint that a run goes on from. They may
        be fewer: never written, or lost with the power. A file that is gone is made."""
        with self.path.open("ab+") as file:
            file.seek(0)
            self.size, self.waiting = file.read(size).rfind(b"\n") + 1, b""
            file.truncate(self.size)

    def sync(self) -> int:
        """Wait until the lines are on the disk; return how many bytes they take."""
        with suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.size


def bytes_in(folder: Path) -> int:
    """Of all files in a folder, which need not be there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class RunFolder:
    """A run's folder, held by one process at a time."""

    def __init__(self, config: RunConfig, resume: bool, overwrite: bool) -> None:
        """Make the folder or go on in it; what it holds stays. Raises UserError if it cannot be had, or is in use."""
        refuse_output(config, resume, overwrite)
        self.path = path = Path(config.train.output)
        self.is_new, self.checkpoints = not path.exists(), path / "checkpoints"
        self._lock = hold(path, "run", "--train.output")
        self.metrics, self.timing = LineLog(path / "metrics.jsonl"), LineLog(path / "timing.jsonl")

    def begin(self, config: RunConfig) -> None:
        """Delete what an earlier run wrote, and write the configuration: now the folder is the new run's.

        Raises UserError, and deletes nothing, as `refuse_strangers`.
        """
        refuse_strangers(self.path)
        try:
            data = config_toml(config).encode()
        except UnicodeEncodeError as error:  # the bytes of a file's name need not be text
            raise UserError(f"{self.path}: the configuration cannot be written as TOML: {error}") from error
        self._remove_run()
        atomic_write(self.path / "config.toml", data)

    def _remove_run(self) -> None:
        """Delete what a run wrote, and nothing that somebody else put there."""
        board = self.path / "tensorboard"
        for folder in (*(self.path / name for name in LEARNT), *self._all("step"), *self._all("best")):
            shutil.rmtree(folder, ignore_errors=True)
        # The first, config.toml, is replaced in one move: a kill here must leave a folder that can be resumed.
        for file in (*(self.path / name for name in FILES[1:]), *board.glob("events.out.tfevents.*")):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, board):
            with suppress(OSError):  # there is none, or something of a user's in it
                folder.rmdir()

    def close(self) -> None:
        """Let others write here. A run that never began leaves nothing, not even an empty folder that it made."""
        with suppress(OSError):
            if [child.name for child in self.path.iterdir()] == [LOCK]:
                (self.path / LOCK).unlink()
                if self.is_new:
                    self.path.rmdir()
        self._lock.close()

    def checkpoint(self, kind: str, step: int) -> Path:
        """The folder of the "step" or "best" checkpoint of a step."""
        return self.checkpoints / f"{kind}-{step:08d}"

    def latest(self) -> Path | None:
        """The last "step" checkpoint, if there is one."""
        return max(self._all("step"), default=None)

    def _all(self, kind: str) -> list[Path]:
        """Checkpoints in their order; copies and links that a user made beside them are none."""
        matches = sorted(self.checkpoints.glob(f"{kind}-{'[0-9]' * 8}"))
        return [path for path in matches if path.is_dir() and not path.is_symlink()]

    def prune(self, keep: int, best: int) -> None:
        """Delete all but the last `keep` "step" checkpoints and the "best" one of that step."""
        best_ones = [path for path in self._all("best") if path != self.checkpoint("best", best)]
        for old in (*self._all("step")[:-keep], *best_ones):
            shutil.rmtree(old)

    def drop_unsaved_best(self) -> None:
        """Delete the "best" checkpoints since the last "step" one, from which a run would go on without them."""
        latest = self.latest()
        for path in self._all("best"):
            if latest is None or path.name.removeprefix("best") > latest.name.removeprefix("step"):
                shutil.rmtree(path)

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        atomic_json(self.path / name, document)

    def read_json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name, RUN_BYTES)


def hold(folder: Path, work: str, option: str) -> TextIO:
    """Make the folder, if it is not there, lock it until the file is closed, and put right what killed processes left.

    work: what is done there, by one process at a time; option: names the folder

    Raises UserError if it cannot be made or written to, or another process holds it.
    """
    lock: TextIO | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for written in (folder, folder / "checkpoints"):
            sweep_stale(written)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cannot = f"cannot write here: {getattr(error, 'strerror', error)};"
        why = f"another {work} writes here; wait for it, or" if isinstance(error, BlockingIOError) else cannot
        if lock is not None:
            lock.close()
        raise UserError(f"{folder!s:.200}: {why} name another {option}") from error
    return lock


def refuse_both(resume: bool, overwrite: bool) -> None:
    """Raise UsageError if both are asked for."""
    if resume and overwrite:
        raise UsageError("--resume goes on and --overwrite begins anew; give one of them")


def refuse_output(config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Raise UserError if a run so begun cannot have `train.output`: it is taken, or no run's."""
    refuse_both(resume, overwrite)
    path = Path(config.train.output)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder with --train.output")
    begun = (path / "config.toml").exists() and any((path / sign).exists() for sign in SIGNS)
    if resume and not begun:
        raise UserError(f"{path}: no run to resume here; leave --resume out to begin one")
    if begun and not resume and not overwrite:
        raise UserError(f"{path} holds a run; add --resume to go on, --overwrite to begin anew, or --train.output")
    if not begun and path.exists() and {child.name for child in path.iterdir()} - {LOCK}:
        raise UserError(f"{path} is not empty, and holds no run; name another folder with --train.output")
    if overwrite:
        _refuse_own_sources(path, config)
        refuse_strangers(path)


def refuse_strangers(path: Path) -> None:
    """Raise UserError if a folder of what was learnt, which a new run deletes, holds somebody else's file."""
    for name in LEARNT:
        refuse_theirs(path / name)


def refuse_theirs(folder: Path) -> None:
    """Raise UserError if what is to be replaced is no folder, or holds a file that its manifest does not list."""
    if folder.is_symlink() or folder.is_file():
        raise UserError(f"{folder} is to be written anew as a folder, but is a link or a file: move it away")
    if others := not_ours(folder):
        raise UserError(f"{folder} is to be written anew, but minilora did not write {others[0]} there: move it away")


def _refuse_own_sources(path: Path, config: RunConfig) -> None:
    """Raise UserError if beginning anew would delete what the new run is made from."""
    files = [source.path for key in FILE_KEYS for source in sources(getattr(config.data, key))]
    named = filter(None, (config.model.path, config.model.tokenizer, config.eval.probes, *files))
    places = [(source, base_folder(source)) for source in named]
    if begun := config.train.adapter:
        folder = adapter_folder(begun)
        places += [(begun, place) for place in (folder, *folder.glob("*"))]
    for source, place in places:
        if place.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{source} lies in {path}, which would be begun anew; name another --train.output")
