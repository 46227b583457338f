"""What verbs and a terminal tell each other."""

import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from tiny_runs import Run

from minilora.verbs.terminal import console, typed


def test_what_is_no_terminal_is_wide_enough_for_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == 200
    monkeypatch.setenv("COLUMNS", "70")
    assert console().width == 70
    monkeypatch.setenv("COLUMNS", "0")
    assert console().width == 200


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_typed_until_the_input_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("a\n\nb"))
    assert list(typed()) == ["a", "", "b"]
    assert capsys.readouterr().out == "", "a file is not asked"
    monkeypatch.setattr(sys, "stdin", Terminal("a\n"))
    assert list(typed()) == ["a"]
    assert capsys.readouterr().out == "> > "


def test_what_is_typed_need_not_be_utf_8(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"\xff\n"), encoding="utf-8"))
    assert run("chat", "--nonsense")[0] == 2
    assert list(typed()) == ["\ufffd"]
