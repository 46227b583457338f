"""What is shown: a line now and then in a file, a bar on a terminal, and a guess of the time left."""

import io
import os
import re
from typing import Any

import pytest

from minilora.report.console import Console
from minilora.train import progress
from minilora.train.progress import ConsoleReporter


def metrics(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, **more}


def timing(seconds: float, tokens: int = 100) -> dict[str, Any]:
    return {"seconds": seconds, "tok_per_s": tokens / seconds, "memory_bytes": 3e9}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the reporter sees; set clock[0]."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def plain() -> tuple[ConsoleReporter, io.StringIO]:
    out = io.StringIO()
    return ConsoleReporter(Console(file=out, width=200)), out


@pytest.mark.parametrize(
    ("n_steps", "n_lines", "first"), [(19, 19, "1"), (39, 20, "2"), (200, 20, "10"), (205, 19, "11")]
)
def test_a_file_gets_twenty_lines_at_most_the_last_among_them(
    clock: list[float], n_steps: int, n_lines: int, first: str
) -> None:
    reporter, out = plain()
    reporter.begin(0, n_steps)
    for step in range(1, n_steps + 1):
        clock[0] += 0.5
        reporter.step(metrics(step), timing(0.4))
    reporter.end()
    lines = out.getvalue().splitlines()
    assert len(lines) == n_lines
    left = 0.5 * (n_steps - int(first))
    assert lines[0] == f"step {first}/{n_steps}  loss 2.000  250 tok/s  3.00 GB  ETA {left:.0f} s"
    assert lines[-1].startswith(f"step {n_steps}/{n_steps} ")


def test_a_slow_machine_is_not_told_that_it_stands_still(clock: list[float]) -> None:
    reporter, out = plain()
    reporter.begin(0, 1)
    clock[0] += 300
    reporter.step(metrics(1), timing(300.0))
    assert " 0.3 tok/s " in out.getvalue()
    reporter.step(metrics(2), timing(300.0))
    assert out.getvalue().endswith("ETA 0 s\n"), "beyond the last step, as float16 may go, nothing is left"


def test_one_slow_step_does_not_spoil_the_guess(clock: list[float]) -> None:
    reporter, out = plain()
    reporter.begin(100, 200)
    for step in range(101, 121):
        clock[0] += 41 if step == 120 else 1
        reporter.step(metrics(step), timing(1.0))
    left = re.findall(r"step 120/200 .* ETA (\d+) s", out.getvalue())
    assert left == ["240"], "80 steps of (19 + 41) / 20 seconds: validation and saving count as well"


def test_the_last_validation_stays_in_sight(clock: list[float]) -> None:
    reporter, out = plain()
    reporter.begin(0, 2)
    clock[0] += 1
    reporter.step(metrics(1, val_loss=1.25), timing(1.0))
    reporter.step(metrics(2), timing(1.0))
    assert out.getvalue().count("val 1.250") == 2


def test_a_loss_that_is_no_number_is_shown(clock: list[float]) -> None:
    reporter, out = plain()
    reporter.begin(0, 1)
    clock[0] += 1
    reporter.step(metrics(1, loss=float("nan")), timing(1.0))
    assert "loss nan" in out.getvalue()


def test_text_is_no_markup() -> None:
    reporter, out = plain()
    reporter.say("[INST] [red]x[/red]")
    assert out.getvalue() == "[INST] [red]x[/red]\n"


class Full(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_full_disk_behind_the_output_ends_nothing(clock: list[float], on_terminal: bool) -> None:
    reporter = ConsoleReporter(Console(file=Full(), force_terminal=on_terminal, width=100))
    reporter.say("before")
    reporter.begin(0, 1)
    clock[0] += 1
    reporter.step(metrics(1), timing(1.0))
    reporter.end()


def test_a_reader_that_goes_away_ends_the_output_alone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        reporter = ConsoleReporter(Console(file=pipe))
        for _ in range(3):
            reporter.say("to nobody")
        assert reporter.console.quiet
        print("to nobody, without rich", file=pipe, flush=True)


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, force_terminal=True, width=100))
    reporter.begin(3, 10)
    reporter.step(metrics(4), timing(1.0))
    reporter.say("warning: something")
    reporter.end()
    reporter.end()
    assert "4/10" in out.getvalue()
    assert "loss 2.000" in out.getvalue()
