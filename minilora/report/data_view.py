"""What `minilora data check` shows, on a terminal and as a page of one file: the same lines, figures and colours.

prompt grey, target green, control tokens dim, </s> on green where it is trained on and on red where it is not
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from minilora.checkpoint.write import atomic_write
from minilora.data.check import Data, Span, histogram, spans
from minilora.report.page import html_page

LISTED = 100  # faults, and as many warnings, that are listed; all are counted
BAR = 40
STYLES = {
    "prompt": ("bright_black", "color: #808080"),
    "target": ("green", "color: #128a3c"),
    "control": ("cyan dim", "color: #3a8ea5; opacity: .8"),
    "eos": ("white on green", "color: #fff; background: #128a3c"),
    "eos, not trained on": ("white on red", "color: #fff; background: #b91c1c"),
    "fault": ("red", "color: #b91c1c"),
    "warning": ("yellow", "color: #a16207"),
    "": ("", ""),
}
Line = list[tuple[str, str]]  # texts, each with a key of STYLES


def show_data(data: Data, figures: Sequence[tuple[str, str]], n: int, console: Console, html: str | None) -> None:
    """Print what was found, the figures, a histogram of lengths and the first n samples; write `html`, too, if named.

    Raises UserError if the page cannot be written.
    """
    lines = [*_lines(data, figures, n)]
    for line in lines:
        console.print(Text.assemble(*((text, STYLES[key][0]) for text, key in line)), soft_wrap=True)
    if html is not None:
        body = "\n".join("".join(_html(text, key) for text, key in line) for line in lines)
        atomic_write(html, html_page(Path(html).stem, f"<section><pre>{body}</pre></section>"))


def _html(text: str, key: str) -> str:
    return f'<span style="{STYLES[key][1]}">{escape(text)}</span>' if key else escape(text)


def _lines(data: Data, figures: Sequence[tuple[str, str]], n: int) -> Iterator[Line]:
    for key, found in (("fault", data.faults), ("warning", [f for f in data.findings if not f.fault])):
        yield from ([(finding.text, key)] for finding in found[:LISTED])
        if found[LISTED:]:
            yield [(f"... and {len(found) - LISTED:,} more", key)]
    yield [(f"{len(data.faults):,} faults", "fault" if data.faults else "target")]
    yield from ([(f"{name:12}{text}", "")] for name, text in figures)
    if figures:
        bars = histogram([sample.length for sample in data.learnt])
        most = max(count for _, count in bars)
        yield from (
            [(f"{edge:>12,}  ", ""), ("█" * -(-count * BAR // most), "target"), (f" {count:,}", "")]
            for edge, count in bars
        )
    for sample in data.learnt[:n]:
        yield [("", "")]
        yield [(f"{sample.where}: {sample.length} positions, {sample.n_targets} trained on", "")]
        yield [(span.text, _key(span)) for span in spans(sample, data.tokenizer)]


def _key(span: Span) -> str:
    return "eos, not trained on" if span.sort == "eos" and not span.trained else span.sort
