"""Tables of plain text, and a bar for what goes weight by weight, on a terminal."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Console", "Table", "say", "table", "weights_bar"]


class Console(rich.console.Console):
    """rich's, but a reader that goes away, as in `minilora ... | head`, ends the output and not the work."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # also for what is printed without rich


def say(console: rich.console.Console, text: str) -> None:
    """Print a plain text as it stands: not coloured, not folded, and what looks like markup in it is none."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain texts: what looks like rich's markup in them is shown as it stands."""
    filled = Table(*columns)
    for row in rows:
        filled.add_row(*map(escape, row))
    return filled


@contextmanager
def weights_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(weights done, weights in all): a bar on a terminal, at most ten lines in a file."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    began, tenths = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            nonlocal tenths
            per_s = done / (time.perf_counter() - began)
            speed = f"{per_s / 1e6:,.0f} million weights/s"
            bar.update(task, completed=done, total=total, description=speed)
            if not console.is_terminal and done * 10 // total > tenths:
                tenths = done * 10 // total
                say(console, f"{done / total:.0%}  {speed}  ETA {(total - done) / per_s:.0f} s")

        yield progress
