"""Figures as they are shown: in words, and which of them are better the lower they are."""

from collections.abc import Mapping
from typing import Any

LOWER_IS_BETTER = ("loss", "perplexity", "error_rate")  # how the names of such figures end


def label(name: str, adapter: object) -> str:
    """What is shown above the figures of that name: "before" is of the base, also where training went on from an
    adapter, without which it is asked."""
    return "base" if name == "before" and adapter else name


def figures_of(figures: Mapping[str, Any]) -> str:
    """Metrics in a line; words, such as BLEU's signature, are left out."""
    return ", ".join(f"{name} {text_of(value)}" for name, value in figures.items() if isinstance(value, float))


def text_of(value: Any, sign: str = "") -> str:
    """A figure as it is shown: whole, or in four digits. sign: "+" says it of what is above 0, too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:{sign},}"
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"
