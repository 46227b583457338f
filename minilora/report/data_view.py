"""What `minilora data check` shows, on a terminal and as a page of one file: the same lines, figures and colours.

prompt grey, target green, control tokens dim, </s> on green where it is trained on and on red where it is not
"""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from minilora.checkpoint.write import atomic_write
from minilora.data.check import Data
from minilora.data.encode import Sample
from minilora.report.page import html_page
from minilora.tokenizer import Tokenizer

LISTED = 100  # warnings; faults are all listed, for each must be mended
BAR = 40
STYLES = {
    "prompt": "bright_black", "target": "green", "control": "dim cyan", "eos": "white on green",
    "eos, not trained on": "white on red", "good": "green", "fault": "red", "warning": "yellow", "": "",
}  # fmt: skip
TRAINED = ("target", "eos")  # in \u27e6 \u27e7 where there is no colour
Line = list[tuple[str, str]]  # texts, each with a key of STYLES


def show_data(data: Data, figures: Sequence[tuple[str, str]], n: int, console: Console, html: str | None) -> None:
    """Print what was found, the figures, a histogram of lengths and the first n samples; write `html`, too, if named.

    Raises UserError if the page cannot be written.
    """
    page = Console(file=io.StringIO(), record=True, highlight=False)
    for line in _lines(data, figures, n):
        text = Text.assemble(*((text, STYLES[key]) for text, key in line))
        page.print(text, soft_wrap=True)
        if console.color_system is None:  # nothing is green
            text = Text("".join(f"\u27e6{text}\u27e7" if key in TRAINED else text for text, key in line))
        console.print(text, soft_wrap=True)
    if html is not None:
        body = page.export_html(code_format="{code}", inline_styles=True)
        atomic_write(html, html_page(Path(html).stem, f"<section><pre>{body}</pre></section>"))


def _lines(data: Data, figures: Sequence[tuple[str, str]], n: int) -> Iterator[Line]:
    warnings = [finding for finding in data.findings if not finding.fault]
    for key, found in (("fault", data.faults), ("warning", warnings[:LISTED])):
        yield from ([(f"{key}: {finding.text}", key)] for finding in found)
    if warnings[LISTED:]:
        yield [(f"... and {len(warnings) - LISTED:,} more warnings", "warning")]
    yield [(f"{len(data.faults):,} faults", "fault" if data.faults else "good")]
    yield from ([(f"{name:12}{text}", "")] for name, text in figures)
    if figures:
        bars = _histogram([sample.length for sample in data.learnt])
        most = max(count for _, count in bars)
        for edge, count in bars:
            yield [(f"{edge:>12,}  ", ""), ("█" * -(-count * BAR // most), "good"), (f" {count:,}", "")]
    if n:
        yield [("", "")]
        yield [("trained on", "target"), (", ", ""), ("only seen", "prompt")]
    for sample in data.learnt[:n]:
        yield [("", "")]
        yield [(f"{sample.where}: {sample.length} positions, {sample.n_targets} trained on", "")]
        yield list(_spans(sample, data.tokenizer))


def _histogram(lengths: Sequence[int], bins: int = 10) -> list[tuple[int, int]]:
    """(largest length, samples) of equal bins up to the longest."""
    edges = np.unique(np.linspace(0, max(lengths), bins + 1).round().astype(int))
    counts = np.histogram(np.asarray(lengths) - 0.5, edges)[0]
    return list(zip(edges[1:].tolist(), counts.tolist(), strict=True))


def _spans(sample: Sample, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """The sample as it is shown, (text, sort): "prompt", "target", "control", "eos" or "eos, not trained on".

    Control tokens stand by their names; what a terminal would obey instead of showing it is replaced.
    """
    begin, tokens, mask = 0, sample.tokens.tolist(), sample.target_mask.tolist()
    names = [tokenizer.control_name(token) for token in tokens]
    for i in range(1, len(tokens) + 1):
        if i < len(tokens) and not names[begin] and not names[i] and mask[i] == mask[begin]:
            continue
        name, plain, end = names[begin], ("prompt", "target"), ("eos, not trained on", "eos")
        sort = (end if name == "</s>" else ("control", "target") if name else plain)[mask[begin]]
        text = name or tokenizer.decode(tokens[begin:i])
        yield re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text), sort
        begin = i
