"""What verbs and a terminal tell each other: tables, warnings, how far work has come, and lines that are typed."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from minilora.train.signals import StopRequest

if TYPE_CHECKING:
    from minilora.report.console import Console


def console() -> "Console":
    """A terminal's; for a file or a pipe, one wide enough for every table."""
    from minilora.report.console import Console

    if not os.environ.get("COLUMNS", "").strip("0"):  # a width of 0 is not known
        os.environ.pop("COLUMNS", None)
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)


def note(text: str) -> None:
    """A line beside the output."""
    print(text, file=sys.stderr, flush=True)


def warn(said: Sequence[str]) -> None:
    """Each in a line beside the output."""
    for warning in said:
        note(f"warning: {warning}")


@contextmanager
def progress(out: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(weights done, weights in all), at which a signal stops the work: `out` is not written then."""
    from minilora.report.console import weights_bar

    with StopRequest() as stop, weights_bar(console()) as bar:

        def tell(done: int, of: int) -> None:
            bar(done, of)
            stop.follow(f"{out}: stopped, nothing was written")

        yield tell


def typed() -> Iterator[str]:
    """The lines of the input until it ends; a terminal's are asked for, and edited where there is a library for it."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines by it
    with suppress(EOFError):
        while True:
            yield input("> " * sys.stdin.isatty())
