"""Reading JSONL: every accepted form, and every damage with its file and line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from minilora.data import records
from minilora.data.records import ChatRecord, TextRecord, data_fingerprint, parse_record, read_lines, read_records
from minilora.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
GOOD = json.dumps({"messages": [USER, ANSWER]}).encode()


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def parse(line: bytes) -> Any:
    return parse_record(line, "f:1")


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
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON that can be read: Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["text"]', "the line is a list, but must be an object"),
        (b"7", "the line is a number"),
        (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte 1"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (chat({"role": "user", "content": "\udfff"}, ANSWER), "half of a surrogate pair"),
        (b"{}", 'needs one of the keys "messages" and "text"; its keys are: none'),
        (b'{"instruction": "a", "output": "b"}', "its keys are: instruction, output"),
        (b'{"text": "a", "messages": []}', "its keys are: text, messages"),
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
    read = read_records(file)
    assert next(read) == ChatRecord([USER, ANSWER], None, f"{file}:1")
    with pytest.raises(UserError, match=rf"data.jsonl:3: .*{says}") as error:
        next(read)
    assert len(str(error.value)) < 400


def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n \t\r\n\n" + GOOD)
    assert [record.where for record in read_records(file)] == [f"{file}:1", f"{file}:4"]
    assert list(read_lines(str(file)))[1] == (GOOD, f"{file}:4")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_records(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"data.jsonl: the file holds no records"):
        list(read_records(file))


def test_a_line_over_the_limit_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_LIMIT_BYTES", len(GOOD) + 1)
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + b"  \n")
    read = read_records(file)
    assert next(read).where.endswith(":1")
    with pytest.raises(UserError, match=r"data.jsonl:2: the line is over 64 MiB"):
        next(read)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for read in (lambda path: list(read_records(path)), data_fingerprint):
        with pytest.raises(UserError, match=r"missing.jsonl: cannot be read: No such file"):
            read(tmp_path / "missing.jsonl")
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            read(tmp_path)


def test_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD)
    assert data_fingerprint(file) == hashlib.sha256(GOOD).hexdigest()


def test_only_last_trains_the_last_answer_alone() -> None:
    messages = [USER, ANSWER, USER, ANSWER]
    record = parse(chat(*messages, only_last=True))
    assert isinstance(record, ChatRecord)
    assert [m.get("weight") for m in record.messages] == [None, 0, None, None]
    assert [m.get("weight") for m in parse(chat(*messages)).messages] == [None] * 4
