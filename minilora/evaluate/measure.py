"""What a model makes of held-out samples: loss, perplexity, and answers, compared with what the data say."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from minilora.config import EvalConfig
from minilora.data.encode import Sample
from minilora.evaluate.answers import Answer, answer_samples, has_prompt, split_last_turn
from minilora.evaluate.metrics import score
from minilora.evaluate.perplexity import mean_loss, perplexity
from minilora.model import Mistral
from minilora.tokenizer import Tokenizer


def asked(samples: Sequence[Sample], limits: EvalConfig) -> list[Sample]:
    """The samples whose last turn is answered: the first conversations, `eval.answers` of them, or as many as
    `eval.samples` shows, if that is more."""
    return list(islice(filter(has_prompt, samples), max(limits.answers, limits.samples)))


def longest_prompt(samples: Sequence[Sample], limits: EvalConfig) -> int:
    """Tokens of the longest prompt that is answered; 0 where none is."""
    return max((len(split_last_turn(sample)[0]) for sample in asked(samples, limits)), default=0)


def works(samples: Sequence[Sample], max_seq_len: int, limits: EvalConfig) -> list[tuple[int, int, int | None]]:
    """What `measure` wants memory for, as `Base.check` takes it: rows that are scored, prompts that are answered."""
    row, prompt = min(max_seq_len, sum(sample.length for sample in samples)), longest_prompt(samples, limits)
    answered = [(limits.batch_size, prompt, limits.max_new_tokens)] if prompt else []
    return [(limits.batch_size, row, None), *answered]


def measure(
    model: Mistral,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    max_seq_len: int,
    limits: EvalConfig,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Answer]]:
    """Loss and perplexity of all samples and `eval.metrics` of `eval.answers` of them; and the answers to all that are
    `asked`. Nothing of no samples. say: told what takes its time"""
    if not samples:
        return {}, []
    questions = asked(samples, limits)
    say(f"scoring {len(samples):,} samples" + (f", answering {len(questions):,} of them" if questions else ""))
    loss = mean_loss(model, samples, max_seq_len, limits.batch_size)
    answers = answer_samples(model, tokenizer, questions, limits.max_new_tokens, limits.batch_size)
    figures, _ = score(answers[: limits.answers], limits.metrics)
    return {"loss": loss, "perplexity": perplexity(loss)} | figures, answers
