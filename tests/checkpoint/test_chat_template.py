"""Chat templates, rendered by transformers, whose ids must be those of `encode_chat`."""

import json
import os
import random
import re
import string
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minilora.checkpoint.chat_template import chat_template, own_template, template_warnings, write_tokenizer
from minilora.tokenizer import Tokenizer, load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
}
TEMPLATES = (*FILES, "v1-hf")
Message = dict[str, Any]
WORDS = [
    "Hello", " there", "\n", "日本語", "¿qué?", "{x}", '"', "don't", "1,024", "\t", "🤖", "e\u0301", "<b>", "&amp;",
    "{{ y }}", "{% z %}", "\\n",
]  # fmt: skip
SPACES = ["a  b", "   ", " \n", "▁"]


@cache
def ours(template: str) -> Tokenizer:
    return load_tokenizer(FILES[template[:2]], old_hf_spaces=template == "v1-hf")


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    """transformers' tokenizers, from the two files that an export has of each."""
    made = {}
    for template in TEMPLATES:
        folder = tmp_path_factory.mktemp(template)
        write_tokenizer(ours(template), folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        made[template] = AutoTokenizer.from_pretrained(folder)
    return made


@cache
def controls(tokenizer: Tokenizer) -> tuple[re.Pattern[str], dict[str, int]]:
    """Any of the control pieces, and their ids."""
    model = tokenizer._model
    ids = {model.id_to_piece(i): i for i in range(tokenizer.vocab_size) if model.is_control(i)}
    return re.compile(f"({'|'.join(map(re.escape, ids))})"), ids


def by_pieces(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """As llama.cpp encodes a rendered string: control pieces by their ids, each text between them by itself."""
    any_of_them, ids = controls(tokenizer)
    return [i for part in any_of_them.split(rendered) for i in ([ids[part]] if part in ids else tokenizer.encode(part))]


class Conversations:
    """Those that both sides must see alike: in order, with anything in their texts but control pieces."""

    def __init__(self, template: str) -> None:
        self.draw, self.template = random.Random(template), template

    def text(self) -> str:
        words = WORDS + SPACES if self.draw.random() < 0.1 else WORDS
        return "".join(self.draw.choices(words, k=self.draw.randint(1, 6))) + self.draw.choice(["", ".", "\n"])

    def value(self) -> Any:
        return self.draw.choice([{"city": self.text()}, [1, 2.5, None, True, self.text()], {}, {"a": {"b": ["é"]}}])

    def tool_round(self) -> list[Message]:
        calls, results = [], []
        for _ in range(1 if self.template == "v2" else self.draw.randint(1, 2)):
            arguments = self.draw.choice([self.text(), "é"])
            call = {"id": "".join(self.draw.choices(string.ascii_letters, k=9)), "type": "function"}
            calls.append({**call, "function": {"name": "get_x", "arguments": {"q": arguments}}})
            value = self.value()
            content = self.draw.choice(["It is " + self.text(), json.dumps(value, ensure_ascii=False), ""])
            results.append({"role": "tool", "content": content, "tool_call_id": call["id"], "name": "get_x"})
        return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]

    def one(self) -> tuple[list[Message], list[dict[str, Any]] | None]:
        has_tools = not self.template.startswith("v1")
        messages: list[Message] = []
        for _ in range(self.draw.randint(0, 2)):
            messages.append({"role": "system", "content": self.text()})
        for _ in range(self.draw.randint(1, 3)):
            messages.append({"role": "user", "content": self.text()})
            messages += self.tool_round() if has_tools and self.draw.random() < 0.4 else []
            messages.append({"role": "assistant", "content": self.text()})
        if self.draw.random() < 0.5:
            del messages[-1]
        function = {"name": "get_x", "description": self.text(), "parameters": {"type": "object", "title": self.text()}}
        tools = [{"type": "function", "function": function}] * self.draw.randint(1, 2)
        return messages, tools if has_tools and self.draw.random() < 0.4 else None


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_ids_are_those_of_encode_chat(template: str, theirs: dict[str, Any]) -> None:
    tokenizer, conversations, n_fast = ours(template), Conversations(template), 0
    for _ in range(120):
        messages, tools = conversations.one()
        expected, _ = tokenizer.encode_chat(messages, tools)
        rendered = theirs[template].apply_chat_template(messages, tools=tools, tokenize=False)
        if template == "v1-hf":  # "[/INST]" and an answer are one text there, which may join their pieces
            assert tokenizer.decode(by_pieces(tokenizer, rendered)) == tokenizer.decode(expected)
            continue
        assert by_pieces(tokenizer, rendered) == expected, messages
        if not re.search("[ ▁]{2}", rendered):  # a run of spaces, which their fast tokenizer merges in another order
            theirs_ids = theirs[template].apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
            assert theirs_ids == expected, messages
            n_fast += 1
    assert n_fast > 20 or template == "v1-hf"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("texts", [("Be kind.",), ("Be kind.", "And short."), ("",)])
def test_system_texts_alone_open_an_empty_user_message(
    template: str, texts: tuple[str, ...], theirs: dict[str, Any]
) -> None:
    function = {"name": "get_x", "description": "x", "parameters": {"type": "object"}}
    messages = [{"role": "system", "content": text} for text in texts]
    for tools in ([], [{"type": "function", "function": function}]):
        expected, _ = ours(template).encode_chat(messages, tools)
        rendered = theirs[template].apply_chat_template(messages, tools=tools, tokenize=False)
        assert by_pieces(ours(template), rendered) == expected
        assert theirs[template].apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"] == expected
        assert template == "v7" or rendered.count("[INST]") == 1


def test_what_the_old_template_of_hugging_face_rendered(theirs: dict[str, Any]) -> None:
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert theirs["v1-hf"].apply_chat_template(hello, tokenize=False) == "<s>[INST] Hello [/INST]Hi</s>"
    assert theirs["v1"].apply_chat_template(hello, tokenize=False) == "<s>[INST] Hello [/INST] Hi</s>"
    assert theirs["v3"].apply_chat_template(hello, tokenize=False) == "<s>[INST]Hello[/INST]Hi</s>"


def test_arguments_may_be_their_json(theirs: dict[str, Any]) -> None:
    """OpenAI's clients send them as a string."""
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}
    as_text = {"id": "abcdefgh1", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
    rendered = [
        theirs["v3"].apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [one]}], tokenize=False
        )
        for one in (call, as_text)
    ]
    assert rendered[0] == rendered[1]
    assert '[{"name": "f", "arguments": {"x": [1, "é"]}, "id": "abcdefgh1"}]' in rendered[0]


@pytest.mark.parametrize(
    ("template", "roles", "message"),
    [
        ("v1", "uu", "two messages of one role"),
        ("v1", "a", "begins with a user"),
        ("v1", "uat", "v1 has no tools"),
        ("v3", "uu", "two messages of one role"),
        ("v3", "uaa", "two messages of one role"),
        ("v2", "a", "begins with a user"),
        ("v7", "uu", "two messages of one role"),
    ],
)
def test_what_it_cannot_say_is_refused(template: str, roles: str, message: str, theirs: dict[str, Any]) -> None:
    names = {"u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": names[role], "content": "x", "tool_call_id": "abcdefgh1"} for role in roles]
    with pytest.raises(TemplateError, match=message):
        theirs[template].apply_chat_template(messages, tokenize=False)


def test_only_one_line_tells_the_templates_apart() -> None:
    first = {template: chat_template(template).splitlines()[0] for template in TEMPLATES}
    assert first["v7"] == "{%- set version = 'v7' -%}"
    assert first["v1-hf"] == "{%- set space = '' -%}"
    assert len({chat_template(t).partition("\n")[2] for t in ("v2", "v3", "v7")}) == 1


# -- a base's own template ---------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": json.dumps({"chat_template": CHATML})},
        {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": CHATML}, 1]})},
        {"chat_template.jinja": CHATML},
        {"chat_template.jinja": CHATML, "tokenizer_config.json": json.dumps({"chat_template": "[INST]"})},
    ],
)
def test_a_template_that_is_not_mistral_s_is_told(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert own_template(tmp_path) == CHATML
    (told,) = template_warnings(tmp_path, "v1")
    assert told.startswith(
        "Mistral's chat template v1 is used, not the base's own: answers are worse, and may not stop"
    )
    trained = {"format_version": 2, "tokenizer": {"template": "v1"}}
    assert not template_warnings(tmp_path, "v1", trained)
    (tmp_path / "minilora.json").write_text(json.dumps(trained))
    assert not template_warnings(tmp_path, "v1")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"chat_template.jinja": "{{ '[INST] ' + messages[0].content }}"},
        {"chat_template.jinja": b"\xff\xfe"},
        {"chat_template.jinja": "x" * 2_000_001},
        {"tokenizer_config.json": "{"},
        {"tokenizer_config.json": "[]"},
        {"tokenizer_config.json": "[" * 100_000},
        {"tokenizer_config.json": "{}"},
        {"tokenizer_config.json": '{"chat_template": null}'},
        {"tokenizer_config.json": '{"chat_template": {"a": 1}}'},
        {"tokenizer_config.json": '{"chat_template": []}'},
        {"tokenizer_config.json": '{"chat_template": [{"name": "x"}, {"template": 3}, "[INST]"]}'},
        {"tokenizer_config.json": json.dumps({"chat_template": "x" * 2_000_001})},
    ],
)
def test_mistral_s_own_or_none_is_not(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    """What is damaged is none."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert template_warnings(tmp_path, "v1") == []


def test_what_is_no_file_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    (tmp_path / "tokenizer_config.json").mkdir()
    assert own_template(tmp_path) == ""
