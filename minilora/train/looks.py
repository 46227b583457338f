"""The test file is opened once a run. Who looks again is told, and the run remembers.

A figure on the test file says how the model does on what it has not seen, as long as nothing was decided by it. So a
run opens it last of all, and its folder keeps a line for each look in test_looks.jsonl: when (UTC), by which command,
the file's sha256, and what was seen. A run that is resumed after its end trains nothing more, so it shows what its look
gave and does not look again.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.write import atomic_write
from minilora.data.records import data_fingerprint
from minilora.errors import UserError
from minilora.train.run_folder import RUN_BYTES, to_json

LOOKS = "test_looks.jsonl"
TRAIN = "train"  # the command of a run's own look


def run_tested_on(file: str, weights: str | None) -> Path | None:
    """The run that has `weights`, its adapter or model, in its folder and `file`, by its bytes, for its test file."""
    run = Path(weights).resolve().parent if weights else Path()
    if not weights or not (run / "before.json").is_file():
        return None
    test = read_json(run / "before.json", RUN_BYTES).get("data", {}).get("test")
    return run if data_fingerprint(file) in json.dumps(test) else None


def looks(run: Path) -> list[dict[str, Any]]:
    """What was seen so far, the first look first. Raises UserError if the file is damaged."""
    try:
        return [json.loads(line) for line in (run / LOOKS).read_text("utf-8").split("\n") if line]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{run / LOOKS}: cannot be read: {error}; nobody knows how often the test was seen") from None


def note_look(run: Path, command: str, sha256: Any, figures: Mapping[str, Any]) -> str | None:
    """Add a look, also to the count in summary.json; what is to be said of it, if it is not the first.

    Raises UserError if it cannot be written down: then nothing must be shown.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    seen = [*looks(run), {"time": when, "command": command, "sha256": sha256, "figures": figures}]
    atomic_write(run / LOOKS, "".join(to_json(look) + "\n" for look in seen))
    if (run / "summary.json").exists():
        summary = read_json(run / "summary.json") | {"test_looks": len(seen)}
        atomic_write(run / "summary.json", to_json(summary, indent=1) + "\n")
    if len(seen) == 1:
        return None
    return f"this is look {len(seen)} at the test file of {run}: its figure no longer counts as unseen"
