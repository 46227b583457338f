"""A JSONL file as records: each line a text or a conversation, checked as it is read.

    {"text": ...}                                     or "content"
    {"messages": [{"role", "content"}, ...]}          or "interactions", "text"; with "system_prompt", "tools" and,
                                                      in a message, "tool_calls", "tool_call_id", "name", "weight"

These are mistral-finetune's forms and, with text parts as content and the role developer, OpenAI's. Other keys are left
alone. The file is read line by line; a bad line is a UserError "file:line: what is wrong; what to do".
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minilora.conversation import ROLES, content_text, kind
from minilora.errors import UserError

LINE_LIMIT_BYTES = 64 << 20
FORMS = ("messages", "interactions", "text", "content")


@dataclass(frozen=True)
class TextRecord:
    """A document of raw text; where: "file:line"."""

    text: str
    where: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation that ends with an assistant's message, as `Tokenizer.encode_chat` takes it; where: "file:line"."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str


Record = TextRecord | ChatRecord


def read_records(path: str | Path) -> Iterator[Record]:
    """The file's records. Raises UserError at the first bad line, and at the end of a file that has no record."""
    empty = True
    for line, where in read_lines(path):
        yield parse_record(line, where)
        empty = False
    if empty:
        raise UserError(f"{path}: the file holds no records; it needs one JSON object a line")


def read_lines(path: str | Path) -> Iterator[tuple[bytes, str]]:
    """(line, "file:line") of all that are not blank, without a byte order mark or the line's end."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT_BYTES + 1):
                number += 1
                if len(line) > LINE_LIMIT_BYTES:
                    raise UserError(f"{path}:{number}: the line is over 64 MiB; is this JSONL, one object a line?")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield line.rstrip(b"\r\n"), f"{path}:{number}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path!s:.200}: cannot be read: {getattr(error, 'strerror', error)}") from None


def parse_record(line: bytes, where: str) -> Record:
    """The record of one line. Raises UserError, which begins with `where`."""
    try:
        data = _parse_json(line)
        forms = [key for key in FORMS if key in data]
        if len(forms) != 1:
            found = ", ".join(list(data)[:8]) or "none"
            raise UserError(f'it needs one of the keys "messages" and "text"; its keys are: {found}')
        value = data[forms[0]]
        if forms[0] in ("messages", "interactions"):
            messages = _read_messages(value, data.get("system_prompt"))
            return ChatRecord(_only_last(messages) if data.get("only_last") else messages, _read_tools(data), where)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f'its "{forms[0]}" is {_what(value)}; give it text, or drop the line')
        return TextRecord(value, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def data_fingerprint(path: str | Path) -> str:
    """sha256 of the file's bytes, in hex: a run resumes only on the same data."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        if re.search(rb"\\u[dD][89a-fA-F]", line):  # an escape is the only way to half of a surrogate pair
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError("it holds half of a surrogate pair (\\ud800 to \\udfff); mend or drop that character") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON at column {error.colno}: {error.msg}; write one JSON object a line") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"not JSON that can be read: {error}") from None
    except RecursionError:
        raise UserError("its JSON is nested too deeply; is this a line of data?") from None
    if not isinstance(data, dict):
        raise UserError(f"the line is {kind(data)}, but must be an object; write one JSON object a line")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not JSON; write null or a number")


def _read_tools(data: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = data["tools"] if data.get("tools") is not None else data.get("available_tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"its tools are {kind(tools)}, but must be a list")
    return tools or None


def _read_messages(messages: Any, system_prompt: Any) -> list[dict[str, Any]]:
    """Messages in one spelling. The system prompt goes before them, and counts as message 1."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"its messages are {_what(messages)}; give it a list of messages, or drop the line")
    if system_prompt:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    read = [_read_message(message, n) for n, message in enumerate(messages, 1)]
    if read[-1]["role"] != "assistant":
        raise UserError(f"no answer to train on: the last message is of the role {read[-1]['role']}; drop it")
    if all(message.get("weight") == 0 for message in read if message["role"] == "assistant"):
        raise UserError("no token to train on: every assistant message has the weight 0; drop the line")
    return read


def _only_last(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """mistral-finetune's `only_last`: of all the answers, only the last is trained on."""
    return [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages[:-1]] + messages[-1:]


def _read_message(message: Any, n: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"message {n} is {kind(message)}, but must be an object")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise UserError(f"message {n} has the role {role!r}, but it must be one of {', '.join(ROLES)}")
    content = message.get("content", message.get("text"))
    calls = message.get("tool_calls") if role == "assistant" else None
    try:
        text = "" if content is None and calls else content_text(content)
    except UserError as error:
        raise UserError(f"message {n} ({role}): {error}") from None
    if role in ("user", "assistant") and not text.strip() and not calls:
        raise UserError(f"message {n} ({role}) has empty content; fill it, or drop the line")
    kept = {key: message[key] for key in ("tool_calls", "tool_call_id", "name", "weight") if key in message}
    return {"role": role, "content": text, **kept}


def _what(value: Any) -> str:
    return "empty" if value == [] or (isinstance(value, str) and not value.strip()) else kind(value)
