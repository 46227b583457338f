"""Text as token ids, and a conversation as the ids that Mistral's Instruct models learned.

E(x) is plain sentencepiece. The template of a conversation, by version of the tokenizer:

    v1      <s> E("[INST] " user " [/INST]") E(assistant) </s> ...      the system text opens the first user message
    v2, v3  <s> [INST] E(user) [/INST] E(assistant) </s> ...            the system text opens the last user message
            [AVAILABLE_TOOLS] E(json) [/AVAILABLE_TOOLS]                before the last user message
            [TOOL_CALLS] E(json) </s>                                   an assistant message that calls tools
            [TOOL_RESULTS] E(json) [/TOOL_RESULTS]                      a tool message

From v2 on the brackets are control pieces, put in by id. No text encodes to them, so a user who types "[INST]" forges
nothing; a conversation is never one rendered string. v2 forgets the calls and results before the last user message. v1
has no tools: a list of them is dropped, calls and results are refused.

Source: mistral-common, `tokens/tokenizers/instruct.py` (https://github.com/mistralai/mistral-common), whose ids
these are.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minilora.conversation import Turn, json_or_text, kind, read_conversation, read_tools
from minilora.errors import UserError
from minilora.hub import local_folder

VERSIONS = ("v1", "v2", "v3")
TOOL_CONTROLS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
CONTROLS = ("[INST]", "[/INST]", *TOOL_CONTROLS)  # at these ids:
INST, END_INST, TOOL_CALLS, TOOLS, END_TOOLS, TOOL_RESULTS, END_TOOL_RESULTS = range(3, 10)


class Tokenizer:
    """A sentencepiece model and the chat template of its version."""

    def __init__(self, model: SentencePieceProcessor, path: Path, version: str) -> None:
        self._model = model
        self.path = path
        self.version = version
        self.vocab_size: int = model.vocab_size()
        self.bos_id: int = model.bos_id()
        self.eos_id: int = model.eos_id()

    def encode(self, text: str) -> list[int]:
        """The text's ids, without <s> and </s>. "" has none. Raises UserError for half of a surrogate pair."""
        if not isinstance(text, str):
            raise UserError(f"only text can be encoded, and this is {kind(text)}")
        try:
            ids: list[int] = self._model.encode(text)
        except RuntimeError as error:
            lone = re.search("[\ud800-\udfff]", text)
            why = f"character {lone.start() + 1} is half of a surrogate pair; mend the text" if lone else str(error)
            raise UserError(f"the text cannot be encoded: {why}") from None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; control pieces have none. A prefix's text is not always a prefix of the whole's."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside of the vocabulary, 0 to {self.vocab_size - 1}")
        text: str = self._model.decode(ids)
        return text

    def control_name(self, token: int) -> str | None:
        """The name of a token that stands for no text: "<s>", "</s>" or, from v2 on, one of CONTROLS."""
        inside = INST <= token <= END_TOOL_RESULTS and self.version != "v1"
        return CONTROLS[token - INST] if inside else {self.bos_id: "<s>", self.eos_id: "</s>"}.get(token)

    def encode_text(self, text: str) -> list[int]:
        """<s> E(text) </s>: a document of raw text."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """A conversation's ids, and which of them are targets: the assistant's text or tool calls, and the </s> after.

        messages: {"role", "content"}, and "tool_calls", "weight" (0 makes no targets) or "prefix" (to be continued: no
            </s>) of an assistant, "tool_call_id" and "name" of a tool. If the last one is not an assistant's, the ids
            end where its answer begins
        tools: [{"type": "function", "function": {"name", "description", "parameters"}}]

        Raises UserError, which counts messages from 1, for a conversation that mistral-common refuses.
        """
        system, turns = read_conversation(messages, self.version)
        functions = read_tools(tools)
        if self.version == "v2":
            turns = _without_past_tools(turns)
        last_user = _last_user(turns)
        if system:
            home = 0 if self.version == "v1" else last_user
            turns[home] = replace(turns[home], text=f"{system}\n\n{turns[home].text}")

        ids, targets = [self.bos_id], [False]
        for i, turn in enumerate(turns):
            new = self._encode_v1(turn) if self.version == "v1" else self._encode_turn(turn)
            if functions and i == last_user and self.version != "v1":
                new = [TOOLS, *self.encode(_to_json(functions)), END_TOOLS, *new]
            ids += new
            targets += [turn.role == "assistant" and turn.weight != 0] * len(new)
        return ids, targets

    def _encode_v1(self, turn: Turn) -> list[int]:
        if turn.calls or turn.role == "tool":
            raise UserError("a v1 tokenizer has no tools; take a model with a v3 one, such as Mistral-7B v0.3")
        if turn.role == "user":
            return self.encode(f"[INST] {turn.text} [/INST]")
        return self.encode(turn.text) + [self.eos_id] * (not turn.prefix)

    def _encode_turn(self, turn: Turn) -> list[int]:
        if turn.role == "user":
            return [INST, *self.encode(turn.text), END_INST]
        if turn.role == "tool":
            content = json_or_text(turn.text)
            named = [{"name": turn.name, "content": content}]
            result = named if self.version == "v2" else {"content": content, "call_id": turn.call_id}
            return [TOOL_RESULTS, *self.encode(_to_json(result)), END_TOOL_RESULTS]
        if turn.calls:
            hidden = "id" if self.version == "v2" else None
            calls = [{key: value for key, value in call.items() if key != hidden} for call in turn.calls]
            return [TOOL_CALLS, *self.encode(_to_json(calls)), self.eos_id]
        return self.encode(turn.text.rstrip(" ")) + [self.eos_id] * (not turn.prefix)


def load_tokenizer(path: str | Path, version: str | None = None) -> Tokenizer:
    """Read a sentencepiece model: a file, or the tokenizer.model, tokenizer.model.v3, ... of a folder or of "demo".

    version: "v1", "v2" or "v3"; None asks the file's name, then its pieces

    Raises UserError, which names the file, if there is none, it is damaged, or it cannot serve that version.
    """
    file = _find_file(local_folder(path))
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        model = SentencePieceProcessor(model_proto=content) if content else None
    except RuntimeError:
        model = None
    if model is None:
        raise UserError(f"{file}: not a sentencepiece model (damaged, or a Git LFS pointer?); fetch it again")
    if min(model.bos_id(), model.eos_id()) < 0:
        raise UserError(f"{file}: the model has no <s> or no </s>, so it is not Mistral's")

    pieces = [(model.id_to_piece(i), model.is_control(i)) for i in range(min(18, model.vocab_size()))]
    version = version or _version_of(file.name, [piece for piece, _ in pieces])
    if version not in VERSIONS:
        raise UserError(f"{file}: tokenizer {version} is not supported; minilora knows {', '.join(VERSIONS)}")
    if version != "v1" and pieces[INST : END_TOOL_RESULTS + 1] != [(piece, True) for piece in CONTROLS]:
        raise UserError(f"{file}: ids 3 to 9 are not the control pieces of {version}; only version v1 can be served")
    return Tokenizer(model, file, version)


def _find_file(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer file or folder; name one with --model.tokenizer")
    if path.suffix == ".json":
        raise UserError(f"{path}: only sentencepiece tokenizers (tokenizer.model) are supported")
    if not path.is_dir():
        return path
    for name in ("tokenizer.model", "tokenizer.model.v3"):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*tokenizer*.model*"))
    if len(found) > 1:
        raise UserError(f"{path}: holds {', '.join(f.name for f in found)}; name the file to use")
    if not found:
        other = [name for name in ("tekken.json", "tokenizer.json") if (path / name).exists()]
        but = f", and {' and '.join(other)} cannot be read: only sentencepiece is supported" if other else ""
        raise UserError(f"{path}: holds no tokenizer.model{but}; name one with --model.tokenizer")
    return found[0]


def _version_of(name: str, pieces: list[str]) -> str:
    """The version that a file's name ends in (.v3, .v7m1), else the one that its first pieces tell."""
    if named := re.search(r"\.(v\d+)(m\d+)?$", name):
        return named[1]
    if "[SYSTEM_PROMPT]" in pieces:
        return "v7"
    if pieces[INST : INST + 1] != ["[INST]"]:
        return "v1"
    # Hugging Face ships v3's file as plain tokenizer.model; v2 has [control_8], ... there.
    return "v3" if "[IMG]" in pieces or "[PREFIX]" in pieces else "v2"


def _last_user(turns: list[Turn]) -> int:
    return max(i for i, turn in enumerate(turns) if turn.role == "user")  # there is one: a conversation begins with it


def _without_past_tools(turns: list[Turn]) -> list[Turn]:
    """v2's view: no calls and results before the last user message, and after it one result at a time."""
    last_user = _last_user(turns)
    turns = [turn for i, turn in enumerate(turns) if i > last_user or not (turn.calls or turn.role == "tool")]
    if any(before.role == turn.role == "tool" for before, turn in pairwise(turns)):
        raise UserError("a v2 tokenizer cannot hold several tool results in a row; give each call its own message")
    return turns


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"tools or tool calls cannot be written as JSON: {error}") from None
