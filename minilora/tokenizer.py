"""Text as token ids, and a conversation as the ids that Mistral's Instruct models learned.

E(x) is plain sentencepiece. The template of a conversation, by version of the tokenizer:

    v1      <s> E("[INST] " user " [/INST]") E(assistant) </s> ...      the system text opens the first user message
    v2, v3  <s> [INST] E(user) [/INST] E(assistant) </s> ...            the system text opens the last user message
            [AVAILABLE_TOOLS] E(json) [/AVAILABLE_TOOLS]                before the last user message
            [TOOL_CALLS] E(json) </s>                                   an assistant message that calls tools
            [TOOL_RESULTS] E(json) [/TOOL_RESULTS]                      a tool message
    v7      [SYSTEM_PROMPT] E(system) [/SYSTEM_PROMPT]                  where the message stands; else as v3, but
            [TOOL_RESULTS] E(call id) [TOOL_CONTENT] E(text) [/TOOL_RESULTS]
            E(assistant) [TOOL_CALLS] E(json) </s>                      an answer may end with calls

From v2 on the brackets are control pieces, put in by id. No text encodes to them, so a user who types "[INST]" forges
nothing; a conversation is never one rendered string. v2 forgets the calls and results before the last user message. v1
has no tools: a list of them is dropped, calls and results are refused.

E puts a space in front of the text. Hugging Face's old chat template of v0.1 and v0.2 rendered the answer right behind
"[/INST]", so there is none; weights tuned that way want `old_hf_spaces`. The bracket stays a piece of its own, as it is
when an answer is generated, where the rendered string may have one piece "](" for it and the answer's beginning.

Source: mistral-common, `tokens/tokenizers/instruct.py` (https://github.com/mistralai/mistral-common), whose ids
these are.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from minilora.conversation import Turn, kind, read_conversation, read_tools
from minilora.errors import UserError
from minilora.hub import local_folder

VERSIONS = ("v1", "v2", "v3", "v7")
TOOL_CONTROLS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
CONTROLS = ("[INST]", "[/INST]", *TOOL_CONTROLS)  # at these ids:
INST, END_INST, TOOL_CALLS, TOOLS, END_TOOLS, TOOL_RESULTS, END_TOOL_RESULTS = range(3, 10)
V7_CONTROLS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
SYSTEM, END_SYSTEM, TOOL_CONTENT = range(16, 19)
OLD_HF = "v1-hf"  # the template's name with `old_hf_spaces`
MAX_BYTES = 4_000_000  # of the file; Mistral's have 0.6 MB
MAY_LACK = 512  # pieces that a model's vocabulary has beyond the tokenizer's: added tokens, and padding of the matrix


class Tokenizer:
    """A sentencepiece model and the chat template of its version; `template` is the name that a run records."""

    def __init__(self, model: SentencePieceProcessor, path: Path, version: str, old_hf_spaces: bool = False) -> None:
        self._model = model
        self.path = path
        self.version = version
        self.template = OLD_HF if old_hf_spaces else version
        self.vocab_size: int = model.vocab_size()
        self.bos_id: int = model.bos_id()
        self.eos_id: int = model.eos_id()
        self.space_id: int = model.piece_to_id("▁")
        self.shows_tools = version != "v1"

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
        """The text of the ids; control pieces have none. It is not that of its parts, joined: see `TextStream`."""
        text: str = self._model.decode(self.known(ids))
        return text

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that pieces such as <0xE2> stand for; other tokens have none."""
        pieces = (self._model.id_to_piece(i) for i in self.known(ids) if self._model.is_byte(i))
        return bytes(int(piece[1:-1], 16) for piece in pieces)

    def known(self, ids: Iterable[int]) -> list[int]:
        """Those that are pieces: what a model's vocabulary has beyond them (`mismatch`) has no text. Raises UserError
        for any other."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size + MAY_LACK:
                raise UserError(f"token id {i} is outside of the vocabulary, 0 to {self.vocab_size - 1}")
        return [i for i in ids if i < self.vocab_size]

    def control_name(self, token: int) -> str | None:
        """The name of a token that stands for no text: "<s>", "</s>" or, from v2 on, "[INST]", ..."""
        return self._model.id_to_piece(token) if self._model.is_control(token) else None

    def mismatch(self, vocab_size: int) -> str | None:
        """Why it is not the tokenizer of a model with a vocabulary of that size, and what to do; None if it may be."""
        if 0 <= vocab_size - self.vocab_size <= MAY_LACK:
            return None
        has = f"a {self.version} tokenizer of {self.vocab_size:,} pieces, but the model's vocabulary has {vocab_size:,}"
        return f"{self.path}: {has}; take the tokenizer that came with the model, with --model.tokenizer"

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
        last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
        if system:
            home = 0 if self.version == "v1" else last_user
            turns[home] = replace(turns[home], text=f"{system}\n\n{turns[home].text}")
        if self.version == "v2" and any(a.role == b.role == "tool" for a, b in pairwise(turns[last_user + 1 :])):
            raise UserError("a v2 tokenizer cannot hold several tool results in a row; give each call its own message")

        ids, targets = [self.bos_id], [False]
        for i, turn in enumerate(turns):
            if self.version == "v2" and i < last_user and (turn.calls or turn.role == "tool"):
                continue
            new = self._encode_v1(turn) if self.version == "v1" else self._encode_turn(turn)
            if functions and i == last_user and self.shows_tools:
                new = [TOOLS, *self.encode(_to_json(functions)), END_TOOLS, *new]
            ids += new
            targets += [turn.role == "assistant" and turn.weight != 0] * len(new)
        return ids, targets

    def _encode_v1(self, turn: Turn) -> list[int]:
        if turn.calls or turn.role == "tool":
            raise UserError("a v1 tokenizer has no tools; take a model with a v3 one, such as Mistral-7B v0.3")
        if turn.role == "user":
            return self.encode(f"[INST] {turn.text} [/INST]")
        before = "☺" if self.template == OLD_HF else ""  # takes the space, and no piece joins it with what follows
        return self.encode(before + turn.text)[len(self.encode(before)) :] + [self.eos_id] * (not turn.prefix)

    def _encode_turn(self, turn: Turn) -> list[int]:
        if turn.role == "user":
            return [INST, *self.encode(turn.text), END_INST]
        if turn.role == "system":
            return [SYSTEM, *self.encode(turn.text), END_SYSTEM]
        if turn.role == "tool":
            return [TOOL_RESULTS, *self._encode_result(turn), END_TOOL_RESULTS]
        ids = self.encode(turn.text.rstrip(" "))
        if turn.calls:
            hidden = "id" if self.version == "v2" else None
            calls = [{key: value for key, value in call.items() if key != hidden} for call in turn.calls]
            ids += [TOOL_CALLS, *self.encode(_to_json(calls))]
        return ids + [self.eos_id] * (not turn.prefix)

    def _encode_result(self, turn: Turn) -> list[int]:
        if self.version == "v7":
            return [*self.encode(turn.call_id), TOOL_CONTENT, *self.encode(turn.result)]
        if self.version == "v2":
            return self.encode(_to_json([{"name": turn.name, "content": turn.result}]))
        return self.encode(_to_json({"content": turn.result, "call_id": turn.call_id}))


class TextStream:
    """The text of tokens that come one by one. The pieces, joined, are `Tokenizer.decode` of all tokens.

    What is given is final: the bytes of a character wait until it is complete, or cannot become one, at most three.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        self._begun = False

    def add(self, token: int) -> str:
        """The text that this token makes final, often "". Raises UserError for an id outside of the vocabulary."""
        ids = [*self._held, *self._tokenizer.known([token])]
        begun = self._tokenizer.bytes_of(ids)
        whole = codecs.utf_8_decode(begun, "replace", False)[1] if len(begun) == len(ids) else len(ids)
        self._held = ids[whole:]
        return self._decode(ids[:whole])

    def end(self) -> str:
        """The text of what was held back: bytes that no character came of."""
        held, self._held = self._held, []
        return self._decode(held)

    def _decode(self, ids: list[int]) -> str:
        space = [self._tokenizer.space_id] * self._begun  # instead of it, a space that begins `ids` would be dropped
        self._begun = self._begun or any(self._tokenizer.control_name(i) is None for i in ids)
        return self._tokenizer.decode(space + ids)


def load_tokenizer(path: str | Path, version: str | None = None, old_hf_spaces: bool = False) -> Tokenizer:
    """Read a sentencepiece model: a file, or the tokenizer.model, tokenizer.model.v3, ... of a folder, of "demo" or of
    a name on the hub, of which only the tokenizer's files are fetched.

    version: "v1", "v2", "v3" or "v7"; None asks the file's name, then its pieces
    old_hf_spaces: v1 answers without a space before them, as Hugging Face's chat template once had it

    Raises UserError, which names the file, if there is none, it is damaged, or it cannot serve that version.
    """
    file = _find_file(local_folder(path, tokenizer_only=True))
    try:
        if not os.path.isfile(file) or not 0 < file.stat().st_size <= MAX_BYTES:
            raise RuntimeError
        model = SentencePieceProcessor(model_proto=file.read_bytes())
        texts = model.id_to_piece(list(range(model.vocab_size())))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (RuntimeError, UnicodeDecodeError):
        raise UserError(f"{file}: not a sentencepiece model (damaged, or a Git LFS pointer?); fetch it again") from None
    if min(model.bos_id(), model.eos_id()) < 0:
        raise UserError(f"{file}: the model has no <s> or no </s>, so it is not Mistral's")

    pieces = [text if model.is_control(i) else "" for i, text in enumerate(texts[:19])]
    version = version or _version_of(file.name, pieces)
    if version not in VERSIONS:
        raise UserError(f"{file}: tokenizer {version} is not supported; minilora knows {', '.join(VERSIONS)}")
    if version != "v1" and pieces[INST : END_TOOL_RESULTS + 1] != list(CONTROLS):
        raise UserError(f"{file}: ids 3 to 9 are not the control pieces of {version}; only version v1 can be served")
    if version == "v7" and pieces[SYSTEM : TOOL_CONTENT + 1] != list(V7_CONTROLS):
        raise UserError(f"{file}: ids 16 to 18 are not the control pieces of v7; take the file that came with it")
    if old_hf_spaces and version != "v1":
        raise UserError(f"{file}: model.old_hf_spaces is a rule of v1 tokenizers, and this one is {version}; drop it")
    return Tokenizer(model, file, version, old_hf_spaces)


def _find_file(path: Path) -> Path:
    if not os.path.exists(path):
        raise UserError(f"{path}: no such tokenizer file or folder; name one with --model.tokenizer")
    if path.suffix == ".json":
        raise UserError(f"{path}: {_foreign(path.name)}")
    if not os.path.isdir(path):
        return path
    for name in ("tokenizer.model", "tokenizer.model.v3"):
        if os.path.isfile(path / name):
            return path / name
    found = sorted(path.glob("*tokenizer*.model*"))
    if len(found) > 1:
        raise UserError(f"{path}: holds {', '.join(f.name for f in found)}; name the file to use")
    if not found:
        other = [f"; {name} {_foreign(name)}" for name in ("tekken.json", "tokenizer.json") if (path / name).exists()]
        raise UserError(f"{path}: holds no tokenizer.model{other[0] if other else '; name one with --model.tokenizer'}")
    return found[0]


def _foreign(name: str) -> str:
    if "tekken" in name:
        return "is a Tekken tokenizer, which is not supported; take a model with a tokenizer.model, as Mistral-7B v0.3"
    return "is no sentencepiece model; fetch the same model's tokenizer.model and name it with --model.tokenizer"


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


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"tools or tool calls cannot be written as JSON: {error}") from None
