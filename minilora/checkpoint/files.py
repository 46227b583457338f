"""Files that somebody else wrote, read whole: an error names the file that was read, never one that is written."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from minilora.errors import UserError


@contextmanager
def reading(file: str | Path) -> Iterator[BufferedReader]:
    """Yield the file, opened; every OSError within is taken for its own. Raises UserError if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            yield opened
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def sha256_of(file: str | Path) -> str:
    """The sha256 of the file's bytes, in hexadecimal. Raises UserError if it cannot be read."""
    with reading(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def copy_file(source: str | Path, target: Path) -> None:
    """Make `target` a copy of a small file. UserError if that cannot be read, OSError if it cannot be written."""
    with reading(source) as opened:
        data = opened.read()
    target.write_bytes(data)
