"""What a user is told is one line that can be printed and read, whatever a file has put into it."""

import pytest

from minilora.errors import UserError, of_system


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("two\nlines\r\n and\u2028a\x85third ", "two lines and a third"),
        ("\x1b[2J\x07 gone\x00", r"\x1b[2J\x07 gone\x00"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
        ("rtl \u202e and \U000e0001", r"rtl \u202e and \U000e0001"),
        ("naïve 日本 \U0001f600", "naïve 日本 \U0001f600"),
    ],
)
def test_a_message_is_one_line_of_printable_text(message: str, line: str) -> None:
    assert str(UserError(message)) == line


def test_of_a_long_message_beginning_and_end_are_kept() -> None:
    text = str(UserError(f"file.json: key {'x' * 100_000} is unknown; leave it out"))
    assert len(text) == 2000
    assert text.startswith("file.json: key xxx")
    assert text.endswith("xxx is unknown; leave it out")
    assert str(UserError("y" * 2000)) == "y" * 2000


def test_of_a_system_s_error_the_place_and_what_to_do_are_told() -> None:
    assert of_system(FileNotFoundError(2, "No such file", "a.json")) == "a.json: No such file"
    may_not = "a.json: Permission denied; change its permissions, or name another"
    assert of_system(PermissionError(13, "Permission denied", "a.json")) == may_not
    assert of_system(OSError("full")) == "the input or output: full"
