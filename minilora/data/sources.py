"""What the configuration names as data: files, their weights, and which side of a split a record falls on.

    side = u < test_share: test;  u < test_share + validation_share: validation;  else training,
    u = hash(content, split_seed) in [0, 1)

So equal records always fall on the same side, and lines that are added move nobody. Of training, data.share takes
those of the smallest u: a larger share holds all of a smaller one.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from minilora.checkpoint.files import sha256_of
from minilora.config import DataConfig, RunConfig, Sources
from minilora.data.files import read_rows, reader
from minilora.data.records import Record, TextRecord, parse_row
from minilora.errors import UserError

FILE_KEYS = ("train", "validation", "test", "general", "replay_from")
BAD_LINES_ALLOWED = 10  # with data.bad_lines "skip"; or one in a hundred, where that is more


@dataclass(frozen=True)
class Source:
    """A file of the configuration; weight: None where none was given."""

    path: str
    weight: float | None = None


def sources(named: Sources | None) -> list[Source]:
    """The sources that a key names, PATH or PATH:WEIGHT. What exists as it stands is a path, colon and all."""
    return [_source(text) for text in ([named] if isinstance(named, str) else named or ()) if text]


def _source(text: str) -> Source:
    text = os.path.expanduser(text)
    match = re.fullmatch(r"(.+):([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)", text, re.DOTALL)
    if not match or os.path.exists(text):
        return Source(text)
    if not 0 < (weight := float(match[2])) < 1e9:
        raise UserError(f"{text}: the weight of a source is {match[2]}, but must be above 0 and below 1e9")
    return Source(match[1], weight)


def fingerprints(config: RunConfig) -> dict[str, Any]:
    """sha256 of each file of `data` and of `eval.probes`, if these are asked, by key; of several, or weighted ones, by
    their number and with their weights.

    The ending stands behind it where a file is read by that: under another name the same bytes are other samples.
    """
    read = [key for key in FILE_KEYS if key != "replay_from" or config.data.replay]
    named = {key: sources(getattr(config.data, key)) for key in read}
    by_key = {key: _fingerprint(files) for key, files in named.items() if files}
    return by_key | ({"probes": sha256_of(config.eval.probes)} if config.eval.probes and config.eval.samples else {})


def _fingerprint(files: Sequence[Source]) -> Any:
    each = [{"sha256": sha256_of(source.path) + reader(source.path), "weight": source.weight} for source in files]
    is_plain = len(files) == 1 and files[0].weight is None
    return each[0]["sha256"] if is_plain else {str(n): known for n, known in enumerate(each, 1)}


def read_source(path: str, mend: bool = False) -> tuple[list[Record], list[str]]:
    """The file's records, and a line for each row that is none, "file:line: what is wrong".

    mend: of a conversation that is damaged, keep what stands before (see `parse_row`)
    """
    records, bad = list[Record](), list[str]()
    for where, row in read_rows(path):
        try:
            records.append(parse_row(row, where, mend))
        except UserError as error:
            bad.append(str(error))
    return records, bad


def normal_form(record: Record) -> str:
    """The content as one text in which white space is single spaces. Records are equal if this is."""
    if isinstance(record, TextRecord):
        return " ".join(record.text.split())
    turns = [" ".join(f"{m['role']}: {m['content']} {m.get('tool_calls') or ''}".split()) for m in record.messages]
    return "\n".join([*turns, str(record.tools or "")])


def side(record: Record, config: DataConfig) -> str:
    """ "train", "validation" or "test": where a record of data.train belongs; "" beyond data.share."""
    salt = (config.split_seed % 2**64).to_bytes(8, "little")
    digest = blake2b(normal_form(record).encode(), digest_size=8, salt=salt).digest()
    u = int.from_bytes(digest, "little") / 2**64
    if u < config.test_share:
        return "test"
    held_out = config.test_share + config.validation_share
    return "validation" if u < held_out else "train" if u < held_out + config.share * (1 - held_out) else ""
