"""JSON: a stranger's, read within limits and refused in one line that names the file; ours, as the standard has it."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from minilora.errors import UserError

# Python's objects take thirty times the bytes of the text that they are read from. The longest header that is meant
# seriously, of a 22B in NF4 in one file, has 0.3 MB.
MAX_BYTES = 2_000_000
MAX_DEPTH = 100  # so that whoever goes through what was read cannot run out of stack either


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object that `file` holds. Raises UserError if it is missing, too large, or no JSON object."""
    if not os.path.isfile(file):  # a pipe or a device would block the reader or never end
        raise UserError(f"{file}: no such file")
    try:
        if (size := file.stat().st_size) > max_bytes:
            raise ValueError(f"{size:,} bytes, more than the {max_bytes:,} that are read")
        return parse_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable JSON file: {error}") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises ValueError for all else, keys that stand twice included.

    NaN and Infinity pass, as in Python's parser: whoever reads a number checks it and can name its key.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not a {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        parts = (part for held in level for part in (held.values() if isinstance(held, dict) else held))
        if not (level := [part for part in parts if isinstance(part, dict | list)]):
            return value
    raise ValueError("nested too deeply")


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write what `to_json` makes, in ASCII: a stranger's text may hold half of a surrogate pair."""
    file.write_text(to_json(values, indent=2, ascii_only=True) + "\n")


def to_json(document: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON as its standard has it: a number that is not finite becomes null."""
    finite = json.loads(json.dumps(document), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, ensure_ascii=ascii_only)


def short(value: object) -> str:
    """A value from a file as it is put into a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {short(twice)} stands twice")
    return made
