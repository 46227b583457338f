"""samples.md: what was asked and answered, as tables of Markdown, which `page.py` reads again."""

from collections.abc import Iterable, Sequence


def markdown_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table under a title; "" where it would have no rows."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
    return "\n".join([f"# {title}", "", lines[0], "|" + "---|" * len(head), *lines[1:], ""]) if lines[1:] else ""


def _cell(text: str) -> str:
    return "<br>".join(text.strip().replace("|", "\\|").splitlines())
