"""What `minilora inspect` prints: the facts about a path, a line each, so that other programs can search them."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from minilora.memory import as_text
from minilora.report.console import Console

_LONGEST = 300


def show_facts(facts: dict[str, Any], console: Console) -> None:
    """Print the facts of `report.facts.gather`; whether it would load, only if so: else that is an error's line."""
    console.print(Text(f"{facts['kind']}  {facts['path']}", "bold"), highlight=False, soft_wrap=True)
    for key, text in _lines({name: value for name, value in facts.items() if name not in ("path", "kind", "reason")}):
        console.print(Text(f"{key:18}", "bold"), text, highlight=False, markup=False, soft_wrap=True)
    if facts["reason"] is None:
        console.print("would load: yes", highlight=False)


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and text of each line; the key stands on the first of its lines."""
    for key, value in facts.items():
        n_bytes = key in ("bytes", "files", "memory_at_load", "peak_memory_bytes")
        inner = value if isinstance(value, dict | list) else [value]
        parts = list(inner.items()) if isinstance(inner, dict) else [("", part) for part in inner]
        for i, (name, part) in enumerate(parts):
            yield "" if i else key.replace("_", " "), f"{name}  {_text(part, n_bytes)}".lstrip()


def _text(value: Any, n_bytes: bool = False) -> str:
    """A value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner, key == 'bytes')}" for key, inner in value.items())
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{len(value):,} characters"
    if isinstance(value, bool) or not isinstance(value, int):
        return " ".join(str(value).split())
    return as_text(value) if n_bytes and value >= 1e6 else f"{value:,}{' bytes' if n_bytes else ''}"
