"""Records as samples: token ids, and the mask that says which of them are learned.

    text           <s> E(text) </s>          all but <s> are targets; cut into pieces that fit a row
    conversation   `Tokenizer.encode_chat`   the assistant's words and </s> after them are targets; no message is cut

A sample of n tokens takes n - 1 positions of a row: the last token is only ever a target.

With tools a conversation becomes one sample for each assistant message, which ends there and learns that message alone:
the template shows the tools before the last user message, so only the last answers have them in sight (v1 shows none,
and needs no more samples). Calls that end a
conversation lose their ids, which nobody could predict. Both follow mistral-finetune (`finetune/data/tokenize.py`).

A conversation that is too long can be shortened: system text and last exchange stay, the oldest exchanges go, whole.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minilora.config import TooLong
from minilora.data.files import read_rows
from minilora.data.records import ChatRecord, Record, parse_row
from minilora.errors import UserError
from minilora.tokenizer import Tokenizer


class TooLongError(UserError):
    """A conversation of more than max_seq_len positions, where that is refused."""


@dataclass(frozen=True, eq=False)
class Sample:
    """tokens (n,) int32; target_mask (n,) bool, True for what is predicted, never at 0; where: "file:line".

    dropped: messages at its beginning that went because it was too long
    """

    tokens: NDArray[np.int32]
    target_mask: NDArray[np.bool_]
    where: str
    dropped: int = 0

    @property
    def length(self) -> int:
        """Positions of a row that it takes: n - 1."""
        return len(self.tokens) - 1

    @property
    def n_targets(self) -> int:
        return int(self.target_mask.sum())


def read_samples(path: str | Path, tokenizer: Tokenizer, max_seq_len: int, too_long: TooLong = "fail") -> list[Sample]:
    """The samples of a file, in its order. Raises UserError for the first line that cannot be read, then as
    `encode_record` does, for one without a target, and if all are left out."""
    records = [parse_row(row, where) for where, row in read_rows(path)]
    encoded = (encode_record(record, tokenizer, max_seq_len, too_long) for record in records)
    samples = [sample for of_record, _ in encoded for sample in of_record]
    if not samples:
        limit = f"data.max_seq_len, {max_seq_len} positions; raise it"
        raise UserError(f"{records[0].where}: left out, as all that follow: each takes more than {limit}")
    if idle := [sample for sample in samples if not sample.n_targets]:
        raise UserError(f"{idle[0].where}: no token to measure; drop the line")
    return samples


def encode_record(
    record: Record, tokenizer: Tokenizer, max_seq_len: int, too_long: TooLong = "fail"
) -> tuple[list[Sample], int]:
    """The samples of a record, and how many more were left out for being too long.

    too_long: "truncate" drops the oldest exchanges and leaves out what is too long still; "skip" leaves a record out
        whole of which a sample is too long

    Raises UserError with "file:line" for a conversation that the tokenizer refuses and, if too_long is "fail",
    TooLongError.
    """
    try:
        if not isinstance(record, ChatRecord):
            return list(_text_samples(tokenizer.encode_text(record.text), max_seq_len, record.where)), 0
        samples = list(_chat_samples(record, tokenizer, max_seq_len if too_long == "truncate" else None))
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    longest = max(sample.length for sample in samples)
    if longest > max_seq_len and too_long == "fail":
        takes = f"the conversation takes {longest} positions, but data.max_seq_len is {max_seq_len}"
        how = 'raise it, shorten the conversation, or set data.too_long to "truncate" or "skip"'
        raise TooLongError(f"{record.where}: {takes}; {how}")
    fits = [sample for sample in samples if sample.length <= max_seq_len and (sample.n_targets or not sample.dropped)]
    if too_long == "skip" and len(fits) < len(samples):
        fits = []
    return fits, len(samples) - len(fits)


def _text_samples(ids: Sequence[int], max_seq_len: int, where: str) -> Iterator[Sample]:
    """Pieces of at most max_seq_len positions. A piece begins with the token that the one before ends with, so every
    token but <s> is a target once."""
    for start in range(0, len(ids) - 1, max_seq_len):
        tokens = np.array(ids[start : start + max_seq_len + 1], np.int32)
        yield Sample(tokens, np.arange(len(tokens)) > 0, where)


def _chat_samples(record: ChatRecord, tokenizer: Tokenizer, max_seq_len: int | None) -> Iterator[Sample]:
    """A conversation's samples. max_seq_len: drop the oldest exchanges until one fits, or only the last is left."""
    messages = record.messages
    for end in _answer_ends(messages) if record.tools and tokenizer.shows_tools else [len(messages)]:
        turns = [*messages[: end - 1], _without_call_ids(messages[end - 1])]
        sample = _chat_sample(turns, record, tokenizer)
        if max_seq_len is not None and sample.length > max_seq_len:
            starts = _exchange_starts(turns)
            shortened = [[m for i, m in enumerate(turns) if i >= start or m["role"] == "system"] for start in starts]
            fits = bisect_left(shortened, -max_seq_len, key=lambda m: -_chat_sample(m, record, tokenizer).length)
            kept = shortened[min(fits, len(shortened) - 1)]
            sample = replace(_chat_sample(kept, record, tokenizer), dropped=len(turns) - len(kept))
        yield sample


def _chat_sample(messages: Sequence[Mapping[str, Any]], record: ChatRecord, tokenizer: Tokenizer) -> Sample:
    ids, targets = tokenizer.encode_chat(messages, record.tools)
    mask = np.array(targets)
    if record.tools and tokenizer.shows_tools:
        before = ~mask | (np.array(ids) == tokenizer.eos_id)  # of the last answer, which may stand behind another
        mask[: np.flatnonzero(before[:-1])[-1] + 1] = False
    return Sample(np.array(ids, np.int32), mask, record.where)


def _exchange_starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where an exchange begins: with the first message, and with each user's that comes after an answer."""
    spoken = [(i, message["role"]) for i, message in enumerate(messages) if message["role"] != "system"]
    later = [i for (_, before), (i, role) in pairwise(spoken) if (before, role) == ("assistant", "user")]
    return [spoken[0][0], *later]


def _answer_ends(messages: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """How many messages there are up to each answer that is trained on; those that the tokenizer joins are one."""
    for end, (message, following) in enumerate(pairwise([*messages, {"role": ""}]), 1):
        joined = (following["role"], following.get("weight")) == ("assistant", message.get("weight"))
        if message["role"] == "assistant" and message.get("weight") != 0 and not joined:
            yield end


def _without_call_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return message
    return {**message, "tool_calls": [{key: call[key] for key in call if key != "id"} for call in calls]}
