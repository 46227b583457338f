"""Triton's interpreter without what it does over and over, which took a third of its time."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Where a launch begins, the interpreter puts its own functions in the place of the language's; at every call of a
    function within it would look through the whole language for more. (What lies in `core` it never puts back.)"""
    patch: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # the name is Triton's own: where it has another, tests are slower
        return

    def once(fn: Any) -> Any:
        languages = (tl, *(value for value in fn.__globals__.values() if value is tl.core))
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once
