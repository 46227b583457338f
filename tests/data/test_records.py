"""Reading JSONL: every accepted form, and every damage with its file and line."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora.checkpoint.files import sha256_of
from minilora.data import files
from minilora.data.files import parse_line, read_lines, read_rows
from minilora.data.records import ChatRecord, Record, TextRecord, as_row, parse_row
from minilora.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
GOOD = json.dumps({"messages": [USER, ANSWER]}).encode()


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def records(path: Path | str) -> Iterator[Record]:
    return (parse_row(row, where) for where, row in read_rows(path))


def parse(line: bytes) -> Any:
    return parse_row(parse_line(line), "f:1")


@pytest.mark.parametrize("key", ["text", "content"])
def test_text(key: str) -> None:
    assert parse(json.dumps({key: " naïve \n", "id": 7}).encode()) == TextRecord(" naïve \n", "f:1")


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        json.dumps({"interactions": [USER, ANSWER], "source": "x"}).encode(),
        chat({"role": "user", "text": "Hello"}, {"role": "assistant", "text": "Hi"}, tools=None, system_prompt=None),
        chat({"role": "user", "content": [{"type": "text", "text": "Hello"}]}, ANSWER, tools=[]),
        GOOD + b"\r",
    ],
)
def test_spellings_of_one_conversation(line: bytes) -> None:
    assert parse(line) == ChatRecord([USER, ANSWER], None, "f:1")


def test_everything_that_a_conversation_can_hold() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0}
    result = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "f", "content": ""}
    developer = {"role": "developer", "content": "Be kind."}
    record = parse(chat(developer, USER, calls, result, ANSWER, system_prompt="Be brief.", available_tools=[tool]))
    systems = [{"role": "system", "content": text} for text in ("Be brief.", "Be kind.")]
    assert record.messages == [*systems, USER, {**calls, "content": ""}, result, ANSWER]
    assert record.tools == [tool]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a"', "not JSON at column 13"),
        (b'{"text": "a"} {"text": "b"}', "not JSON at column 15: Extra data; write one JSON object a line"),
        (b"{'text': 'a'}", "not JSON at column 2"),
        (b'{"text": "a", "n": NaN}', "NaN is not JSON"),
        (b'{"text": "a", "n": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["text"]', "the line is a list, but must be an object"),
        (b"7", "the line is a number"),
        (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte 1"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (chat({"role": "user", "content": "\udfff"}, ANSWER), "half of a surrogate pair"),
        (b"{}", 'no "messages", "text", or pair such as "prompt" and "response" in it; its keys are: none'),
        (b'{"text": "a", "messages": []}', "it can be read as .messages. or as .text.; drop one"),
        (b'{"text": ""}', 'its "text" is empty'),
        (b'{"content": " \\n"}', 'its "content" is empty'),
        (b'{"text": null}', 'its "text" is missing'),
        (b'{"text": ["a"]}', 'its "text" is a list'),
        (b'{"messages": []}', "its messages are empty"),
        (b'{"messages": "hello"}', "its messages are text"),
        (chat("hello"), "message 1 is text, but must be an object"),
        (chat({"role": "human", "content": "x"}, ANSWER), "message 1 has the role 'human'"),
        (chat({"content": "x"}, ANSWER), "message 1 has the role None"),
        (chat({"role": ["user"], "content": "x"}, ANSWER), "message 1 has the role"),
        (chat({"role": "user"}, ANSWER), r"message 1 \(user\): its content is missing"),
        (chat({"role": "user", "content": "\t"}, ANSWER), r"message 1 \(user\) has empty content"),
        (chat(USER, {"role": "assistant", "content": ""}), r"message 2 \(assistant\) has empty content"),
        (chat(USER, {"role": "assistant", "content": None}), r"message 2 \(assistant\): its content is missing"),
        (
            chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
            r"message 1 \(user\): its content is a list",
        ),
        (chat(USER, ANSWER, system_prompt=5), r"message 1 \(system\): its content is a number"),
        (chat(USER, ANSWER, tools={}), "its tools are an object, but must be a list"),
        (chat(USER, ANSWER, USER), "no answer to train on: the last message is of the role user"),
        (chat(USER, {**ANSWER, "weight": 0}), "no token to train on"),
    ],
)
def test_damaged_lines(tmp_path: Path, line: bytes, says: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + b"\n\n" + line.replace(b"\n", b"") + b"\n" + GOOD)
    read = records(file)
    assert next(read) == ChatRecord([USER, ANSWER], None, f"{file}:1")
    with pytest.raises(UserError, match=rf"data.jsonl:3: .*{says}") as error:
        next(read)
    assert len(str(error.value)) < 400


def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n \t\r\n\n" + GOOD)
    assert [record.where for record in records(file)] == [f"{file}:1", f"{file}:4"]
    assert list(read_lines(str(file)))[1] == (GOOD, f"{file}:4")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_records(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"data.jsonl: the file holds no records"):
        list(records(file))


def test_a_line_over_the_limit_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_LIMIT_BYTES", len(GOOD) + 1)
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + b"  \n")
    read = records(file)
    assert next(read).where.endswith(":1")
    with pytest.raises(UserError, match=r"data.jsonl:2: the line is over 64 MiB"):
        next(read)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for read in (lambda path: list(records(path)), sha256_of):
        with pytest.raises(UserError, match=r"missing.jsonl: cannot be read: No such file"):
            read(tmp_path / "missing.jsonl")
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            read(tmp_path)
    with pytest.raises(UserError, match="/dev/zero: is no file; name one of JSONL"):
        list(records("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: is no file; .* write a pipe to a file first"):
        list(records(tmp_path / "pipe"))


def test_only_last_trains_the_last_answer_alone() -> None:
    messages = [USER, ANSWER, USER, ANSWER]
    record = parse(chat(*messages, only_last=True))
    assert isinstance(record, ChatRecord)
    assert [m.get("weight") for m in record.messages] == [None, 0, None, None]
    assert [m.get("weight") for m in parse(chat(*messages)).messages] == [None] * 4
    with pytest.raises(UserError, match="no token to train on: the last answer, of only_last, has the weight 0"):
        parse(chat(USER, ANSWER, USER, ANSWER | {"weight": 0}, only_last=True))
    assert parse(chat(*messages, only_last=False)) == parse(chat(*messages, only_last=None)) == parse(chat(*messages))


@pytest.mark.parametrize("value", ["false", "", "true", 2, []])
def test_only_last_is_true_or_false(value: Any) -> None:
    with pytest.raises(UserError, match=f'^f:1: its "only_last" is {re.escape(repr(value))}, but must be true, false'):
        parse(chat(USER, ANSWER, USER, ANSWER, only_last=value))


def test_of_two_system_prompts_none_is_dropped() -> None:
    pair = {"prompt": "Hello", "response": "Hi"}
    with pytest.raises(UserError, match=r'^f:1: it has "system_prompt" and "system"; drop one of them'):
        said({**pair, "system": "a", "system_prompt": "b"})
    assert said({**pair, "system": "a", "system_prompt": ""})[0] == ("system", "a")


def said(line: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, content) of the record's messages."""
    record = parse(json.dumps(line).encode())
    assert isinstance(record, ChatRecord)
    return [(m["role"], m["content"]) for m in record.messages]


@pytest.mark.parametrize("question", [("instruction", "output"), ("prompt", "response"), ("prompt", "completion"),
                                      ("question", "answer"), ("input", "output"), ("content", "summary")])  # fmt: skip
def test_pairs_of_columns(question: tuple[str, str]) -> None:
    row = dict(zip(question, ("Hello", "Hi"), strict=True))
    assert said({**row, "id": 3}) == [("user", "Hello"), ("assistant", "Hi")]
    history = said({**row, "history": [["One?", "1"], ["Two?", "2"]], "system": "Be brief."})
    assert history == [
        ("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"),
        ("user", "Hello"), ("assistant", "Hi"),
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "asked"), [("", "Add."), (None, "Add."), (" \n", "Add."), ("1, 2", "Add.\n1, 2")])
def test_the_input_of_alpaca(given: Any, asked: str) -> None:
    row = {"instruction": "Add.", "input": given, "output": "3", "text": "Below is an instruction ..."}
    assert said(row) == [("user", asked), ("assistant", "3")]


def test_sharegpt() -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi"},
    ]
    expected = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi")]
    assert said({"conversations": turns}) == expected
    named = [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hi"}]
    assert said({"conversations": named, "system": "Be kind."}) == expected
    assert said({"conversations": [USER, ANSWER]}) == expected[1:], "messages under ShareGPT's key"


def test_a_table_has_every_column_in_every_row() -> None:
    assert said({"messages": [USER, ANSWER], "text": None, "prompt": None, "response": None})[0] == ("user", "Hello")
    assert parse(b'{"messages": null, "text": "a"}') == TextRecord("a", "f:1")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "response": "b", "completion": "c"}, 'as "prompt" and "response" or as "prompt" and "comp'),
        ({"question": "a", "answer": "b", "text": "c"}, "drop one of them"),
        ({"instruction": "a", "output": " "}, 'its "output" is empty; give it text, or drop the line'),
        ({"content": "", "summary": "b"}, 'its "content" is empty'),
        ({"content": "a", "summary": None}, 'its "summary" is missing'),
        ({"instruction": "a", "output": None, "text": "all of it"}, 'its "output" is missing'),
        ({"prompt": "a", "response": 7}, 'its "response" is a number'),
        ({"instruction": "a", "input": ["b"], "output": "c"}, 'its "input" is a list'),
        ({"prompt": "a", "response": "b", "history": [["c"]]}, 'its "history" is not a list of pairs'),
        ({"prompt": "a", "response": "b", "history": [["c", ""]]}, r"message 2 \(assistant\) has empty content"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}]},
            "message 1 is of the role assistant, but it is the hu",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}] * 2},
            "message 2 is of the role user, but it is the g",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "message 1 has the role 'function_call'"),
        ({"messages": [USER, {"role": "assistant", "function_call": {}, "content": None}]}, "content is missing"),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}, "content": "x"}]},
            "write it as tool",
        ),
        ({"messages": [USER, {"role": "function", "content": "x"}]}, "message 2 has the role 'function'"),
    ],
)
def test_rows_that_are_no_form(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"^f:1: .*{says}"):
        parse(json.dumps(row).encode())


@pytest.mark.parametrize("record", [TextRecord("a", "f:1"), ChatRecord([USER, ANSWER], [{"type": "function"}], "f:1")])
def test_a_record_as_a_row_is_the_record(record: Any) -> None:
    assert parse_row(as_row(record), "f:1") == record


def test_a_damaged_conversation_is_kept_up_to_the_answer_before() -> None:
    empty = {"role": "user", "content": ""}
    for rest in ([empty, ANSWER], [USER], [USER, {"role": "assistant", "content": None}], [USER, 7]):
        mended = parse_row({"messages": [USER, ANSWER, *rest]}, "f:1", mend=True)
        assert mended == ChatRecord([USER, ANSWER], None, "f:1")
    with pytest.raises(UserError, match="no answer to train on: drop the line"):
        parse_row({"messages": [empty, ANSWER]}, "f:1", mend=True)
