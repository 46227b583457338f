"""What the verbs are told: a parser for each, the arguments that several have, and a run's configuration.

recipe, then FILE.toml, then --section.key value, each over what stands before it
"""

import os
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt, restricted_number_type

from minilora.config import UNNAMED, BaseConfig, RunConfig, TooLong, to_dict
from minilora.errors import UsageError, UserError
from minilora.recipes import recipe_file

if TYPE_CHECKING:
    from minilora.base import Base

Verb = Callable[[list[str]], None]
_parser = partial(ArgumentParser, exit_on_error=False, parser_mode="toml", print_config=None, allow_abbrev=False)
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
Steps = restricted_number_type("Steps", int, [(">=", 2), ("<", 2**31)])  # that can be interrupted
Port = restricted_number_type("Port", int, [(">=", 0), ("<", 2**16)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])  # what torch takes

_SECTIONS = {f"--{section.name}" for section in fields(RunConfig)}  # each may have a file of its own
_TOML_BYTES = 1 << 20  # a larger file is no configuration, and need not be read to know it

# What a value must be, by what jsonargparse calls its type.
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_KINDS |= dict.fromkeys(("tuple", "list"), "a list such as [a,b]") | {"dict": 'a table such as {"a":1}'}

# Of files and folders that verbs name. Those of data may have weights, and are looked at in data/sources.py.
PATHS = (
    *("adapter", "eval.probes", "file", "fix", "from", "html", "model", "model.path", "model.tokenizer"),
    *("out", "output", "path", "text", "train.adapter", "train.output"),
)


def verb_parser(verb: Verb) -> ArgumentParser:
    """A parser without arguments, with the verb's name and what it says of itself."""
    return _parser(prog=f"minilora {verb.__name__}", description=verb.__doc__)


def parse(parser: ArgumentParser, args: Sequence[str], instantiate: bool = True) -> Namespace:
    """The parsed arguments. Raises UsageError for what is wrong with them, UserError for what a file may have said.

    instantiate: with the configurations made of them, which hold them against one another
    """
    args = quoted(_spelled(parser, args))
    for before, arg in zip(["", *args], args, strict=False):
        option, _, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if option in _SECTIONS & parser._option_string_actions.keys() and os.path.isfile(value):
            _keys(value, section=option[2:])
    try:
        parsed: Namespace = parser.parse_args(args)
        for name in PATHS:
            if isinstance(path := parsed.get(name), str):
                if not path:  # what an unset variable gives
                    raise _error_of(parsed)(f"{name} is empty; name a file or folder, or leave it out")
                parsed[name] = os.path.expanduser(path)  # which a shell leaves in --name=~/x
    except (ArgumentError, OverflowError) as error:
        raise UsageError(f"{_in_our_words(error, parser)}; see {parser.prog} --help") from None
    try:
        return parser.instantiate(parsed) if instantiate else parsed
    except UserError as error:  # of an option's value; files have been read alone
        raise UsageError(str(error)) from None


def _error_of(parsed: Namespace) -> type[UserError]:
    """What to raise for what may stand in a file, if there is one, or have been an option."""
    return UserError if parsed.get("config") else UsageError


def _in_our_words(error: Exception, parser: ArgumentParser) -> str:
    """What jsonargparse says of a value: key, value, and what it must be, by `_KINDS`; of a key: the nearest."""
    said = " ".join(str(error).split())
    in_file = r"(?:Group '(.*?)' does not accept option|Option) '(.*?)'(?: is not accepted)?"
    if unknown := re.fullmatch(rf"{in_file}|unrecognized arguments: (--)([^ =]*).*", said):
        *names, dashes, option = unknown.groups("")
        key = option or ".".join(filter(None, names))
        known = [o[2:] for o in parser._option_string_actions]
        near = [o for o in known if o.startswith(key)][:1] or get_close_matches(key.replace("-", "_"), known, 1, 0.75)
        return f"there is no {dashes or 'key '}{key}" + "".join(f"; did you mean {dashes}{name}?" for name in near)
    if section := re.match(r'Parser key "(.*?)": Unable to load config (\S+)', said):
        return f"{section[1]} is a section, and {section[2]} no TOML file of it; name a key, as in --{section[1]}.KEY"
    if limits := re.fullmatch(r'Parser key "(.*?)": [\w ]+: (\S+) does not conform to restriction (.*)', said):
        return f"{limits[1]} is {limits[2]}, but must be {limits[3].replace('v', '')}"
    if not (found := re.fullmatch(r'Parser key "(.*?)": (.*(?:value|base 10|to float)): (.*)', said)):
        return said
    key, types, value = found.groups()
    kinds = re.findall(rf"\b({'|'.join(_KINDS)})\b|Literal\[(.*?)\]", types.partition("Given")[0])
    must = " or ".join(dict.fromkeys(_KINDS[name] if name else f"one of {words}" for name, words in kinds))
    return f"{key} is {value}, but must be {must}"


def _spelled(parser: ArgumentParser, args: Sequence[str]) -> list[str]:
    """With each option as the parser spells it, who has some with hyphens and some with underscores."""
    known = {option.replace("-", "_"): option for option in parser._option_string_actions if option[:2] == "--"}
    parts = (arg.partition("=") for arg in args)
    return ["".join((known.get(option.replace("-", "_"), option), *value)) for option, *value in parts]


def quoted(args: Sequence[str]) -> list[str]:
    """With the words of a list in quotes, as TOML has them: --section.key [q_proj,v_proj] needs none."""
    word, made = r"\s*[A-Za-z_][\w.*-]*\s*", list[str]()
    for before, arg in zip(["", *args], args, strict=False):
        option, given, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        if re.fullmatch(r"--\w+\.[\w.]+", option) and re.fullmatch(rf"\[{word}(,{word})*\]", value):
            value = re.sub(r"[\w.*-]+(?=\s*[\],])", r'"\g<0>"', value)
            arg = f"{option}={value}" if given else value
        made.append(arg)
    return made


# -- A run's configuration ---------------------------------------------------------------------------------------------


def run_parser(verb: Verb, words: str = "[CONFIG.toml]", options: str = "") -> ArgumentParser:
    """Of a verb that takes a configuration. words, options: what its usage shows beside the configuration's keys"""
    parser = verb_parser(verb)
    parser.usage = f"{parser.prog} {words} [--section.key value ...] {options}"
    parser.add_argument("--config", action="config", help="a TOML file; as train's and compare's first word")
    parser.add_argument("--recipe", metavar="NAME", help="begin with one of `minilora train --list-recipes`")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse_run(parser: ArgumentParser, args: Sequence[str], file_first: bool = True) -> tuple[RunConfig, Namespace]:
    """The configuration, and all that was parsed. Raises as `parse` does, and UserError for what is wrong in a file.

    file_first: the first word that is no option and no option's value is a TOML file
    """
    parsed = parse(parser, [*_files_then_options(parser, args, file_first)])
    try:
        return RunConfig(**{f.name: getattr(parsed, f.name) for f in fields(RunConfig)}), parsed
    except UserError as error:  # of keys that do not go together
        raise _error_of(parsed)(str(error)) from None


def begin_with_demo(parser: ArgumentParser, args: Sequence[str]) -> list[str]:
    """Begin from the demo's configuration unless a file or an option names data.train; if it does, the option that
    names the demo's, since a file of --print-config has an empty one. What else is wrong is left to `parse_run`."""
    if parse(parser, [*_files_then_options(parser, args)], instantiate=False).data.train:
        return []
    from minilora.demo.story import comparison_config

    for section, keys in to_dict(comparison_config()).items():
        parser.set_defaults({f"{section}.{key}": value for key, value in keys.items()})
    return [f"--data.train={parser.get_default('data.train')}"]


def _files_then_options(parser: ArgumentParser, args: Sequence[str], file_first: bool = True) -> Iterator[str]:
    """`args` with each file and recipe as --config=FILE, which lie below the options."""
    named: dict[str, list[str]] = {"--recipe": [], "--config": []}
    switches = {option for action in parser._actions if action.nargs == 0 for option in action.option_strings}
    first, rest, words = list[str](), list[str](), iter(_spelled(parser, args))
    for arg in words:
        option, given, value = arg.partition("=")
        if option in named and (given or (value := next(words, ""))):
            named[option].append(value)
        elif file_first and not first and not arg.startswith("-"):
            first.append(arg)
        else:
            rest.append(arg)
            if arg.startswith("-") and not given and arg not in switches:
                rest += islice(words, 1)
    recipes = [str(recipe_file(name)) for name in named["--recipe"]]
    files = [os.path.expanduser(file) for file in (*first, *named["--config"])]
    set_there = set[str]().union(*map(_keys, files))
    for name, keys in zip(named["--recipe"], map(_keys, recipes), strict=True):
        if lost := keys & set_there:
            what = ", ".join(sorted(lost)) if lost < keys else "all that it sets"
            warnings.warn(f"--recipe {name}: the file overrides {what}", stacklevel=2)
    yield from (*(f"--config={file}" for file in (*recipes, *files)), *rest)


def _keys(path: str, section: str = "") -> set[str]:
    """The keys of a TOML file, or of one that holds a section alone. It is read for itself first, so that what is wrong
    in it is said with its name. Raises UserError."""
    if not Path(path).is_file():
        how = f"no such file; `minilora train --print-config > {path}` writes one to start from"
        raise UserError(f"{path}: {'a folder; name a TOML file' if Path(path).is_dir() else how}")
    other = f"no TOML file; {f'name a key, as in --{section}.KEY' if section else 'data go to --data.train'}"
    if os.path.getsize(path) > _TOML_BYTES:
        raise UserError(f"{path}: {other}")
    parser = _parser()
    parser.add_class_arguments(RunConfig, as_group=False)
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
        sections = {section: content} if section else content
        for name, keys in sections.items():
            if not isinstance(keys, dict):
                raise UserError(f"{name} = {keys!r:.40} stands in no section; put it below one, such as [train]")
        parser.instantiate(parser.parse_object(sections))
    except (ArgumentError, OverflowError, RecursionError, TypeError, ValueError, UserError) as error:
        is_other = isinstance(error, tomllib.TOMLDecodeError | UnicodeDecodeError) and not path.endswith(".toml")
        raise UserError(f"{path}: {other if is_other else _in_our_words(error, parser)}") from None
    return {f"{name}.{key}" for name, keys in sections.items() for key in keys}


# -- What several verbs have -------------------------------------------------------------------------------------------


def add_base(parser: ArgumentParser) -> None:
    """Of a base with or without an adapter."""
    add_model(parser)
    parser.add_argument("--adapter", help="folder of an adapter; unless --model.path is given, it names its base")
    add_adapter(parser)


def find_base(parsed: Namespace) -> "Base":
    """What the arguments of `add_base` name. Raises UserError as `Base.find` does, and for an adapter's option where
    there is no adapter."""
    if parsed.adapter is None:
        refuse_idle(parsed, {"adapter_scaling": None, "force": False}, "without --adapter")
    from minilora.base import Base

    return Base.find(parsed.model, parsed.adapter, scaling=parsed.adapter_scaling, force=parsed.force)


def add_model(parser: ArgumentParser) -> None:
    parser.add_class_arguments(BaseConfig, "model")
    parser.set_defaults({"model.path": UNNAMED})


def add_scaling(parser: ArgumentParser) -> None:
    parser.add_argument("--adapter_scaling", type=PositiveFloat, help="of mistral-finetune, if no params.json says it")


def add_adapter(parser: ArgumentParser, also: str = "") -> None:
    add_scaling(parser)
    given = f"take it for another base or tokenizer, or if altered{also}"
    parser.add_argument("--force", action="store_true", help=given)


def add_sampling(parser: ArgumentParser, max_new_tokens: int) -> None:
    """Of a verb that answers."""
    parser.add_argument("--max_new_tokens", type=PositiveInt, default=max_new_tokens, help="of an answer")
    parser.add_argument("--temperature", type=NonNegativeFloat, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=PositiveInt, help="draw among the k likeliest tokens only")
    parser.add_argument("--top_p", type=Share, default=1.0, help="draw among the smallest set that holds this share")
    parser.add_argument("--seed", type=Seed, help="of the draws")


def sampling(parsed: Namespace, fixed: bool = True) -> dict[str, Any]:
    """How tokens are drawn, as `generation.stream` takes it; fixed: no request may ask for another temperature."""
    if parsed.temperature == 0 and fixed:
        refuse_idle(parsed, {"top_k": None, "top_p": 1.0, "seed": None}, "at --temperature 0")
    return {name: getattr(parsed, name) for name in ("temperature", "top_k", "top_p", "seed")}


def refuse_idle(parsed: Namespace, defaults: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for an option that was given though it does nothing there."""
    for name, default in defaults.items():
        if parsed[name] != default:
            raise UsageError(f"--{name} does nothing {where}; leave it out")


def add_length(parser: ArgumentParser, too_long: TooLong) -> None:
    parser.add_argument("--data.max_seq_len", type=PositiveInt, default=2048)
    what = "of a conversation of more tokens: refuse it, leave it out, or drop its oldest exchanges"
    parser.add_argument("--data.too_long", type=TooLong, default=too_long, help=what)


def add_dtype(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--dtype", type=Literal["auto", "bfloat16", "float16", "float32"], default="auto", help=what)


def dtype(parsed: Namespace) -> Any:
    """What `add_dtype` was told, as torch's; None for auto."""
    import torch

    return None if parsed.dtype == "auto" else getattr(torch, parsed.dtype)
