"""The tokenizer against mistral-common, which owns the format: 20 fixed vectors and 2,000 generated conversations a
version; without the space before answers, against Hugging Face's rendering; text that comes token by token."""

import json
import random
import re
import string
from collections.abc import Callable
from functools import cache, wraps
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
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer, InstructRequestNormalizerV7
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers import instruct
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from sentencepiece import SentencePieceTrainer
from transformers import LlamaTokenizer

from minilora.errors import UserError
from minilora.tokenizer import CONTROLS, MAY_LACK, VERSIONS, TextStream, Tokenizer, load_tokenizer

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
def template(version: str) -> tuple[Any, list[tuple[Any, list[int]]]]:
    """The template of a version, and a list of the messages that it encodes, each with its ids."""
    made, encoded = getattr(instruct, f"InstructTokenizer{version.upper()}")(SentencePieceTokenizer(FILES[version])), []

    def remembered(encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)
        def wrapper(message: Any, *args: Any, **more: Any) -> Any:
            made = encode(message, *args, **more)
            encoded.append((message, made[0] if isinstance(made, tuple) else made))
            return made

        return wrapper

    made.decode = lambda *_, **__: ""  # which it would do to all that it has encoded, for a text that is not looked at
    for role in ROLES:
        setattr(made, f"encode_{role}_message", remembered(getattr(made, f"encode_{role}_message")))
    return made, encoded


def theirs(version: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[list[int], list[bool]]:
    """Their ids; and as targets what their template made of the assistant's messages that have weight."""
    read = [ROLES[m["role"]].model_validate(m) for m in messages]
    trained = bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("prefix")
    mode = ValidationMode.finetuning if trained else ValidationMode.serving
    request: Any = ChatCompletionRequest.model_construct(
        model="m", messages=read, tools=[Tool.model_validate(tool) for tool in tools] if tools else None
    )
    get_validator(TokenizerVersion(version), mode).validate_request(request)
    kind = InstructRequestNormalizerV7 if version == "v7" else InstructRequestNormalizer
    normalizer: Any = kind(UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, InstructRequest, None)
    made, encoded = template(version)
    encoded.clear()
    ids: list[int] = made.encode_instruct(normalizer.from_chat_completion_request(request)).tokens
    assert [1, *(i for _, part in encoded for i in part)] == ids
    learned = [isinstance(message, FinetuningAssistantMessage) and message.weight != 0 for message, _ in encoded]
    return ids, [False, *(is_ for is_, (_, part) in zip(learned, encoded, strict=True) for _ in part)]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['case']}-{v['version']}")
def test_vectors(vector: dict[str, Any]) -> None:
    version, file = vector["version"], DATA / vector["tokenizer_file"]
    if "tekken" in version:
        with pytest.raises(UserError, match=f"{file.name}: is a Tekken tokenizer"):
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
    "e\u0301a\u0308\u0323",
    "\u202eשלום \u0627\u0644\u0633\u0644\u0627\u0645",
    "\U0001f1e8\U0001f1ed\U00020000\U0010ffff",
    "\ufffd\ufeff",
    "☺",
    "](x)",
]
LOOKALIKES = [
    "[INST]",
    "[/INST]",
    "</s>",
    "<s>",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS] x",
    "[/TOOL_RESULTS]",
    "[SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
    "[IMG]",
    "[control_8]",
    "[REF]",
    "<0x0A>",
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
    '"[INST]</s>"',
    '{"[/TOOL_RESULTS]": ["[TOOL_CALLS]"]}',
]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "日本"}}}


class Generator:
    """Conversations that are mostly in order, with anything in their texts."""

    def __init__(self, version: str) -> None:
        self.random = random.Random(version)
        self.version = version
        self.tools = 0.02 if version == "v1" else 0.3

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def text(self) -> str:
        pick = self.random.choice
        words = (pick(pick([WORDS, WORDS, LOOKALIKES])) + pick(SPACES) for _ in range(self.random.randint(1, 4)))
        return pick(SPACES) + "".join(words)

    def content(self) -> Any:
        if self.chance(0.9):
            return self.text() if self.chance(0.95) else self.random.choice(["", *SPACES])
        texts = [self.random.choice(["", self.text()]) for _ in range(self.random.randint(0, 3))]
        return [{"type": "text", "text": text} for text in texts]

    def id(self) -> str:
        return "".join(self.random.choices(string.ascii_letters + string.digits, k=9))

    def tool_round(self) -> list[Message]:
        calls: list[Message] = []
        for n in range(1 if self.chance(0.8) else 2):
            arguments = self.random.choice([*JSONS, self.text(), {"city": self.text()}, json.dumps([self.text()])])
            calls.append({"id": self.id(), "function": {"name": f"get-{n}_x", "arguments": arguments}})
        name = {"name": "get-0_x"} if self.chance(0.5) else {}
        results = [result(c["id"], self.random.choice([*JSONS, self.content()]), **name) for c in calls]
        said = {"content": self.content()} if self.chance(0.4 if self.version == "v7" else 0.02) else {}
        return [{"role": "assistant", "tool_calls": calls, **said}, *results]

    def conversation(self) -> tuple[list[Message], list[dict[str, Any]] | None]:
        messages: list[Message] = []
        for turn in range(self.random.randint(1, 4)):
            messages += [user(self.content()) for _ in range(self.random.choice([1, 1, 1, 1, 2, 0]))]
            for _ in range(self.random.choice([1, 2, 3]) if self.chance(0.1 if turn else 0.4) else 0):
                system = {"role": "system", "content": self.content()}
                messages.insert(self.random.randint(0, len(messages)) if self.chance(0.5) else 0, system)
            if self.chance(self.tools):
                messages += self.tool_round()
            weight = {"weight": self.random.choice([0, 1])} if self.chance(0.2) else {}
            messages += [assistant(self.content(), **weight) for _ in range(self.random.choice([1, 1, 1, 1, 2]))]
        if self.chance(0.3):  # a prompt to be answered, or to be continued
            messages.append(user(self.content()) if self.chance(0.7) else assistant(self.content(), prefix=True))
        parameters = PARAMETERS | {"title": self.text()}
        function = {"name": "get", "description": self.text(), "parameters": parameters}
        tools = [{"type": "function", "function": function}] * self.random.choice([1, 2]) if self.chance(0.3) else None
        return messages, tools

    def damaged(self, messages: list[Message]) -> list[Message]:
        """Now and then without a message, with two swapped, or with a field changed."""
        messages = [dict(message) for message in messages]
        i, j = (self.random.randrange(len(messages)) for _ in range(2))
        damage = self.random.randrange(20)
        if damage == 0:
            del messages[i]
        elif damage == 1:
            messages[i], messages[j] = messages[j], messages[i]
        elif damage == 2:
            messages[i]["content"] = self.random.choice(["", None, [], [{"type": "text", "text": ""}]])
        elif damage == 3:
            messages[i]["content"] = self.random.choice(["ab\ud800", "\udc00", '"\\ud800"', "9" * 5000])
        elif damage == 4 and messages[i].get("tool_calls"):
            arguments = self.random.choice(['{"x": "\\udfff"}', "\udfff", "9" * 5000, {"\ud8ff": 1}])
            messages[i]["tool_calls"] = call(self.id(), arguments=arguments)["tool_calls"]
        elif damage == 5 and "tool_call_id" in messages[i]:
            messages[i]["tool_call_id"] = self.random.choice(["short", None, "call_1234567890"])
        elif damage == 6 and messages[i]["role"] == "assistant":
            messages[i] |= self.random.choice([{"prefix": True}, {"tool_calls": []}, call(), call() | {"content": "x"}])
        return messages


@pytest.mark.parametrize("version", VERSIONS)
def test_generated_conversations_are_mistral_common_s(version: str) -> None:
    generator = Generator(version)
    n_equal = n_refused = 0
    while n_equal < 2000:
        messages, tools = generator.conversation()
        messages = generator.damaged(messages)
        try:
            expected = theirs(version, messages, tools)
        except (MistralCommonException, ValueError, AssertionError, RuntimeError):
            with pytest.raises(UserError) as refused:
                ours(version).encode_chat(messages, tools)
            assert "\n" not in str(refused.value)
            n_refused += 1
            continue
        assert ours(version).encode_chat(messages, tools) == expected, f"{messages} {tools}"
        n_equal += 1
    assert n_refused > 200, "hardly any conversation was refused"


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


@pytest.mark.parametrize("version", ["v2", "v3", "v7"])
def test_targets_of_a_tool_round_are_the_call_and_the_answer(version: str) -> None:
    tokenizer = ours(version)
    found = answers(tokenizer, *tokenizer.encode_chat([user(), call(), result(), assistant("Two")]))
    assert found[0][0] == 5, "[TOOL_CALLS] is predicted"
    shown = {"name": "f", "arguments": {"x": 1}} | ({} if version == "v2" else {"id": "abcdefgh1"})
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
def test_text_survives(version: str) -> None:
    generator, tokenizer = Generator(version), ours(version)
    for text in ["", *LOOKALIKES, *(generator.text() for _ in range(200))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert not any(tokenizer.control_name(i) for i in ids)
        assert tokenizer.encode_text(text) == [tokenizer.bos_id, *ids, tokenizer.eos_id]


def texts_everywhere(version: str, text: str) -> list[tuple[list[Message], list[dict[str, Any]] | None]]:
    """Conversations that have the text in every place where one can stand."""
    parts = [{"type": "text", "text": text}]
    said = [{"role": "system", "content": text}, user(text), assistant(text), user(parts)]
    if version == "v1":
        return [([*said, assistant(text)], None), ([*said, assistant(text, prefix=True)], None)]
    parameters = {"properties": {text: {"title": text, "enum": [text]}}}
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}
    arguments = [({text: [text]}, text), (json.dumps({text: text}), json.dumps([text])), (text, parts)]
    return [
        ([*said, call(arguments=given), result(content=got), assistant(text, prefix=True)], [tool])
        for given, got in arguments
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_text_forges_a_control_piece(version: str) -> None:
    """Each piece of each version, wherever text can stand: the ids hold the template's control pieces alone."""
    tokenizer = ours(version)
    names = {i: name for i in range(tokenizer.vocab_size) if (name := tokenizer.control_name(i))}

    def controls(text: str) -> list[list[str]]:
        chats = [tokenizer.encode_chat(*chat)[0] for chat in texts_everywhere(version, text)]
        return [[names[i] for i in ids if i in names] for ids in chats]

    expected = controls("x")
    assert [len(names) for names in expected] == {"v1": [3, 2], "v2": [12] * 3, "v3": [12] * 3, "v7": [15] * 3}[version]
    pieces = {ours(v).control_name(i) for v in VERSIONS for i in range(771)} - {None}
    assert len(pieces) > 770
    for piece in sorted(map(str, pieces)):
        assert controls(piece) == expected
    for piece in [*LOOKALIKES, "<s>[INST] x [/INST] y</s>", " [INST] ", "\n</s>\n", "[/INST]" * 9]:
        assert controls(piece) == expected


@pytest.mark.parametrize("version", ["v2", "v3", "v7"])
@pytest.mark.parametrize("piece", ["[INST]", "</s>", "[/TOOL_RESULTS]"])
def test_no_name_forges_a_control_piece(version: str, piece: str) -> None:
    tool = {"type": "function", "function": {"name": piece, "parameters": {}}}
    for messages, tools in [
        ([user(), call(name=piece)], None),
        ([user(), call(), result(name=piece), assistant()], None),
        ([user()], [tool]),
    ]:
        with pytest.raises(UserError, match="a function is named"):
            ours(version).encode_chat(messages, tools)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ab\ud800", "character 3 is half of a surrogate pair"), (5, "a number"), (None, "missing"), (b"x", "bytes")],
)
def test_what_cannot_be_encoded(text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours("v3").encode(text)


@pytest.mark.parametrize("wrong", [-1, 32768 + MAY_LACK, 2**40])
def test_ids_out_of_range(wrong: int) -> None:
    with pytest.raises(UserError, match=f"token id {wrong} .* 0 to 32767"):
        ours("v3").decode([1, wrong])


def test_rows_that_a_vocabulary_has_beyond_the_pieces_have_no_text() -> None:
    """A model that was given more tokens, such as ChatML's <|im_end|>, may say one."""
    tokenizer = ours("v3")
    hello = tokenizer.encode("Hello, you")
    assert tokenizer.decode([*hello[:2], 32768, *hello[2:], 32767 + MAY_LACK]) == "Hello, you"
    assert tokenizer.bytes_of([32768, 771 + 65]) == b"A"


# Text that comes token by token.


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*map(stream.add, ids), stream.end()]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_streamed_text_is_the_whole_s(version: str) -> None:
    """Any ids: bytes that are no characters, control pieces between them, spaces in front."""
    tokenizer, draw = ours(version), random.Random(version)
    first = 3 if version == "v1" else 771
    utf8 = [[first + byte for byte in char.encode()] for char in "aé\x00߿ࠀ\ufffd\ufeff\ud7ff日🙂\U0010ffff"]
    spaces = [tokenizer.space_id, *tokenizer.encode("   ")]
    for _ in range(3000):
        ids: list[int] = []
        for _ in range(draw.randint(0, 8)):
            part = draw.choice(utf8)
            ids += draw.choice(
                [
                    part[: draw.randint(0, len(part))],
                    [first + draw.choice([*range(256), *range(0x80, 256)])],
                    [draw.choice([0, 1, 2, 3, 10])],
                    [draw.choice(spaces)],
                    [draw.randrange(tokenizer.vocab_size + MAY_LACK)],
                ]
            )
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("version", VERSIONS)
def test_characters_come_as_soon_as_they_are_whole(version: str) -> None:
    """Of a real text nothing waits but the bytes of one character, and none is given in halves."""
    tokenizer, generator = ours(version), Generator(version)
    for _ in range(300):
        text = generator.text().replace("▁", " ").replace("\ufffd", "")
        ids, given, byte_pieces = tokenizer.encode(text), "", 0
        stream = TextStream(tokenizer)
        for n, i in enumerate(ids, 1):
            given += stream.add(i)
            byte_pieces = byte_pieces + 1 if tokenizer.bytes_of([i]) else 0
            assert text.startswith(given)
            assert given == tokenizer.decode(ids[:n]).rstrip("\ufffd")
        assert (given, stream.end()) == (text, "")


def test_a_stream_reads_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ours("v3")
    ids = tokenizer.encode("日本語 🙂👩‍👩‍👧 and words " * 200) + [771 + 0xF0] * 500
    n_decoded, decode = 0, Tokenizer.decode

    def counted(self: Tokenizer, ids: Any) -> str:
        nonlocal n_decoded
        n_decoded += len(ids)
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    assert len(streamed(tokenizer, ids)) == len(ids) + 1
    assert n_decoded <= 2 * len(ids) + 1, "each once, with the space in front"


def test_what_no_character_comes_of_is_flushed() -> None:
    e2, x82, ac = (771 + byte for byte in "€".encode())
    for ids, expected in [
        ([e2, x82, ac], ["", "", "€", ""]),
        ([e2, x82], ["", "", "\ufffd\ufffd"]),
        ([e2, e2, x82, ac], ["", "\ufffd", "", "€", ""]),
        ([e2, x82, 2, ac], ["", "", "\ufffd\ufffd", "\ufffd", ""]),
        ([*ours("v3").encode(" a"), e2], ["", " a", "", "\ufffd"]),
        ([1, *ours("v3").encode("a b")], ["", "a", " b", ""]),
    ]:
        assert streamed(ours("v3"), ids) == expected
    with pytest.raises(UserError, match=f"token id {32768 + MAY_LACK} is outside"):
        TextStream(ours("v3")).add(32768 + MAY_LACK)


# Without the space before an answer, as the old chat template of Hugging Face had it.

OLD_HF_TEMPLATE = (  # of Mistral-7B-Instruct-v0.2
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.model").write_bytes(FILES["v1"].read_bytes())
    return LlamaTokenizer.from_pretrained(folder, legacy=True)  # as their tokenizer_config.json had it


def test_old_hf_spaces_are_hugging_face_s(hf: Any) -> None:
    """Its rendered string, encoded between <s> and </s> as its slow tokenizer did, with sentencepiece. The fast one,
    which is the only one now, merges a run of spaces in another order."""
    with_space, tokenizer = ours("v1"), load_tokenizer(FILES["v1"], old_hf_spaces=True)
    assert (tokenizer.version, tokenizer.template, with_space.template) == ("v1", "v1-hf", "v1")
    hello = [user(), assistant("Hi there"), user("x"), assistant("y")]
    assert with_space.encode("Hi") == [15359]
    assert 15359 in with_space.encode_chat(hello)[0]
    assert 23809 in tokenizer.encode_chat(hello)[0]

    def encoded(rendered: str) -> list[int]:
        end = [tokenizer.eos_id]
        parts = [tokenizer.encode(part) for part in rendered.removeprefix("<s>").split("</s>")]
        return [tokenizer.bos_id, *parts[0], *(i for part in parts[1:] for i in end + part)]

    pieces = map(template("v1")[0].tokenizer.id_to_piece, range(32000))
    joined = tuple(piece[1:] for piece in pieces if len(piece) > 1 and piece[0] == "]")
    generator = Generator("old")
    n_equal = n_fast = n_joined = 0
    while n_equal < 300:
        texts = [generator.text() for _ in range(generator.random.randint(1, 6))]
        if any(control in text for text in texts for control in ("<s>", "</s>", "<unk>")):
            continue  # the rendered string makes control pieces of them
        messages = [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)]
        ids, targets = tokenizer.encode_chat(messages)
        rendered = hf.apply_chat_template(messages, chat_template=OLD_HF_TEMPLATE, tokenize=False)
        if any(text.startswith(joined) for text in texts[1::2]):
            n_joined += ids != encoded(rendered)
            assert tokenizer.decode(ids) == tokenizer.decode(encoded(rendered))
            continue
        assert ids == encoded(rendered)
        if not re.search("[ ▁]{2}", rendered):
            assert ids == hf(rendered, add_special_tokens=False)["input_ids"]
            n_fast += 1
        begin = len(tokenizer.encode_chat(messages[:1])[0])
        assert targets[: begin + 1] == [False] * begin + [True] * (len(texts) > 1)
        n_equal += 1
    assert min(n_fast, n_joined) > 10, f"{n_fast} {n_joined}"


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
    with pytest.raises(UserError, match="message 2: JSON of a tool call or result has a number too long or nests too"):
        ours("v3").encode_chat([user(), call(arguments="[" * 100_000)])
    with pytest.raises(UserError, match="message 2: the assistant has neither content nor tool_calls"):
        ours("v7").encode_chat([user(), assistant("")])
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
    v7 = [*v3, "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    spare = [f"[control_{n}]" for n in range(8, 12)]
    for version, controls in {"v1": [], "v2": [*CONTROLS, *spare], "v3": v3, "v7": v7}.items():
        tokenizer = load_tokenizer(train(tmp_path / "tokenizer.model", controls))
        assert (tokenizer.version, tokenizer.vocab_size < 300) == (version, True)
    assert tokenizer.encode_chat([{"role": "system", "content": "c"}, user("a")])[0][:2] == [1, 16]


# The names in the official repositories, and what their files hold.
OFFICIAL = [
    ("tokenizer.model", "v1", "v1"),  # Mistral-7B-v0.1, Mixtral-8x7B-v0.1, Mistral-7B-Instruct-v0.2
    ("tokenizer.model.v1", "v1", "v1"),
    ("tokenizer.model", "v2", "v2"),
    ("tokenizer.model.v2", "v2", "v2"),
    ("tokenizer.model", "v3", "v3"),  # Mistral-7B-v0.3, Codestral-22B-v0.1
    ("tokenizer.model.v3", "v3", "v3"),  # Mistral-7B-v0.3, Mistral-Large-Instruct-2407
    ("mistral_instruct_tokenizer_240323.model.v3", "v3", "v3"),
    ("tokenizer.model", "v7", "v7"),
    ("tokenizer.model.v7", "v7", "v7"),  # Mistral-Large-Instruct-2411
    ("tokenizer.model.v7m1", "v7m1", "v7"),  # Pixtral-Large-Instruct-2411
]


@pytest.mark.parametrize(("name", "holds", "version"), OFFICIAL)
@pytest.mark.parametrize("beside", [(), ("config.json", "tokenizer.json", "tokenizer_config.json", "tekken.json")])
def test_official_files(tmp_path: Path, name: str, holds: str, version: str, beside: tuple[str, ...]) -> None:
    file = FILES.get(holds, DATA / "mistral_instruct_tokenizer_241114.model.v7m1")
    (tmp_path / name).write_bytes(file.read_bytes())
    for other in beside:
        (tmp_path / other).write_text("{}")
    for path in (tmp_path, tmp_path / name):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.version, tokenizer.path) == (version, tmp_path / name)
        assert tokenizer.vocab_size == (32000 if version == "v1" else 32768)


def test_a_version_can_be_asked_for_if_the_pieces_serve_it() -> None:
    assert load_tokenizer(FILES["v3"], version="v2").version == "v2"
    assert load_tokenizer(FILES["v3"], version="v1").encode_chat([user(), assistant()])[0][1] != 3
    with pytest.raises(UserError, match=r"tokenizer.model.v1: ids 3 to 9 are not the control pieces of v3"):
        load_tokenizer(FILES["v1"], version="v3")
    with pytest.raises(UserError, match=r"model.v3: ids 16 to 18 are not the control pieces of v7"):
        load_tokenizer(FILES["v3"], version="v7")
    with pytest.raises(UserError, match="tokenizer v9 is not supported"):
        load_tokenizer(FILES["v3"], version="v9")
    with pytest.raises(UserError, match=r"old_hf_spaces is a rule of v1 tokenizers, and this one is v3; drop it"):
        load_tokenizer(FILES["v3"], old_hf_spaces=True)


def test_the_tokenizer_of_another_model() -> None:
    v1, v3 = ours("v1"), ours("v3")
    for tokenizer, rows in [(v1, 32768), (v3, 32000), (v3, 131072), (v1, 32000 + MAY_LACK + 1), (v3, 32767)]:
        has = rf"{tokenizer.path}: a {tokenizer.version} tokenizer of {tokenizer.vocab_size:,} pieces, but the model's"
        assert (tokenizer.mismatch(rows) or "").startswith(f"{has} vocabulary has {rows:,}; take the tokenizer that")
    for tokenizer, rows in [(v1, 32000), (v3, 32768), (v1, 32002), (v1, 32064), (v3, 32768 + MAY_LACK)]:
        assert tokenizer.mismatch(rows) is None, "added tokens and padding"


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
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"tokenizer.json:? is no sentencepiece model; fetch .* tokenizer.model"):
            load_tokenizer(path)
    (tmp_path / "tekken.json").symlink_to(DATA / "tekken_240911.json")
    for path in (tmp_path, tmp_path / "tekken.json", DATA / "tekken_240718.json"):
        with pytest.raises(UserError, match=r"tekken\S*.json:? is a Tekken tokenizer, .* not supported; take a model"):
            load_tokenizer(path)
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


def test_pieces_that_are_no_text(tmp_path: Path) -> None:
    """sentencepiece takes any bytes for a piece, and fails where it is asked for its text."""
    data, file = FILES["v3"].read_bytes(), tmp_path / "tokenizer.model"
    for piece in (b"[INST]", "▁Montreal".encode()):
        assert piece in data
        file.write_bytes(data.replace(piece, piece[:-1] + b"\xff"))
        with pytest.raises(UserError, match=r"tokenizer.model: not a sentencepiece model"):
            load_tokenizer(file)


def test_a_file_without_end_or_of_another_size(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v3").symlink_to("/dev/zero")
    with (tmp_path / "large.model").open("wb") as large:
        large.truncate(5_000_000)  # sparse
    for name in ("tokenizer.model.v3", "large.model"):
        with pytest.raises(UserError, match=f"{name}: not a sentencepiece model"):
            load_tokenizer(tmp_path / name)


def test_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(FILES["v3"].read_bytes()[:-7])
    with pytest.raises(UserError, match=r"tokenizer.model: "):
        load_tokenizer(file)
