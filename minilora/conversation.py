"""What a conversation may be, and its normal form: one system text and turns that begin with a user's.

In v7 system messages are turns, too, any turn may be the first, and an assistant's may hold text and tool calls.

Source: mistral-common, `protocol/instruct/validator.py` (which role may follow which, calls and results that match) and
`normalize.py` (system texts joined, neighbours of one role joined, by empty lines). Every refusal is one line that says
which message, counted from 1. That a tool's parameters are a JSON schema is not checked here: any object will do.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from minilora.errors import UserError

MAY_FOLLOW = {
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}
ROLES = tuple(MAY_FOLLOW)


@dataclass(frozen=True)
class Turn:
    """A message as the templates see it: the role's own text, tool calls as {"name", "arguments"[, "id"]}.

    result: what a tool gave, up to v3 the value that its JSON holds
    """

    role: str
    text: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    result: Any = None
    call_id: Any = None
    name: str | None = None
    weight: float | None = None
    prefix: bool = False


def read_conversation(messages: Sequence[Mapping[str, Any]], version: str) -> tuple[str, list[Turn]]:
    """Check messages by the rules of a tokenizer's version; (the system text or "", the turns).

    Raises UserError for what mistral-common refuses.
    """
    turns = [_read_message(message, n, version) for n, message in enumerate(messages, 1)]
    _check_order(turns)
    if version in ("v3", "v7"):
        _check_call_ids(turns, version)
    if version == "v7":
        return "", _merge(turns, version)
    system = (t.text for t, m in zip(turns, messages, strict=True) if t.role == "system" and m["content"])
    return "\n\n".join(system), _merge(turns, version)


def content_text(content: Any) -> str:
    """A message's content, a text or a list of {"type": "text", "text"} joined by empty lines, as one text."""
    if isinstance(content, str):
        return content
    what = kind(content)
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in content]
        if all(isinstance(text, str) for text in texts):
            return "\n\n".join(text for text in texts if text)
        n = next(n for n, text in enumerate(texts) if not isinstance(text, str))
        what += f" whose part {n + 1} is {kind(part := content[n])}"
        if isinstance(part, Mapping):
            what += f" (type {part.get('type')!r}, text {kind(part.get('text'))})"
    raise UserError(f"its content is {what}, but must be text or a list of text parts")


def _read_message(message: Mapping[str, Any], n: int, version: str) -> Turn:
    try:
        if not isinstance(message, Mapping):
            raise UserError(f"it is {kind(message)}, but must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"its role is {role!r}, but must be one of {', '.join(ROLES)}")
        if role == "assistant":
            return _read_assistant(message, version)
        text = content_text(content)
        if role != "tool":
            return Turn(role, text)
        if (name := message.get("name")) is not None:
            _check_name(name)
        result = text if version == "v7" else json_or_text(text)
        return Turn(role, result=result, call_id=message.get("tool_call_id"), name=name)
    except UserError as error:
        raise UserError(f"message {n}: {error}") from None


def _read_assistant(message: Mapping[str, Any], version: str) -> Turn:
    content, calls, weight = message.get("content"), message.get("tool_calls") or [], message.get("weight")
    text = "" if content is None else content_text(content)
    if not isinstance(calls, list):
        raise UserError(f"its tool_calls are {kind(calls)}, but must be a list")
    if bool(content) == bool(calls) and version != "v7":
        has = "both content and tool_calls" if content else "neither content nor tool_calls"
        raise UserError(f"the assistant has {has}, but must have one of them")
    if weight not in (None, 0, 1):
        raise UserError(f"its weight is {weight!r}, but must be 0 or 1")
    return Turn("assistant", text, tuple(map(_read_call, calls)), weight=weight, prefix=bool(message.get("prefix")))


def _read_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise UserError('a tool call must be {"id", "function": {"name", "arguments"}}')
    _check_name(function.get("name"))
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str | dict):
        raise UserError(f"the arguments of a tool call are {kind(arguments)}, but must be an object or its JSON")
    shown = {"name": function["name"], "arguments": json_or_text(arguments or "")}
    return shown if call.get("id") in (None, "null") else {**shown, "id": call["id"]}


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools as a model is shown them, keys in this order: type, function: name, description, parameters."""
    return [_read_tool(tool, n) for n, tool in enumerate(tools or (), 1)]


def _read_tool(tool: Any, n: int) -> dict[str, Any]:
    tool = tool if isinstance(tool, Mapping) else {}
    function = tool.get("function")
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise UserError(f'tool {n} must be {{"type": "function", "function": {{"name", "description", "parameters"}}}}')
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(description, str | None) or not isinstance(parameters, dict | None):
        raise UserError(f"tool {n}: its description must be text and its parameters an object")
    _check_name(name)
    shown = {"name": name, "description": description or "", "parameters": parameters or {}}
    return {"type": "function", "function": shown}


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise UserError(f"a function is named {name!r}, but 1 to 64 letters, digits, _ and - can be a name")


def _check_order(turns: list[Turn]) -> None:
    if not turns:
        raise UserError("the conversation has no messages")
    if len(turns) == 1 and turns[0].role not in ("user", "system"):
        raise UserError(f"the only message is of the role {turns[0].role}; begin with a user message")
    open_calls = 0
    for n, (before, turn) in enumerate(pairwise(turns), 2):
        if turn.role not in MAY_FOLLOW[before.role]:
            raise UserError(f"message {n}: the role {turn.role} cannot follow {before.role}")
        if before.prefix:
            raise UserError(f"message {n - 1}: only the last message can be a prefix")
        if turn.role == "tool":
            open_calls -= 1
        elif turn.role == "assistant":
            if open_calls > 0:
                raise UserError(f"message {n}: the assistant goes on, but {open_calls} tool calls have no result")
            open_calls = len(turn.calls)
        if open_calls < 0:
            raise UserError(f"message {n}: a tool result, but no tool call is open")
    if open_calls and (turns[-1].role != "assistant" or turns[-1].prefix):
        raise UserError(f"the conversation ends, but {open_calls} tool calls have no result")


def _check_call_ids(turns: list[Turn], version: str) -> None:
    """v3 and v7 pair calls and results by ids of 9 letters or digits; a last call that is trained on may have none."""
    for n, turn in enumerate(turns, 1):
        call_ids = [turn.call_id] if turn.role == "tool" else [call.get("id") for call in turn.calls]
        for call_id in call_ids:
            if call_id is None and turn.role == "assistant" and n == len(turns):
                continue
            if not isinstance(call_id, str) or not re.fullmatch("[a-zA-Z0-9]{9}", call_id):
                must = f"but {version} needs 9 letters or digits; rename it in the call and in its result"
                raise UserError(f"message {n}: the tool call id is {call_id!r}, {must}")


def _merge(turns: list[Turn], version: str) -> list[Turn]:
    """Neighbours of one role and weight as one turn, but for results; up to v3 no system's, and a user's first."""
    merged, n = list[Turn](), 0
    for (role, _), group in groupby(turns, key=lambda turn: (turn.role, turn.weight)):
        run = list(group)
        n += len(run)
        if role == "tool" or (role == "system" and version == "v7"):
            merged += run
        elif role != "system":
            text = "\n\n".join(turn.text for turn in run if turn.text)
            calls = tuple(call for turn in run for call in turn.calls)
            if text and calls and version != "v7":
                raise UserError("neighbouring assistant messages hold content and tool calls; put a user's in between")
            if role == "assistant" and not text and not calls:
                raise UserError(f"message {n}: the assistant has neither content nor tool_calls")
            merged.append(replace(run[-1], text=text, calls=calls))
    if version != "v7" and (not merged or merged[0].role != "user"):
        merged.insert(0, Turn("user"))
    return merged


def json_or_text(content: str | dict[str, Any]) -> Any:
    """Tool arguments and results are shown as the JSON that they hold, else as a string of it; nothing is {}."""
    if not isinstance(content, str):
        return content
    try:
        return json.loads(content or "{}")
    except json.JSONDecodeError:
        return content
    except (ValueError, RecursionError):  # ValueError: an integer of thousands of digits
        raise UserError(
            "JSON of a tool call or result has a number too long or nests too deep; give it as text"
        ) from None


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    words = {type(None): "missing", str: "text", bool: "true or false", list: "a list", dict: "an object"}
    return words.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
