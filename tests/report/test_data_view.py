"""The view of the data: the page says what the terminal says, in the same colours; what is in the data is only text."""

import io
import re
from html import unescape
from pathlib import Path

import mistral_common
import pytest
from rich.console import Console
from tiny_runs import TINY, TOKENIZER, chat, write_jsonl

from minilora.config import DataConfig
from minilora.data.check import Data, Finding, figures, load_data
from minilora.data.encode import encode_record
from minilora.data.records import ChatRecord
from minilora.report.data_view import _histogram, _spans, show_data
from minilora.tokenizer import load_tokenizer

TOKENS = load_tokenizer(TOKENIZER)
TOKENIZERS = Path(mistral_common.__file__).parent / "data"
V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


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


def test_faults_are_all_listed_and_warnings_are_cut_and_counted(tmp_path: Path) -> None:
    data = loaded(tmp_path, chat("emit", "it"))
    for fault in (True, False):
        data.findings += [Finding("bad line", f"f:{n}: wrong", fault) for n in range(130)]
    terminal, page = shown(data, tmp_path / "page.html")
    for text in (terminal, page):
        assert text.count("fault: f:") == 130
        assert text.count("warning: f:") == 100
        assert "warning: f:99: wrong" in text
        assert "... and 30 more warnings\n" in text or "... and 30 more warnings<" in text
    assert "130 faults" in terminal


def test_nothing_is_left(tmp_path: Path) -> None:
    terminal, _ = shown(loaded(tmp_path, {"x": 1}), tmp_path / "page.html")
    assert "t.jsonl:1: no " in terminal
    assert "1 faults" in terminal


def test_lengths_are_counted_in_equal_bins() -> None:
    assert _histogram([1, 1, 5, 10], 5) == [(2, 2), (4, 0), (6, 1), (8, 0), (10, 1)]
    assert _histogram([3]) == [(1, 0), (2, 0), (3, 1)]


@pytest.mark.parametrize("name", [V1, V3])
def test_spans_are_the_sample_token_for_token(name: str) -> None:
    messages = chat("Hi there", "Yo, 你好", "\x1b[31mred", "No")["messages"]
    messages[1]["weight"] = 0
    tokenizer = load_tokenizer(TOKENIZERS / name)
    [sample], _ = encode_record(ChatRecord(messages, None, "f:1"), tokenizer, 100)
    found = list(_spans(sample, tokenizer))
    if name == V1:
        assert found == [
            ("<s>", "control"), ("[INST] Hi there [/INST] Yo, 你好", "prompt"), ("</s>", "eos, not trained on"),
            ("[INST] \ufffd[31mred [/INST]", "prompt"), ("No", "target"), ("</s>", "eos"),
        ]  # fmt: skip
    else:
        assert found == [
            ("<s>", "control"), ("[INST]", "control"), ("Hi there", "prompt"), ("[/INST]", "control"),
            ("Yo, 你好", "prompt"), ("</s>", "eos, not trained on"), ("[INST]", "control"),
            ("\ufffd[31mred", "prompt"), ("[/INST]", "control"), ("No", "target"), ("</s>", "eos"),
        ]  # fmt: skip


def test_control_tokens_that_are_targets_are_shown_as_such() -> None:
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tokenizer = load_tokenizer(TOKENIZERS / V3)
    [sample], _ = encode_record(ChatRecord(messages, [TOOL], "f:1"), tokenizer, 100)
    found = list(_spans(sample, tokenizer))
    assert ("[AVAILABLE_TOOLS]", "control") in found
    assert [sort for text, sort in found if text == "[TOOL_CALLS]"] == ["target"]
    assert found[-1] == ("</s>", "eos")
