"""A row of a data file as a record, a text or a conversation. Its keys say which:

    text | content                              raw text
    messages | interactions                     [{"role", "content" or "text"}, ...]; with "tools" and, in a message,
                                                "tool_calls", "tool_call_id", "name", "weight"
    conversations                               ShareGPT: [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]
    instruction + output                        Alpaca: with "input", which goes under the instruction unless empty
    prompt + response | prompt + completion | question + answer | input + output | content + summary (ADGEN)

A conversation may have "system_prompt" or "system"; a pair "history", [[question, answer], ...]. These are the forms of
mistral-finetune, OpenAI (text parts as content, the role developer), Alpaca, ShareGPT and ChatGLM. Other keys are left
alone. Two forms in a row are refused, but for the "text" that Stanford's Alpaca has beside its pair.

A bad row is a UserError "file:line: what is wrong; what to do".
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minilora.conversation import ROLES, content_text, kind
from minilora.data.files import Row
from minilora.errors import UserError

ALPACA, ADGEN = ("instruction", "output"), ("content", "summary")
SHAREGPT, TEXT, CONTENT = ("conversations",), ("text",), ("content",)
PAIRS = (ALPACA, ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"), ADGEN)
FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("interactions",), SHAREGPT, *PAIRS, TEXT, CONTENT)
# What is no form of its own beside it.
HOLDS: dict[tuple[str, ...], Any] = {ALPACA: (("input", "output"), TEXT), ADGEN: (CONTENT,)}
ROLE_OF = {"human": "user", "gpt": "assistant"}


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


def parse_row(row: Row, where: str, mend: bool = False) -> Record:
    """The record of a row. Raises UserError, which begins with `where`, also for a row that is an error.

    mend: a conversation ends before its first message that cannot be read, with the answer that is then the last
    """
    try:
        if isinstance(row, UserError):
            raise row
        form = _form_of(row)
        if form in (TEXT, CONTENT):
            return TextRecord(_text(row, form[0]), where)
        messages = row[form[0]] if len(form) == 1 else _pair(row, *form)
        if row.get("system_prompt") and row.get("system"):
            raise UserError('it has "system_prompt" and "system"; drop one of them')
        read = _read_messages(messages, row.get("system_prompt") or row.get("system"), form == SHAREGPT, mend)
        if (only_last := row.get("only_last")) not in (None, False, True):
            raise UserError(f'its "only_last" is {only_last!r}, but must be true, false or null')
        if only_last:  # mistral-finetune's: of all the answers, only the last is trained on
            read = [m | {"weight": 0} if m["role"] == "assistant" else m for m in read[:-1]] + read[-1:]
        if all(message.get("weight") == 0 for message in read if message["role"] == "assistant"):
            what = "the last answer, of only_last," if only_last else "every assistant message"
            raise UserError(f"no token to train on: {what} has the weight 0; drop the line")
        return ChatRecord(read, _read_tools(row), where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def as_row(record: Record) -> dict[str, Any]:
    """The record in its own form: what `parse_row` makes the same record of."""
    if isinstance(record, TextRecord):
        return {"text": record.text}
    return {"messages": record.messages} | ({"tools": record.tools} if record.tools else {})


def as_jsonl(records: Iterable[Record]) -> str:
    """A line of JSON for each record, in its own form."""
    return "".join(json.dumps(as_row(record), ensure_ascii=False) + "\n" for record in records)


def _form_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The keys that say how the row is to be read."""
    forms = [form for form in FORMS if all(key in row for key in form)]
    if len(forms) > 1:  # a table has every column in every row; but a question without its answer is no text
        forms = [form for form in forms if row[form[0]] is not None] or forms[:1]
    forms = [form for form in forms if not any(form in HOLDS.get(other, ()) for other in forms)]
    if not forms:
        found = ", ".join(list(row)[:8]) or "none"
        raise UserError(f'no "messages", "text", or pair such as "prompt" and "response" in it; its keys are: {found}')
    if len(forms) > 1:
        first, second = (" and ".join(f'"{key}"' for key in form) for form in forms[:2])
        raise UserError(f"it can be read as {first} or as {second}; drop one of them")
    return forms[0]


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'its "{key}" is {_what(value)}; give it text, or drop the line')
    return value


def _pair(row: dict[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """Question and answer as messages, what was said before them first. Alpaca's input goes under its instruction."""
    asked, said, history = _text(row, question), _text(row, answer), row.get("history") or []
    if question == "instruction" and str(row.get("input") or "").strip():
        asked += f"\n{_text(row, 'input')}"
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError('its "history" is not a list of pairs [question, answer]')
    texts = [text for turn in [*history, [asked, said]] for text in turn]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _read_tools(data: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = data["tools"] if data.get("tools") is not None else data.get("available_tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"its tools are {kind(tools)}, but must be a list")
    return _as_json(tools, "its tools") or None


def _read_messages(messages: Any, system_prompt: Any, alternate: bool, mend: bool) -> list[dict[str, Any]]:
    """Messages in one spelling. The system prompt goes before them, and counts as message 1."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"its messages are {_what(messages)}; give it a list of messages, or drop the line")
    if system_prompt:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    read, last = list[dict[str, Any]](), "assistant"  # the role before, systems left out
    try:
        for n, message in enumerate(messages, 1):
            new = _read_message(message, n)
            if alternate and new["role"] == last:  # ShareGPT's files are cut from longer ones: a message is lost
                due = "human" if last == "assistant" else "gpt"
                raise UserError(f"message {n} is of the role {last}, but it is the {due}'s turn; drop it, or the line")
            read.append(new)
            last = last if new["role"] == "system" else new["role"]
    except UserError:
        if not mend:
            raise
    while mend and read and read[-1]["role"] != "assistant":
        read.pop()
    if not read or read[-1]["role"] != "assistant":
        last = f"the last message is of the role {read[-1]['role']}; drop it" if read else "drop the line"
        raise UserError(f"no answer to train on: {last}")
    return read


def _read_message(message: Any, n: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"message {n} is {kind(message)}, but must be an object")
    role = ROLE_OF.get(str(message["from"]), message["from"]) if "from" in message else message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise UserError(f"message {n} has the role {role!r}, but it must be one of {', '.join(ROLES)}")
    content = message.get("content", message.get("text", message.get("value")))
    if message.get("function_call"):
        raise UserError(f"message {n} holds a function_call, OpenAI's old form; write it as tool_calls")
    calls = message.get("tool_calls") if role == "assistant" else None
    try:
        text = "" if content is None and calls else content_text(content)
    except UserError as error:
        raise UserError(f"message {n} ({role}): {error}") from None
    if role in ("user", "assistant") and not text.strip() and not calls:
        raise UserError(f"message {n} ({role}) has empty content; fill it, or drop the line")
    kept = {key: message[key] for key in ("tool_calls", "tool_call_id", "name", "weight") if key in message}
    _as_json(kept, f"message {n} ({role})")
    return {"role": role, "content": text, **kept}


def _as_json(value: Any, what: str) -> Any:
    """The value. Raises UserError for what JSON cannot hold, such as a time or bytes, which a Parquet file may have."""
    try:
        json.dumps(value)
    except (TypeError, RecursionError) as error:
        raise UserError(f"{what}: {error}; write it as text") from None
    return value


def _what(value: Any) -> str:
    return "empty" if value == [] or (isinstance(value, str) and not value.strip()) else kind(value)
