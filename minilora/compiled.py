"""Definitions as single loops: on a CPU torch's compiler makes C++ of them, where it is asked for (`train.compile`).

Eager torch goes through memory once for each operation, and rounds what lies between two of them where that is in 16
bits. Compiled, what is elementwise is one pass, rounded at its end. On a GPU the kernels are that already.

The first call with new dtypes, or with the second of a dimension's sizes, waits a second or so for the C++ compiler.
What it made is kept on disk for later runs.
"""

from collections.abc import Callable
from functools import cache, wraps
from platform import machine
from typing import Any, ParamSpec, TypeVar

import torch

from minilora.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
MANY = 64  # compiled forms of a definition, by dtypes and whether sizes vary; torch's own limit is 8

_compiling = False


def compile_loops(on: bool) -> None:
    """From now on run `compilable` functions compiled, or as they stand. Raises UserError if torch cannot compile."""
    global _compiling
    if on:
        _compiled(torch.neg)(torch.zeros(2))
    _compiling = on


def compiles(device: torch.device) -> bool:
    """Whether loops over tensors there are compiled."""
    return _compiling and device.type == "cpu"


def compilable(definition: Callable[P, R]) -> Callable[P, R]:
    """`definition`, whose first argument is a tensor, or its compiled form, which autograd cannot see through."""

    @wraps(definition)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        if not compiles(first.device):
            return definition(*args, **kwargs)
        bare: Any = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        made: R = _compiled(definition)(*bare, **kwargs)
        return made

    return chosen


@cache
def _compiled(definition: Callable[P, R]) -> Callable[P, R]:
    """What torch's compiler makes of it, for each kind of arguments at the first call. Raises UserError if it fails."""
    import torch._inductor.config
    from torch._dynamo.exc import TorchDynamoException

    torch._dynamo.config.recompile_limit = MANY
    config = torch._inductor.config
    config.compile_threads = 1  # else processes wait for work that is there once
    config.realize_opcount_threshold, config.realize_reads_threshold = 256, 16  # else a long loop becomes two
    if machine() == "x86_64" and getattr(config.cpp, "march", "") is None:
        config.cpp.march = "native -mprefer-vector-width=512"  # else 64 bytes are put down as halves, and waited for
    compiled = torch.compile(definition, fullgraph=True)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            made: R = compiled(*args, **kwargs)
        except TorchDynamoException as error:
            why = " ".join(str(error).split("\n")[:2])
            remedy = "install g++ and Python's headers (python3-dev), or set it to false"
            raise UserError(f"train.compile: torch cannot compile ({why}); {remedy}") from None
        return made

    return run
