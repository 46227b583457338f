"""What is shown while a run goes on: a bar on a terminal, a line now and then in a file."""

import time
from collections import deque
from contextlib import suppress
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minilora.report.console import Console

PLAIN_LINES = 20  # at most, in a whole run, where the output is no terminal
RECENT = 50  # steps that speed and time left are told from


class ConsoleReporter:
    """The `Reporter` of the command line. What cannot be shown, such as for a full disk, must not end training."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._val_loss = ""
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT)  # tokens, seconds, and those in all

    def say(self, text: str) -> None:
        style = "yellow" if text.startswith("warning") else ""
        with suppress(OSError):
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def begin(self, step: int, n_steps: int) -> None:
        self._n_steps, self._last = n_steps, time.perf_counter()
        self._task = self._bar.add_task("", total=n_steps, completed=step)
        with suppress(OSError):
            self._bar.start()

    def step(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        if "val_loss" in metrics:
            self._val_loss = f"  val {metrics['val_loss']:.3f}"
        now = time.perf_counter()
        self._recent.append((timing["tok_per_s"] * timing["seconds"], timing["seconds"], now - self._last))
        self._last = now
        tokens, in_steps, in_all = map(sum, zip(*self._recent, strict=True))
        memory = f"{timing['memory_bytes'] / 1e9:.2f} GB"
        rate = f"{tokens / in_steps:,.{0 if tokens >= 10 * in_steps else 1}f} tok/s"
        text = f"loss {metrics['loss']:.3f}{self._val_loss}  {rate}  {memory}"
        step = metrics["step"]
        self._bar.update(self._task, completed=step, description=text)
        is_due = step % -(-self._n_steps // PLAIN_LINES) == 0 or step == self._n_steps
        if is_due and not self.console.is_terminal:
            left = max(0, self._n_steps - step) * in_all / len(self._recent)  # validation and saving count, too
            self.say(f"step {step}/{self._n_steps}  {text}  ETA {left:.0f} s")

    def end(self) -> None:
        if self._bar.live.is_started:
            with suppress(OSError):
                self._bar.stop()
