"""The test file is opened once a run. Who looks again is told, and the run remembers.

A figure on the test file says how the model does on what it has not seen, as long as nothing was decided by it. So a
run opens it last of all, and its folder keeps a line for each look in test_looks.jsonl: when (UTC), by which command,
the test's sha256 as before.json has it, by which `compare` tells that runs saw the same, and what was seen. A run that
is resumed after its end trains nothing more, so it shows what its look gave and does not look again.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minilora.checkpoint.files import sha256_of
from minilora.checkpoint.json_file import parse_object, read_json, short
from minilora.checkpoint.write import atomic_json, atomic_jsonl
from minilora.errors import UserError
from minilora.train.run_folder import RUN_BYTES

LOOKS = "test_looks.jsonl"
TRAIN = "train"  # the command of a run's own look


def run_tested_on(file: str, weights: str) -> Path | None:
    """The run that has `weights`, its adapter or model, in its folder and `file`, by its bytes, for its test file."""
    run = Path(weights).resolve().parent
    if not (run / "before.json").is_file():
        return None
    return run if sha256_of(file) in json.dumps(_data_of(run).get("test")) else None


def _data_of(run: Path) -> dict[str, Any]:
    """The fingerprints of the run's data."""
    data = read_json(run / "before.json", RUN_BYTES).get("data", {})
    if not isinstance(data, dict):
        raise UserError(f"{run / 'before.json'}: data is {short(data)}, as no run writes it; put the file back")
    return data


def check_notable(run: Path) -> None:
    """Before any work: raise UserError where a look could not be written down."""
    looks(run)
    if not os.access(run, os.W_OK):
        raise UserError(f"{run}: its test file may be looked at only where that can be written down; make it writable")


def looks(run: Path) -> list[dict[str, Any]]:
    """What was seen so far, the first look first. Raises UserError if the file is damaged."""
    try:
        noted = [parse_object(line) for line in (run / LOOKS).read_bytes().split(b"\n") if line]
        for look in noted:
            if "command" not in look or not isinstance(look.get("figures"), dict):
                raise ValueError(f"{short(look)} is no look")
        return noted
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{run / LOOKS}: cannot be read: {error}; nobody knows how often the test was seen") from None


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One process at a time: of two that write a look down at once, one would be lost, as where a file system (NFS)
    locks no folders."""
    folder = os.open(run, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def note_look(run: Path, command: str, figures: Mapping[str, Any]) -> str | None:
    """Add a look, also to the count in summary.json; return what is to be said of it, if it is not the first.

    Raises UserError if it cannot be written down: then nothing must be shown.
    """
    when, data = datetime.now(UTC).isoformat(timespec="seconds"), _data_of(run)
    sha256 = data.get("test", data.get("train"))  # a test that is split off has no file of its own
    with _alone(run):
        seen = [*looks(run), {"time": when, "command": command, "sha256": sha256, "figures": figures}]
        atomic_jsonl(run / LOOKS, seen)
        if (run / "summary.json").exists():
            atomic_json(run / "summary.json", read_json(run / "summary.json") | {"test_looks": len(seen)})
    if len(seen) == 1:
        return None
    return f"this is look {len(seen)} at the test file of {run}: its figure no longer counts as unseen"
