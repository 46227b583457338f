"""Answers to the prompts of held-out conversations, compared with what was said there."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from minilora.data.encode import Sample
from minilora.generation import answer
from minilora.model import Mistral
from minilora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One question: the prompt's text, what the data says, what the model says; where: "file:line"."""

    prompt: str
    expected: str
    given: str
    where: str = ""

    @property
    def exact(self) -> bool:
        return self.given.strip() == self.expected.strip()


def has_prompt(sample: Sample) -> bool:
    """Whether something in the sample is no target: a question, where raw text is targets throughout."""
    return not sample.target_mask[1:].all()


def split_last_turn(sample: Sample) -> tuple[list[int], list[int]]:
    """A conversation as (prompt ids, ids of its last answer without eos)."""
    tokens, mask = sample.tokens.tolist(), sample.target_mask
    eos = int(np.flatnonzero(mask)[-1])
    start = int(np.flatnonzero(~mask[:eos])[-1]) + 1
    return tokens[:start], tokens[start:eos]


def answer_samples(
    model: Mistral, tokenizer: Tokenizer, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 8
) -> list[Answer]:
    """The model's likeliest answer to the last turn of each sample."""
    prompts, expected = zip(*map(split_last_turn, samples), strict=True) if samples else ((), ())
    given = answer(model, prompts, max_new_tokens, tokenizer.eos_id, batch_size)
    said = ([_said(tokenizer, ids) for ids in side] for side in (expected, given))
    return [Answer(*row) for row in zip(map(tokenizer.decode, prompts), *said, (s.where for s in samples), strict=True)]


def _said(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer. What makes a call of it, [TOOL_CALLS], is a control piece, which else has no text."""
    parts = groupby(tokenizer.known(ids), tokenizer.control_name)
    return " ".join(name or tokenizer.decode(of) for name, of in parts)
