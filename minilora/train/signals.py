"""SIGINT and SIGTERM ask a run to stop after the step at hand, a second one at once; other work stops where it is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818 - not an error
    """A run followed a signal: all is saved. The exit status is 128 + the signal's number, as a shell has it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


@contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """While entered, a signal raises Stopped where the work stands, so that what is half done is cleaned up."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise Stopped(message, signum)

    old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


class StopRequest:
    """While entered, remembers the first signal; handlers are put back as they were at the end."""

    signum: int | None = None

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def follow(self, message: str) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum is not None:
            raise Stopped(message, self.signum)

    def __enter__(self) -> "StopRequest":
        self._old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
