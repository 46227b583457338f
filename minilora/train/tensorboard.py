"""A run's figures for TensorBoard, written by its own library: `tensorboard --logdir RUN` shows them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@contextmanager
def scalars(folder: Path | None, next_step: int, say: Callable[[str], None]) -> Iterator[Callable[[Record], None]]:
    """Yield log(record): every number of a record as a scalar of its name, at the record's step.

    next_step: what an earlier process wrote from this step on is void, see SummaryWriter's purge_step
    folder: None logs nothing
    A disk that is full ends the logging, which `say` is told, and not the training.
    """
    if folder is None:
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writers, failed = list[SummaryWriter](), False

    def attempt(action: Callable[[], None]) -> None:
        nonlocal failed
        try:
            if not failed:
                action()
        except OSError as error:
            failed = True
            say(f"warning: {folder}: {error.strerror or error}; training goes on without TensorBoard")

    def write(record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                writers[0].add_scalar(name, value, record["step"])
        writers[0].flush()

    attempt(lambda: writers.append(SummaryWriter(str(folder), purge_step=next_step)))
    try:
        yield lambda record: attempt(lambda: write(record))
    finally:
        attempt(lambda: writers[0].close())
