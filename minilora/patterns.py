"""Names of layers, and regular expressions for them, written by strangers, so only such as are matched in few steps.

`re` tries one way after another to match, and a hostile expression has more ways than a machine has time for: (x+)+y.
Here no group is repeated, so the ways are at most the product of what each alternation and each repetition may choose.
"""

import re
import warnings
from functools import cache
from typing import TypeVar

from minilora.errors import UserError

T = TypeVar("T")

MAX_CHARACTERS = 2000
MAX_WAYS = 200_000
_LONGEST_NAME = 48  # characters: what a repetition may choose from


def check_pattern(pattern: str, key: str, spent: int = 0) -> int:
    """How many ways `pattern` has, and the `spent` ones of others beside it.

    Raises UserError, naming the `key` that it stands at, if it is no regular expression or those are too many.
    """
    easier = "write it with fewer * + ? {} and alternatives, without looking around and without repeated groups"
    too_long = f"{key} is {pattern[:80]!r}, which may take too long to match; {easier}"
    if len(pattern) > MAX_CHARACTERS:
        raise UserError(too_long)
    try:
        with warnings.catch_warnings(action="error"):  # of what later versions of Python may read otherwise
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise UserError(f"{key} is {pattern[:80]!r}, which is no regular expression: {error}") from None
    plain = re.sub(r"\[\^?.[^\]]*\]", "x", re.sub(r"\\.", "x", pattern))  # an escape, a class: one character
    ways = _LONGEST_NAME ** len(re.findall(r"(?<!\()[*+{]", plain)) * 2 ** len(re.findall(r"(?<![(*+?}])\?", plain))
    while (group := re.search(r"\((?:\?:)?((?!\?)[^()]*)\)(?![*+{?])", plain)) and ways <= MAX_WAYS:
        ways *= 1 + group[1].count("|")
        plain = plain[: group.start()] + "x" + plain[group.end() :]
    spent += ways * (1 + plain.count("|"))
    if "(" in plain or spent > MAX_WAYS:
        raise UserError(too_long)
    return spent


def hf_name(name: str) -> str:
    """What Hugging Face calls a module or tensor of ours: model.layers.0.mlp.up_proj, model.norm, but lm_head."""
    return name if name.partition(".")[0] == "lm_head" else f"model.{name}"


def first_match(patterns: dict[str, T], name: str, default: T) -> T:
    """The value of the first of `patterns` that matches the layer's name (`hf_name`) or an end of it; else `default`.

    An end is of whole parts: up_proj, mlp.up_proj and (up|down)_proj match model.layers.0.mlp.up_proj, proj does not.
    """
    return next((value for key, value in patterns.items() if _end(key).match(hf_name(name))), default)


@cache  # `re` itself remembers 512 only
def _end(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
