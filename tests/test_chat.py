"""A conversation: what is asked under which prompt, and what becomes of long, empty and interrupted turns."""

import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any

import pytest
from tiny_runs import TOKENIZER

from minilora import chat
from minilora.chat import answer_text, converse
from minilora.checkpoint.load import load_model
from minilora.cli import main
from minilora.model import Mistral
from minilora.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


class Told:
    """Answers that are known beforehand, and what came of them."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str | BaseException]) -> None:
        self.tokenizer, self.answers = tokenizer, iter(answers)
        self.prompts, self.said, self.noted = list[list[int]](), list[str](), list[str]()

    def answer(self, _model: Any, _tokenizer: Any, prompt: list[int], *_: Any, **__: Any) -> Iterator[str]:
        self.prompts.append(prompt)
        answer = next(self.answers)
        if isinstance(answer, BaseException):
            yield "half of"
            raise answer
        yield from answer

    def hear(self, questions: Sequence[str], system: str | None = None, limit: int = 1000) -> None:
        converse(None, self.tokenizer, questions, self.said.append, self.noted.append, system, limit, 8)  # type: ignore[arg-type]

    def prompt(self, *contents: str, system: str | None = None) -> list[int]:
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        before = [{"role": "system", "content": system}] if system else []
        return self.tokenizer.encode_chat([*before, *turns])[0]


@pytest.fixture
def told(request: pytest.FixtureRequest, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Told:
    made = Told(tokenizer, request.param)
    monkeypatch.setattr(chat, "answer_text", made.answer)
    return made


@pytest.mark.parametrize("told", [["one", "two", "three"]], indirect=True)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_turn_is_asked_under_all_before(told: Told, system: str | None) -> None:
    told.hear(["a", "  ", "b", "", "c"], system)  # an empty line is no turn
    assert told.prompts == [
        told.prompt("a", system=system),
        told.prompt("a", "one", "b", system=system),
        told.prompt("a", "one", "b", "two", "c", system=system),
    ]
    assert "".join(told.said) == "one\ntwo\nthree\n"
    assert told.noted == []


@pytest.mark.parametrize("told", [["one", "two", "three"]], indirect=True)
def test_what_is_too_long_loses_its_oldest_exchange(told: Told) -> None:
    limit = len(told.prompt("a", "one", "b"))
    told.hear(["a", "b", "x" * 500, "c"], limit=limit)
    assert told.prompts == [told.prompt("a"), told.prompt("a", "one", "b"), told.prompt("b", "two", "c")]
    asked, left_out = told.noted
    assert asked.startswith("this has ")  # and what was said before still counts
    assert left_out.endswith(": its oldest exchange is left out")


@pytest.mark.parametrize("told", [[KeyboardInterrupt(), " ", "three"]], indirect=True)
def test_what_was_said_of_an_answer_counts_and_an_empty_one_does_not(told: Told) -> None:
    told.hear(["a", "b", "c"])
    assert told.prompts[1:] == [told.prompt("a", "half of", "b"), told.prompt("a", "half of", "c")]
    assert "".join(told.said) == "half of\n \nthree\n"
    assert told.noted == ["there is no answer, so the question is forgotten"]


def test_answers_come_from_the_model(tokenizer: Tokenizer) -> None:
    model: Mistral = load_model("demo")
    prompt, _ = tokenizer.encode_chat([{"role": "user", "content": 'How is "mistral" pronounced?'}])
    said: list[str] = []
    converse(model, tokenizer, ['How is "mistral" pronounced?'], said.append, pytest.fail, None, 1000, 6)
    assert "".join(said) == "".join(answer_text(model, tokenizer, prompt, 6)) + "\n"


def leave(_prompt: str) -> str:
    """A Ctrl-C at the prompt."""
    raise KeyboardInterrupt


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    question = 'How is "mistral" pronounced?'
    assert main(["generate", question, "--max_new_tokens", "6"]) == 0
    answer = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", StringIO(f"{question}\n\n"))
    assert main(["chat", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == answer
    monkeypatch.setattr(sys, "stdin", StringIO(f"{question}\n"))
    assert main(["chat", "--max_tokens", "3"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("this has ")
    monkeypatch.setattr("builtins.input", leave)
    assert main(["chat"]) == 130
    assert capsys.readouterr().err.endswith("\nminilora chat: stopped\n")
    assert main(["chat", "--max_tokens", "0"]) == 2
