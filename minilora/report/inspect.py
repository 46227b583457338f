"""What `minilora inspect` prints: the facts about a path, a line each, so that other programs can search them; on a
terminal long ones are folded."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from rich.text import Text

from minilora.errors import printable
from minilora.memory import as_text
from minilora.report.console import Console

_LONGEST, _BEFORE = 300, 19  # characters, of a value and before it
_EMPTY: tuple[Any, ...] = (None, "", {}, [])


def show_facts(facts: dict[str, Any], console: Console) -> None:
    """Print the facts of `report.facts.gather`, those of a run's result after its own; whether it would load, only if
    so: else that is an error's line."""
    console.print(Text(f"{facts['kind']}  {printable(facts['path'])}", "bold"), highlight=False, soft_wrap=True)
    width = max(40, console.width - _BEFORE) if console.is_terminal else 1_000_000
    for key, text in _lines({k: fact for k, fact in facts.items() if k not in ("path", "kind", "reason", "result")}):
        lines = wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        text = f"\n{'':{_BEFORE}}".join(lines)
        console.print(Text(f"{key:{_BEFORE - 1}}", "bold"), text, highlight=False, markup=False, soft_wrap=True)
    if "result" in facts:
        show_facts(facts["result"], console)
    elif facts["reason"] is None:
        console.print("would load: yes", highlight=False)


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and text of each line; the key stands on the first of its lines."""
    for key, value in facts.items():
        n_bytes = key in ("bytes", "files", "memory_at_load", "peak_memory_bytes")
        listed = [("", part) for part in value] if isinstance(value, list) else _parts(value)
        for i, (name, part) in enumerate(listed):
            yield "" if i else key.replace("_", " "), f"{printable(name)}  {_text(part, n_bytes)}".lstrip()


def _parts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A value by its name, but what holds dictionaries, and what has no name, part by part. Empty ones tell nothing."""
    if isinstance(value, dict) and (not name or any(isinstance(part, dict) and part for part in value.values())):
        for key, part in value.items():
            if part not in _EMPTY:
                yield from _parts(part, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _text(value: Any, n_bytes: bool = False) -> str:
    """A value in one line."""
    if isinstance(value, dict):
        parts = ((key, part) for key, part in value.items() if part not in _EMPTY)
        return ", ".join(f"{printable(key)} {_text(part, key == 'bytes')}" for key, part in parts)
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{len(value):,} characters"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return as_text(value) if n_bytes and value >= 1e6 else f"{shown}{' bytes' * n_bytes}"
