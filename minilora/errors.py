"""The exceptions for what a user can mend: a message of one line that says what, where, why, and what to do."""

from importlib.util import find_spec

_LONGEST = 2000  # characters


class UserError(Exception):
    """Bad input, found by us and explained in one line. The command line prints it and exits with status 1.

    What a file has put into the message commands no terminal: it is escaped where it cannot be printed, and left out
    where it is too long to be read.
    """

    def __init__(self, message: str) -> None:
        line = printable(message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 + 5 :]}")


class UsageError(UserError):
    """What the command line alone says wrong; exit status 2."""

    exit_status = 2


def printable(text: str) -> str:
    """In one line, in which what commands a terminal or is no text, such as half of a surrogate pair, is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def of_system(error: OSError | UnicodeError) -> str:
    """What an error says that no one closer to it has explained: where, why, and of a permission what to do."""
    where, why = getattr(error, "filename", None) or "the input or output", getattr(error, "strerror", None) or error
    return f"{where}: {why}{'; change its permissions, or name another' * isinstance(error, PermissionError)}"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised it for want of memory: its own class for a GPU's, else a RuntimeError among others."""
    said = ("can't allocate memory", "CUDA error: out of memory")  # the second of pinned memory
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in said)


def need_library(name: str, extra: str, what: str) -> None:
    """Raises UserError if the library, of the extra of that name, is not installed; `what` needs it."""
    if find_spec(name) is None:
        raise UserError(f"{what} needs {name}, which is not installed: pip install 'minilora[{extra}]'")
