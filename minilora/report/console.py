"""Tables on a terminal: the one place, beside the progress bar, that knows rich."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Console", "Table", "table"]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain texts: what looks like rich's markup in them is shown as it stands."""
    made = Table(*columns)
    for row in rows:
        made.add_row(*map(escape, row))
    return made
