"""The tokenizer against mistral-common, which owns the format: 20 fixed vectors and generated conversations."""

import json
import random
import string
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import (
    FinetuningAssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers import instruct
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from sentencepiece import SentencePieceTrainer

from minilora.errors import UserError
from minilora.tokenizer import CONTROLS, VERSIONS, Tokenizer, load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
}
VECTORS = json.loads((Path(__file__).parent / "vectors" / "tokenizer_vectors.json").read_text("utf-8"))["vectors"]

Message = dict[str, Any]


@cache
def ours(version: str) -> Tokenizer:
    return load_tokenizer(FILES[version])


def user(content: Any = "Hello") -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = "Hi", **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(id_: str = "abcdefgh1", name: str = "f", arguments: Any = '{"x": 1}') -> Message:
    return {"role": "assistant", "tool_calls": [{"id": id_, "function": {"name": name, "arguments": arguments}}]}


def result(id_: str = "abcdefgh1", content: Any = "2", **more: Any) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": id_, **more}


# The oracle: mistral-common's validator, normalizer and template.

ROLES: dict[str, Any] = {
    "system": SystemMessage,
    "user": UserMessage,
    "assistant": FinetuningAssistantMessage,
    "tool": ToolMessage,
}


@cache
def template(version: str) -> Any:
    return getattr(instruct, f"InstructTokenizer{version.upper()}")(SentencePieceTokenizer(FILES[version]))


def theirs(version: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
    read = [ROLES[m["role"]].model_validate(m) for m in messages]
    trained = bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("prefix")
    mode = ValidationMode.finetuning if trained else ValidationMode.serving
    request: Any = ChatCompletionRequest.model_construct(
        model="m", messages=read, tools=[Tool.model_validate(tool) for tool in tools] if tools else None
    )
    get_validator(TokenizerVersion(version), mode).validate_request(request)
    normalizer: Any = InstructRequestNormalizer(
        UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, InstructRequest, None
    )
    tokens: list[int] = template(version).encode_instruct(normalizer.from_chat_completion_request(request)).tokens
    return tokens


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['case']}-{v['version']}")
def test_vectors(vector: dict[str, Any]) -> None:
    version, file = vector["version"], DATA / vector["tokenizer_file"]
    if version not in VERSIONS:
        with pytest.raises(UserError, match=file.name):
            load_tokenizer(file)
    elif "text" in vector:
        assert load_tokenizer(file).encode_text(vector["text"]) == vector["tokens"]
    else:
        ids, targets = load_tokenizer(file).encode_chat(vector["messages"], vector["tools"])
        assert ids == vector["tokens"]
        assert targets == [bool(target) for target in vector["target_mask"]]


# Generated conversations.

WORDS = [
    "Hello",
    "what is 2+2?",
    "naïve café",
    "日本語のテスト",
    "🙂👩‍👩‍👧",
    "tab\there",
    "line\nbreak\r\n",
    "\u200b",
    "\x00",
    "¿qué?",
]
LOOKALIKES = [
    "[INST]",
    "[/INST]",
    "</s>",
    "<s>",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS] x",
    "[/TOOL_RESULTS]",
    "<unk>",
    "▁",
]
SPACES = ["", " ", "  ", "\n", "\n\n", "\t", "   ", "\u3000"]
JSONS = [
    '{"a": 1}',
    '"text"',
    "[1, 2.50]",
    "{'not': json}",
    "null",
    "1e3",
    '{"k": "\\u00e9", "k": "日"}',
    "",
    "NaN",
    "{}",
]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "日本"}}}


class Generator:
    """Conversations that are mostly in order, with anything in their texts."""

    def __init__(self, version: str) -> None:
        self.random = random.Random(version)
        self.tools = 0.02 if version == "v1" else 0.3

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def text(self) -> str:
        pick = self.random.choice
        words = (pick(pick([WORDS, WORDS, LOOKALIKES])) + pick(SPACES) for _ in range(self.random.randint(1, 4)))
        return pick(SPACES) + "".join(words)

    def content(self) -> Any:
        if self.chance(0.9):
            return self.text()
        return [{"type": "text", "text": text} for text in (self.text(), self.random.choice(["", self.text()]))]

    def id(self) -> str:
        return "".join(self.random.choices(string.ascii_letters + string.digits, k=9))

    def tool_round(self) -> list[Message]:
        arguments = self.random.choice([*JSONS, {"city": "Zürich"}])
        calls: list[Message] = [
            {"id": self.id(), "function": {"name": f"get-{n}_x", "arguments": arguments}}
            for n in range(1 if self.chance(0.8) else 2)
        ]
        name = {"name": "get-0_x"} if self.chance(0.5) else {}
        results = [result(c["id"], self.random.choice([*JSONS, self.text()]), **name) for c in calls]
        return [{"role": "assistant", "tool_calls": calls}, *results]

    def conversation(self) -> tuple[list[Message], list[dict[str, Any]] | None]:
        messages: list[Message] = []
        for turn in range(self.random.randint(1, 4)):
            if self.chance(0.02 if turn else 0.4):
                messages.append({"role": "system", "content": self.content() if self.chance(0.9) else ""})
            messages += [user(self.content()) for _ in range(self.random.choice([1, 1, 1, 1, 2, 0]))]
            if self.chance(self.tools):
                messages += self.tool_round()
            weight = {"weight": self.random.choice([0, 1])} if self.chance(0.2) else {}
            messages += [assistant(self.content(), **weight) for _ in range(self.random.choice([1, 1, 1, 1, 2]))]
        if self.chance(0.3):  # a prompt to be answered, or to be continued
            messages.append(user(self.content()) if self.chance(0.7) else assistant(self.content(), prefix=True))
        function = {"name": "get", "description": self.text(), "parameters": PARAMETERS}
        tools = [{"type": "function", "function": function}] if self.chance(0.3) else None
        return messages, tools

    def damaged(self, messages: list[Message]) -> list[Message]:
        """Now and then without a message, with two swapped, or with a field changed."""
        messages = [dict(message) for message in messages]
        i, j = (self.random.randrange(len(messages)) for _ in range(2))
        damage = self.random.randrange(8)
        if damage == 0:
            del messages[i]
        elif damage == 1:
            messages[i], messages[j] = messages[j], messages[i]
        elif damage == 2:
            messages[i]["content"] = self.random.choice(["", None, []])
        elif damage == 3 and "tool_call_id" in messages[i]:
            messages[i]["tool_call_id"] = self.random.choice(["short", None, "call_1234567890"])
        return messages


@pytest.mark.parametrize("version", VERSIONS)
def test_generated_conversations_are_mistral_common_s(version: str) -> None:
    generator = Generator(version)
    n_equal = n_refused = 0
    while n_equal < 500:
        messages, tools = generator.conversation()
        messages = generator.damaged(messages)
        try:
            expected = theirs(version, messages, tools)
        except (MistralCommonException, ValueError, AssertionError):
            with pytest.raises(UserError) as refused:
                ours(version).encode_chat(messages, tools)
            assert "\n" not in str(refused.value)
            n_refused += 1
            continue
        ids, targets = ours(version).encode_chat(messages, tools)
        assert ids == expected, f"{messages} {tools}"
        assert len(targets) == len(ids)
        n_equal += 1
    assert n_refused > 50, "hardly any conversation was refused"


# Targets, by what they decode to.


def answers(tokenizer: Tokenizer, ids: list[int], targets: list[bool]) -> list[list[int]]:
    """The targets, cut after each </s>."""
    found: list[list[int]] = [[]]
    for i, target in zip(ids, targets, strict=True):
        if target:
            found[-1].append(i)
            if i == tokenizer.eos_id:
                found.append([])
    return found[:-1] if not found[-1] else found


@pytest.mark.parametrize("version", VERSIONS)
def test_targets_are_the_assistant_s_words_and_eos(version: str) -> None:
    generator, tokenizer = Generator(version), ours(version)
    for _ in range(100):
        weights = generator.random.choices([None, 0, 1], k=3)
        texts = [generator.text() for _ in weights]
        messages = [
            m for w, t in zip(weights, texts, strict=True) for m in (user(generator.text()), assistant(t, weight=w))
        ]
        found = answers(tokenizer, *tokenizer.encode_chat(messages))
        trained = [text for text, weight in zip(texts, weights, strict=True) if weight != 0]
        spoken = trained if version == "v1" else [text.rstrip(" ") for text in trained]
        spoken = [text.replace("▁", " ") for text in spoken]  # sentencepiece's own sign for a space
        assert [tokenizer.decode(ids[:-1]) for ids in found] == spoken
        assert all(ids[-1] == tokenizer.eos_id for ids in found)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_targets_of_a_tool_round_are_the_call_and_the_answer(version: str) -> None:
    tokenizer = ours(version)
    found = answers(tokenizer, *tokenizer.encode_chat([user(), call(), result(), assistant("Two")]))
    assert found[0][0] == 5, "[TOOL_CALLS] is predicted"
    shown = {"name": "f", "arguments": {"x": 1}} | ({"id": "abcdefgh1"} if version == "v3" else {})
    assert json.loads(tokenizer.decode(found[0])) == [shown]
    assert tokenizer.decode(found[1]) == "Two"
    assert len(found) == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_prompt_is_where_the_answer_begins(version: str) -> None:
    generator, tokenizer = Generator(version), ours(version)
    for _ in range(50):
        messages = [user(generator.text()), assistant(generator.text()), user(generator.text())]
        prompt, prompt_targets = tokenizer.encode_chat(messages)
        ids, targets = tokenizer.encode_chat([*messages, assistant(generator.text())])
        assert ids[: len(prompt)] == prompt
        assert targets[: len(prompt)] == prompt_targets
        assert not prompt_targets[-1]
        assert all(targets[len(prompt) :])


# Text.


@pytest.mark.parametrize("version", VERSIONS)
def test_text_survives_and_cannot_forge_control_pieces(version: str) -> None:
    generator, tokenizer = Generator(version), ours(version)
    for text in ["", *LOOKALIKES, *(generator.text() for _ in range(200))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert version == "v1" or not set(range(3, 10)) & set(ids)
        assert tokenizer.encode_text(text) == [tokenizer.bos_id, *ids, tokenizer.eos_id]


@pytest.mark.parametrize(
    ("text", "message"),
    [("ab\ud800", "character 3 is half of a surrogate pair"), (5, "a number"), (None, "missing"), (b"x", "bytes")],
)
def test_what_cannot_be_encoded(text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours("v3").encode(text)


@pytest.mark.parametrize("wrong", [-1, 32768, 2**40])
def test_ids_out_of_range(wrong: int) -> None:
    with pytest.raises(UserError, match=f"token id {wrong} .* 0 to 32767"):
        ours("v3").decode([1, wrong])


# What is refused, and how it is said.


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no messages"),
        ([assistant()], "begin with a user message"),
        ([user(), result()], "message 2: the role tool cannot follow user"),
        (
            [user(), assistant(), {"role": "system", "content": "x"}],
            "message 3: the role system cannot follow assistant",
        ),
        ([user(), assistant("")], "message 2: the assistant has neither content nor tool_calls"),
        ([user(), call() | {"content": "x"}], "message 2: the assistant has both"),
        ([user(), {"role": "tutor", "content": "x"}], "message 2: its role is 'tutor'"),
        ([user(None), assistant()], "message 1: its content is missing"),
        ([user([{"type": "image_url"}]), assistant()], "message 1: its content is a list"),
        ([user(), assistant(weight=2)], "message 2: its weight is 2"),
        ([user(), assistant(prefix=True), user()], "message 2: only the last message can be a prefix"),
        ([user(), call(), assistant()], "message 3: the assistant goes on, but 1 tool calls have no result"),
        ([user(), call(), result(), result()], "message 4: a tool result, but no tool call is open"),
        ([user(), call(), user()], "ends, but 1 tool calls have no result"),
        ([user(), call("call_123")], "message 2: the tool call id is 'call_123', but v3 needs 9"),
        ([user(), call(), result("short"), assistant()], "message 3: the tool call id is 'short'"),
        ([user(), call(name="no spaces")], "message 2: a function is named 'no spaces'"),
        ([user(), call(arguments=[1])], "message 2: the arguments of a tool call are a list"),
        ([user(), {"role": "assistant", "tool_calls": [{}]}], "message 2: a tool call must be"),
        ([user(), {"role": "assistant", "tool_calls": "f()"}], "message 2: its tool_calls are text"),
        ([user(), call(), result(name="?"), assistant()], "message 3: a function is named"),
        ([user(), assistant("a"), call()], "neighbouring assistant messages"),
        (["hello"], "message 1: it is text"),
        ([user("\udcff"), assistant()], "half of a surrogate pair"),
    ],
)
def test_refused_conversations(messages: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ours("v3").encode_chat(messages)


@pytest.mark.parametrize("tool", ["f", {}, {"type": "web"}, {"function": {"name": "f", "parameters": []}}])
def test_refused_tools(tool: Any) -> None:
    good = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(UserError, match="tool 2"):
        ours("v3").encode_chat([user()], [good, tool])


def test_versions_without_tools() -> None:
    with pytest.raises(UserError, match="v1 tokenizer has no tools"):
        ours("v1").encode_chat([user(), call(), result(), assistant()])
    twice = {"role": "assistant", "tool_calls": [*call("aaaaaaaaa")["tool_calls"], *call("bbbbbbbbb")["tool_calls"]]}
    with pytest.raises(UserError, match="several tool results in a row"):
        ours("v2").encode_chat([user(), twice, result("aaaaaaaaa"), result("bbbbbbbbb"), assistant()])


def test_values_that_json_cannot_write() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {1, 2}}}}
    with pytest.raises(UserError, match="cannot be written as JSON"):
        ours("v3").encode_chat([user()], [tool])


# Files and versions.


def train(path: Path, controls: list[str]) -> Path:
    """A sentencepiece model of bytes and a few pieces, with control pieces from id 3 on."""
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c abc bca cab"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=3 + len(controls) + 256 + 10,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=controls,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def test_versions_are_told_by_the_pieces(tmp_path: Path) -> None:
    v3 = [*CONTROLS, "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
    spare = [f"[control_{n}]" for n in range(8, 12)]
    for version, controls in {"v1": [], "v2": [*CONTROLS, *spare], "v3": v3}.items():
        tokenizer = load_tokenizer(train(tmp_path / "tokenizer.model", controls))
        assert (tokenizer.version, tokenizer.vocab_size < 300) == (version, True)
        (tmp_path / "real.model").write_bytes(FILES[version].read_bytes())
        assert load_tokenizer(tmp_path / "real.model").version == version
    assert tokenizer.encode_chat([user("a"), assistant("b")])[0][:2] == [1, 3]
    (tmp_path / "real.model").write_bytes(FILES["v7"].read_bytes())
    with pytest.raises(UserError, match=r"real.model: tokenizer v7 is not supported"):
        load_tokenizer(tmp_path / "real.model")


def test_a_version_can_be_asked_for_if_the_pieces_serve_it() -> None:
    assert load_tokenizer(FILES["v3"], version="v2").version == "v2"
    assert load_tokenizer(FILES["v3"], version="v1").encode_chat([user(), assistant()])[0][1] != 3
    with pytest.raises(UserError, match=r"tokenizer.model.v1: ids 3 to 9 are not the control pieces of v3"):
        load_tokenizer(FILES["v1"], version="v3")
    with pytest.raises(UserError, match="tokenizer v9 is not supported"):
        load_tokenizer(FILES["v3"], version="v9")


def test_a_name_that_the_pieces_belie_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v3").write_bytes(FILES["v1"].read_bytes())
    with pytest.raises(UserError, match=r"tokenizer.model.v3: ids 3 to 9"):
        load_tokenizer(tmp_path)
    typed = [*CONTROLS[:3], "[TOOLS]", *CONTROLS[4:]]
    with pytest.raises(UserError, match="ids 3 to 9"):
        load_tokenizer(train(tmp_path / "other.model", typed))


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer.model; name one with --model.tokenizer$"):
        load_tokenizer(tmp_path)
    for name in ("tekken.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="only sentencepiece"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match=r"tekken.json and tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model.v2").write_bytes(FILES["v2"].read_bytes())
    assert load_tokenizer(tmp_path).version == "v2"
    (tmp_path / "tokenizer.model.v1").write_bytes(FILES["v1"].read_bytes())
    with pytest.raises(UserError, match=r"holds tokenizer.model.v1, tokenizer.model.v2; name the file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model.v3").write_bytes(FILES["v3"].read_bytes())
    assert load_tokenizer(str(tmp_path)).version == "v3"
    (tmp_path / "tokenizer.model").write_bytes(FILES["v1"].read_bytes())
    assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer.model"


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 99, b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 9]
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.model: "):
        load_tokenizer(file)
    with pytest.raises(UserError, match="missing: no such"):
        load_tokenizer(tmp_path / "missing")


def test_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(FILES["v3"].read_bytes()[:-7])
    with pytest.raises(UserError, match=r"tokenizer.model: "):
        load_tokenizer(file)
