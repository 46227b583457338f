"""Contestants for the tests of the harness: what their processes do is known beforehand."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def counter(start: int = 0) -> Callable[..., dict[str, Any]]:
    """Counts its steps, and prints, which must not reach the parent's pipe."""
    done = start

    def step(**arguments: Any) -> dict[str, Any]:
        nonlocal done
        done += 1
        print("noise")
        return {"done": done, "arguments": arguments}

    return step


def reader() -> Callable[[str], dict[str, str]]:
    """Reads a file that it is told of."""
    return lambda file: {"said": Path(file).read_text()}


def hog(build_mb: int, step_mb: int) -> Callable[[], None]:
    """Takes memory while it is built and gives it back; takes other memory in each step."""
    _take(build_mb)

    def step() -> None:
        _take(step_mb)

    return step


def _take(megabytes: int) -> None:
    taken = bytearray(b"x") * (megabytes * 1_000_000)
    time.sleep(0.1)
    del taken


def fails_in_step(after: int) -> Callable[[], None]:
    left = after

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("first line\nno such file: '/home/someone/secret/file.txt'")

    return step


def dies() -> Callable[[], None]:
    def step() -> None:
        os.write(2, b"last words\n")
        os._exit(7)

    return step


def wakes(seconds: float) -> Callable[[], None]:
    """Slow in its first two steps."""
    left = 2

    def step() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            time.sleep(seconds)

    return step


def sleeps(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)
