"""A reader in a forked process, watched from outside: how long each case takes, how much memory, how it ends.

    child   ready ->          reads          done, outcome ->   checks     verdict ->   ready -> ...
    parent        <- go, clock and peak set to zero        <- go on, both read

The peak is the kernel's own (VmHWM, which /proc/PID/clear_refs sets back), less what was resident before: nothing that
is taken and given back between two looks escapes. The time is its main thread's on a core, by the kernel as well, so
that a busy machine makes no findings; who waits and does nothing is killed after ten seconds. A child that dies is
buried, and the next one goes on with the next case. Limits of the kernel stand behind that.
"""

import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SECONDS, MAX_BYTES = 1.0, 200_000_000
GIVE_UP_SECONDS = 10.0  # for a case, and for what checks it
BACKSTOP_BYTES = 4 << 30  # of addresses, beyond those of the process
MAX_TEXT = 2000  # characters of an error's line

Case = Callable[[int], tuple[Callable[[], Any], Callable[[Any], None]]]


class RefusedError(Exception):
    """Of a reader: the file is refused in the type of error that it promises. Carries the message."""


class WrongError(Exception):
    """Of a check: what was loaded is not what the files say."""


@dataclass(frozen=True)
class Outcome:
    """kind: "loaded", "refused", or what is a finding; text: what is said of it; where: file:line of the package."""

    case: int
    kind: str
    text: str
    seconds: float
    peak_bytes: int
    where: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("loaded", "refused")


def outcomes(case: Case, numbers: Iterable[int]) -> Iterator[Outcome]:
    """What becomes of each case.

    case(n) prepares: it gives what is watched, which returns what was loaded or raises RefusedError, and the check of
        that, which raises WrongError
    """
    left = list(numbers)
    while left:
        child = _Child(case, left)
        try:
            while left:
                yield (outcome := child.outcome(left.pop(0)))
                if outcome.is_finding:  # so that nothing of it is carried on
                    break
        finally:
            child.end()


class _Child:
    def __init__(self, case: Case, numbers: list[int]) -> None:
        (self._in, theirs_out), (theirs_in, self._out) = os.pipe(), os.pipe()
        sys.stdout.flush()
        with warnings.catch_warnings():  # from 3.12 on it warns of threads that the child lacks; none holds a lock here
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self._in)
            os.close(self._out)
            _serve(case, numbers, theirs_in, theirs_out)
        os.close(theirs_in)
        os.close(theirs_out)
        self._status, self._unread = Path(f"/proc/{self.pid}/status"), b""

    def outcome(self, number: int) -> Outcome:
        if (said := self._hear(6 * GIVE_UP_SECONDS)) != {"ready": number}:
            return Outcome(number, "no case", f"it could not be made: {said}", 0.0, 0)
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        rest = self._kilobytes("VmRSS")
        began = self._seconds()
        os.write(self._out, b"g")
        said = self._hear(GIVE_UP_SECONDS)
        seconds, peak = self._seconds() - began, (self._kilobytes("VmHWM") - rest) * 1024
        if "kind" not in said:
            return Outcome(number, said.get("died", "hangs"), str(said), seconds, max(0, peak))
        os.write(self._out, b"g")
        verdict = self._hear(6 * GIVE_UP_SECONDS)
        kind, text, where = (
            verdict.get("kind", "the check failed"),
            verdict.get("text", str(verdict)),
            verdict.get("where"),
        )
        if kind in ("loaded", "refused") and peak > MAX_BYTES:
            kind, text = "too large", f"{peak:,} bytes: {text}"
        if kind in ("loaded", "refused") and seconds > MAX_SECONDS:
            kind, text = "too slow", f"{seconds:.1f} s: {text}"
        return Outcome(number, kind, text, seconds, peak, where or "")

    def _hear(self, seconds: float) -> dict[str, Any]:
        """The child's next line; {} if none comes in time, {"died": how} if it has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                return {}
            if not (read := os.read(self._in, 1 << 16)):
                _, status = os.waitpid(self.pid, 0)
                self.pid, code = 0, os.waitstatus_to_exitcode(status)
                return {"died": f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"}
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _seconds(self) -> float:
        """That the child was on a core so far."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        except OSError:
            return 0.0

    def _kilobytes(self, name: str) -> int:
        try:
            _, _, after = self._status.read_text().partition(f"{name}:")
        except OSError:  # it has gone
            return 0
        return int(after.split(maxsplit=1)[0]) if after else 0

    def end(self) -> None:
        os.close(self._in)
        os.close(self._out)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _serve(case: Case, numbers: list[int], orders: int, answers: int) -> None:
    """The child's side. Never returns."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # what libraries write there
            os.dup2(nowhere, stream)
        addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + BACKSTOP_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("error")
        gc.freeze()  # else each collection copies the parent's pages
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what the parent's heap has free would hide what a case takes
        for number in numbers:
            read, check = case(number)
            _say(answers, {"ready": number})
            os.read(orders, 1)
            said, loaded = _tried(read)
            _say(answers, {"kind": said["kind"]})
            os.read(orders, 1)
            if said["kind"] == "loaded":
                said, _ = _tried(lambda check=check, loaded=loaded: check(loaded))  # type: ignore[misc]
            del loaded
            _say(answers, said)
    except BaseException:
        _say(answers, {"kind": "no case", "text": traceback.format_exc()})
    finally:
        os._exit(3)


def _tried(work: Callable[[], Any]) -> tuple[dict[str, str], Any]:
    """How it ends, and what it gives."""
    try:
        return {"kind": "loaded", "text": "", "where": ""}, work()
    except RefusedError as error:
        text = str(error)
        if not text.isprintable() or len(text) > MAX_TEXT:
            return {"kind": "bad message", "text": f"{len(text):,} characters: {text[:300]!r}", "where": ""}, None
        return {"kind": "refused", "text": text, "where": ""}, None
    except WrongError as error:
        return {"kind": "wrong", "text": str(error)[:1000], "where": ""}, None
    except BaseException as error:  # whatever it is, it is no answer
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/minilora/" in f.filename]
        return {"kind": type(error).__name__, "text": str(error)[:1000], "where": ours[-1] if ours else ""}, None


def _say(answers: int, message: dict[str, Any]) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")
