"""The view of the data: the page says what the terminal says, in the same colours; what is in the data is only text."""

import io
import re
from html import unescape
from pathlib import Path

from rich.console import Console
from tiny_runs import TINY, TOKENIZER, chat, write_jsonl

from minilora.config import DataConfig
from minilora.data.check import Data, Finding, figures, load_data
from minilora.report.data_view import show_data
from minilora.tokenizer import load_tokenizer

TOKENS = load_tokenizer(TOKENIZER)


def loaded(tmp_path: Path, *rows: object) -> Data:
    train = write_jsonl(tmp_path / "t.jsonl", list(rows))  # type: ignore[arg-type]
    return load_data(DataConfig(str(train), max_seq_len=60), TOKENS, TINY)


def shown(data: Data, page: Path, n: int = 3, colour: bool = False) -> tuple[str, str]:
    """(what the terminal got, the page's HTML)."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=80)
    rows = figures(data, 60) if data.samples["train"] else []
    show_data(data, rows, n, console, str(page))
    return out.getvalue(), page.read_text("utf-8")


def test_terminal_and_page_agree(tmp_path: Path) -> None:
    data = loaded(tmp_path, chat("emit", "it"), {"text": "a name"}, chat("<b>&[bold]", "t&m"), {"x": 1})
    terminal, page = shown(data, tmp_path / "page.html")
    inside = re.search(r"<pre>(.*)</pre>", page, re.DOTALL)
    assert inside is not None
    assert unescape(re.sub(r"<[^>]*>", "", inside[1])) == re.sub("[⟦⟧]", "", terminal)
    assert "[INST]emit[/INST]⟦it⟧⟦</s>⟧" in terminal, "without colours, signs say what is trained on"
    assert f"fault: {tmp_path}/t.jsonl:4: no " in terminal
    assert "<b>" not in page
    assert "<script" not in page
    assert "http" not in page
    assert "1 faults" in terminal


def test_colours_say_what_is_trained_on(tmp_path: Path) -> None:
    masked = chat("emit", "a", "name", "it")
    masked["messages"][1]["weight"] = 0
    terminal, page = shown(loaded(tmp_path, masked), tmp_path / "page.html", colour=True)
    assert "\x1b[90memit" in terminal
    assert "\x1b[32mit\x1b[0m\x1b[37;42m</s>" in terminal
    assert "\x1b[37;41m</s>" in terminal, "this answer's end is not trained on"
    coloured = re.findall(r'<span style="([^"]*)">([^<]*)</span>', page)
    style_of = {text: style for style, text in coloured}
    assert style_of["emit"] == "color: #808080; text-decoration-color: #808080"
    assert style_of["it"].startswith("color: #008000")
    ends = [style for style, text in coloured if text == "&lt;/s&gt;"]
    assert [style.rpartition("background-color: ")[2] for style in ends] == ["#800000", "#008000"]


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    data = loaded(tmp_path, chat("emit", "it"))
    data.findings += [Finding("bad line", f"f:{n}: wrong") for n in range(130)]
    terminal, _ = shown(data, tmp_path / "page.html")
    assert "f:99: wrong" in terminal
    assert "f:100: wrong" not in terminal
    assert "... and 30 more" in terminal
    assert "130 faults" in terminal


def test_nothing_is_left(tmp_path: Path) -> None:
    terminal, _ = shown(loaded(tmp_path, {"x": 1}), tmp_path / "page.html")
    assert "t.jsonl:1: no " in terminal
    assert "1 faults" in terminal
