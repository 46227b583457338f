"""An instruction set with real lengths that lies on every machine: Python's standard library asks and answers.

    user       What does `textwrap.dedent(text)` do?                    Write `textwrap.dedent(text)`. <docstring>
    assistant  <docstring>                                              <source>

Docstrings and sources have what instruction data have: many short samples and a long tail. They differ a little from
one Python to the next, so the distribution that was measured stands in the result.
"""

import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import Any

import numpy as np

from minilora.data.encode import Sample
from minilora.errors import UserError
from minilora.tokenizer import Tokenizer, load_tokenizer

MODULES = (
    "argparse", "ast", "asyncio.events", "base64", "bisect", "calendar", "cmd", "codecs", "collections",
    "concurrent.futures", "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "email.message", "enum", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "glob", "gzip",
    "heapq", "html.parser", "http.client", "http.cookiejar", "imaplib", "inspect", "ipaddress", "json", "logging",
    "mailbox", "mimetypes", "numbers", "operator", "optparse", "os", "pathlib", "pdb", "pickle", "platform",
    "plistlib", "pprint", "queue", "random", "re", "sched", "shelve", "shlex", "shutil", "smtplib", "socket",
    "socketserver", "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "traceback", "types", "typing", "unittest.case", "unittest.mock", "urllib.parse",
    "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom", "zipfile",
)  # fmt: skip
EVERY_NTH_SOURCE = 3  # objects of which the source is asked as well
LEAST_DOCSTRING = 40  # characters; shorter ones say nothing


def instruction_samples(max_seq_len: int, limit: int | None = None) -> list[Sample]:
    """The set in mistral's v3 tokens, each sample cut after max_seq_len positions; samples without a target left out.

    limit: take only that many, evenly spread over the set
    """
    tokenizer = load_tokenizer(v3_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some of what is looked at says so
        chats = list(conversations())
    if limit and limit < len(chats):
        chats = [chats[i * len(chats) // limit] for i in range(limit)]
    samples = (_sample(question, answer, tokenizer, max_seq_len) for question, answer in chats)
    return [sample for sample in samples if sample.target_mask.any()]


def v3_tokenizer() -> Path:
    """The file of Mistral-7B v0.3's tokenizer that ships with mistral-common."""
    try:
        folder = Path(str(importlib.import_module("mistral_common").__file__)).parent / "data"
    except ImportError:
        raise UserError("mistral-common, which holds the tokenizer, is missing: pip install -e '.[bench]'") from None
    return folder / "mistral_instruct_tokenizer_240323.model.v3"


def conversations() -> Iterator[tuple[str, str]]:
    """(question, answer), in a fixed order, no answer twice."""
    answers: set[str] = set()
    n_objects = 0
    for name, thing in _documented():
        doc = inspect.getdoc(thing) or ""
        if len(doc) < LEAST_DOCSTRING or doc in answers:
            continue
        answers.add(doc)
        call = f"{name}{_signature(thing)}"
        yield f"What does `{call}` do?", doc
        n_objects += 1
        if n_objects % EVERY_NTH_SOURCE == 0 and (source := _source(thing)) and source not in answers:
            answers.add(source)
            yield f"Write `{call}`. {doc}", source


def distribution(samples: Sequence[Sample]) -> dict[str, Any]:
    """The lengths in tokens, for the result."""
    lengths = [sample.length for sample in samples]
    at = {f"p{q}": float(np.percentile(lengths, q)) for q in (10, 25, 75, 90, 99)}
    targets = sum(sample.n_targets for sample in samples)
    return {
        "samples": len(samples),
        "tokens": sum(lengths),
        "target_tokens": targets,
        "lengths": {"min": min(lengths), **at, "median": median(lengths), "mean": mean(lengths), "max": max(lengths)},
    }


def _documented() -> Iterator[tuple[str, Any]]:
    """Public functions, classes and methods of MODULES by dotted name."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, thing in _members(module, module):
            yield f"{module_name}.{name}", thing
            if inspect.isclass(thing):
                yield from ((f"{module_name}.{name}.{part}", method) for part, method in _members(thing, module))


def _members(owner: Any, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What `owner` itself defines and names publicly, by name."""
    for name, thing in sorted(vars(owner).items()):
        is_one = inspect.isroutine(thing) or inspect.isclass(thing)
        at_home = getattr(thing, "__module__", module.__name__) == module.__name__
        if is_one and at_home and not name.startswith("_"):
            yield name, thing


def _signature(thing: Any) -> str:
    """Without default values, whose text can hold addresses."""
    try:
        return f"({', '.join(inspect.signature(thing).parameters)})"
    except (TypeError, ValueError):
        return ""


def _source(thing: Any) -> str | None:
    try:
        return inspect.cleandoc(inspect.getsource(thing))
    except (OSError, TypeError):
        return None


def _sample(question: str, answer: str, tokenizer: Tokenizer, max_seq_len: int) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, targets = tokenizer.encode_chat(messages)
    end = max_seq_len + 1  # the last token is only ever a target
    return Sample(np.array(ids[:end], np.int32), np.array(targets[:end]), question)
