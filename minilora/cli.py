"""The command line: `minilora VERB`, its exit status, and the table of verbs (`verbs/`).

Exit status: 0 done, 1 failed with one line that says what to mend, 2 wrong usage, 129, 130 or 143 stopped by a signal.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import TextIOWrapper

from minilora.arguments import Verb
from minilora.errors import UserError, is_out_of_memory, of_system
from minilora.train.signals import Stopped
from minilora.verbs import terminal
from minilora.verbs.answering import chat, evaluate, generate, serve
from minilora.verbs.training import compare, data, demo, train, verify
from minilora.verbs.weights import explain, export, inspect, merge, quantize

_ALL = (demo, train, data, compare, evaluate, generate, chat, serve, quantize, merge, export, inspect, explain, verify)
VERBS: dict[str, Verb] = {verb.__name__: verb for verb in _ALL}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if not args or args[0] in ("-h", "--help"):
        print("usage: minilora VERB ...   (minilora VERB --help explains each)\n")
        for name, verb in VERBS.items():
            print(f"  {name:10} {(verb.__doc__ or '').splitlines()[0]}")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"minilora {version('minilora')}")
        return 0
    if args[0] not in VERBS:
        print(f"minilora: there is no verb {args[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):  # what is typed, or a file's name, need not be UTF-8
            stream.reconfigure(errors=errors)
    # On a busy machine, OpenMP's threads that spin between operations stop each other. On a quiet one, threads that
    # sleep instead are woken on one core.
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    name = "verify resume" if args[:2] == ["verify", "resume"] else args[0]
    return exit_status(f"minilora {name}", lambda: VERBS[args[0]](args[1:]))


def exit_status(name: str, work: Callable[[], object]) -> int:
    """Do the work of the command `name`: 0, or what it exits with after one line that says what is wrong. Bugs pass."""
    try:
        with warnings.catch_warnings():
            # Without the line of code that warns.
            warnings.showwarning = lambda message, *_: terminal.warn([str(message)])
            work()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of our output has gone, as in `minilora ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        said, status = str(error) or "stopped", 130
    except (UserError, Stopped) as error:
        said, status = str(error), getattr(error, "exit_status", 1)
    except (OSError, UnicodeError) as error:
        said, status = of_system(error), 1
    except (MemoryError, RuntimeError) as error:
        said, status = "out of memory; take a smaller model, fewer or shorter rows, or --model.quantize nf4", 1
        if str(error).startswith("Symlink loop"):  # what pathlib raises before Python 3.13
            said = f"{error}; name what it should lead to"
        elif isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
    print(f"{name}: {UserError(said)}", file=sys.stderr)  # what a file has named commands no terminal
    return status
