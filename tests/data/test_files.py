"""Files by their ending: rows, where they lie, and what each format can have wrong with it."""

import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minilora import errors
from minilora.data import files
from minilora.data.files import read_rows
from minilora.data.records import ChatRecord, TextRecord, parse_row
from minilora.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path) -> list[tuple[str, Any]]:
    """(place without the folder, row or the text of its error)."""
    found = read_rows(path)
    return [(where.rpartition("/")[2], str(row) if isinstance(row, UserError) else row) for where, row in found]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSON"])
def test_an_array_and_lines_are_told_apart_by_what_they_hold(tmp_path: Path, name: str) -> None:
    array = write(tmp_path / name, '\ufeff\n[\n {"text": "a"},\n 7, {"text": "b"}]')
    assert rows(array) == [
        (f"{name}:1", {"text": "a"}),
        (f"{name}:2", "the line is a number, but must be an object; write one JSON object a line"),
        (f"{name}:3", {"text": "b"}),
    ]
    write(tmp_path / name, '[\n {"text": "a"},\n {"text": b}\n]')
    with pytest.raises(UserError, match=r"not JSON at line 3, column 11: "):
        rows(array)
    lines = write(tmp_path / name, '{"content": "a", "summary": "b"}\n{"content": "c", "summary": "d"}\n')
    assert [place for place, _ in rows(lines)] == [f"{name}:1", f"{name}:2"]


def test_reading_goes_on_behind_a_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_LIMIT_BYTES", 40)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\nno\n{"text": "' + b"x" * 100 + b'"}\r\n\xff\n{"text": "b"}')
    found = rows(path)
    assert [place for place, _ in found] == [f"a.jsonl:{n}" for n in range(1, 6)]
    assert [row for _, row in found if isinstance(row, dict)] == [{"text": "a"}, {"text": "b"}]
    assert "not JSON" in found[1][1]
    assert "the line is over" in found[2][1]
    assert "not UTF-8 at byte 1" in found[3][1]


def test_many_names_are_compared_at_once(tmp_path: Path) -> None:
    """Each with all before it would take minutes."""
    names = [f"k{i}" for i in range(100_000)]
    line = "{" + ", ".join(f'"{name}": 0' for name in [*names, "k99999"]) + "}"
    began = time.process_time()
    (place,) = rows(write(tmp_path / "a.jsonl", line))
    assert "it has the key 'k99999' twice" in place[1]
    with pytest.raises(UserError, match="its header has 'k99999' twice"):
        rows(write(tmp_path / "a.csv", ",".join([*names, "k99999"])))
    turns = [{"from": "system", "value": "x"}] * 20_000
    chat = {"conversations": [*turns, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    [(where, row)] = read_rows(write(tmp_path / "b.jsonl", json.dumps(chat)))
    record = parse_row(row, where)
    assert isinstance(record, ChatRecord)
    assert time.process_time() - began < 5


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffprompt,response\r\n"a, ""b""","c\nd"\r\ne\r\nf,g,h\r\n\r\ni,j\r\n')
    short = "it has not the 2 cells of the header row; mend or drop it"
    assert rows(path) == [
        ("a.csv:3", {"prompt": 'a, "b"', "response": "c\nd"}),
        ("a.csv:4", short),
        ("a.csv:5", short),
        ("a.csv:7", {"prompt": "i", "response": "j"}),
    ]
    assert rows(write(path, "prompt, response \na, b\n")) == [("a.csv:2", {"prompt": "a", "response": " b"})]
    assert rows(write(path, b"text\ncaf\xe9\n")) == [("a.csv:2", "not UTF-8; save the file as UTF-8")]
    for text, line in (('text\n"a"b\n', 2), ('text\na\n"b\nc\nd\n', 3), ('"text\na\n', 1)):
        with pytest.raises(UserError, match=rf"a\.csv: not CSV at line {line}: .*; is a quote left open\?"):
            rows(write(path, text))
    assert rows(write(path, "text\n" + "x" * 200_000))[0][1] == {"text": "x" * 200_000}


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    table = pyarrow.table({"messages": [messages, None], "text": [None, "a"], "n": [1.5, None]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    records = [parse_row(row, where) for where, row in read_rows(path)]
    assert records == [
        ChatRecord(messages, None, f"{path}:1"),
        TextRecord("a", f"{path}:2"),
    ]
    weather = {"id": "a23456789", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    add = {"id": "b23456789", "function": {"name": "add", "arguments": {"a": 1, "of": [None, 2]}}}
    calls = [[messages[0], {"role": "assistant", "tool_calls": [call]}] for call in (weather, add)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": calls}), tmp_path / "calls.parquet")
    read = [parse_row(row, where) for where, row in read_rows(tmp_path / "calls.parquet")]
    assert read == [parse_row({"messages": row}, record.where) for row, record in zip(calls, read, strict=True)]
    calls[0][1]["tool_calls"] = [weather | {"created": date(2026, 1, 1)}]
    for row, wrong in (
        ({"messages": calls[0]}, r"message 2 \(assistant\): Object of type date is not JSON"),
        ({"messages": messages, "tools": [{"function": b"f"}]}, "its tools: Object of type bytes is not JSON"),
    ):
        with pytest.raises(UserError, match=rf"^a.parquet:1: {wrong} serializable; write it as text"):
            parse_row(row, "a.parquet:1")
    with pytest.raises(UserError, match=r"b.parquet: cannot be read: .*magic bytes"):
        rows(write(tmp_path / "b.parquet", b"x" * 100))
    year_29_348 = pyarrow.table({"text": ["a"], "day": pyarrow.array([10_000_000], pyarrow.int32()).cast("date32")})
    pyarrow.parquet.write_table(year_29_348, tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet: cannot be read: .*date"):
        rows(tmp_path / "c.parquet")
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"a.parquet: Parquet needs pyarrow, .*pip install 'minilora\[parquet\]'"):
        rows(path)


def test_a_text_file_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "\ufeffOne.\r\n\r\nTwo.\n")
    assert rows(path) == [("a.txt:1", {"text": "One.\n\nTwo.\n"})]
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 at byte 1"):
        rows(write(path, b"\xff"))
    monkeypatch.setattr(files, "WHOLE_LIMIT_BYTES", 3)
    with pytest.raises(UserError, match=r"a.txt: over 512 MiB in one piece; write JSONL"):
        rows(write(path, "four"))


@pytest.mark.parametrize(("name", "content"), [("a.csv", "a,b\n"), ("a.csv", ""), ("a.txt", " \n"), ("a.json", "[]")])
def test_files_without_a_row(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: the file holds no records"):
        rows(write(tmp_path / name, content))


def test_a_name_or_key_that_stands_there_twice(tmp_path: Path) -> None:
    """Python's readers would keep the last and drop the other without a word."""
    (tmp_path / "a.csv").write_text("prompt,prompt,response\na,b,c\n")
    with pytest.raises(UserError, match=r"a\.csv: its header has 'prompt' twice"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    (_, first), (_, second) = read_rows(tmp_path / "a.jsonl")
    assert "the key 'text' twice" in str(first)
    assert second == {"text": "c"}
