"""SIGINT, SIGTERM and SIGHUP, a closed terminal's, ask work to stop at its next safe place, between two steps or two
weights; a second one, of whatever kind, at once.

Nothing is raised where the signal falls: in the midst of starting a thread or taking a lock that breaks them.
"""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 - not an error
    """Work followed a signal and left all whole. The exit status is 128 + the signal's number, as a shell has it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


class StopRequest:
    """While entered, remembers the first signal; handlers are put back as they were at the end."""

    signum: int | None = None

    def follow(self, message: str) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum is not None:
            raise Stopped(message, self.signum)

    def __enter__(self) -> "StopRequest":
        heard = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # as under nohup
        self._old = {s: signal.signal(s, self._on_signal) for s in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        for heard in self._old:
            signal.signal(heard, signal.SIG_DFL)
        if os.isatty(1):  # who dies at the second cannot give back the cursor, which a bar has hidden
            os.write(1, b"\x1b[?25h")
