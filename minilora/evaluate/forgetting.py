"""What a fine-tune costs: how well the model still predicts general text, how far it is from its base, what it says.

    perplexity of `data.general` before, during and after
    KL(base || tuned) on its first `eval.general_tokens` target tokens

The base is asked right after it is loaded, before a strategy touches it, and what it says is kept. So "before" is the
base for every strategy, also for one that begins by forgetting (prefix, new weights), and after a resume, which loads
it again. Kept are log-probabilities in float32 on the CPU: 4 bytes x vocabulary x tokens, 134 MB for 1,024 tokens of a
7B (V = 32,768), and exact: an untouched model's KL is 0.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.config import EvalConfig, RunConfig
from minilora.data.encode import Sample
from minilora.data.files import read_lines
from minilora.data.pack import batches
from minilora.errors import UserError
from minilora.evaluate.distance import first_tokens
from minilora.evaluate.perplexity import mean_loss, perplexity
from minilora.generation import answer
from minilora.loss import IGNORE
from minilora.model import Mistral, evaluating
from minilora.tokenizer import Tokenizer

ROWS = 64  # of logits in work at a time: 8 MB at V = 32,768


def read_probes(limits: EvalConfig, tokenizer: Tokenizer) -> list[Sample]:
    """The prompts of `eval.probes`, one a line, as a user's questions without an answer, or those that ship with the
    package; none where `eval.samples` is 0.

    Raises UserError for a file that cannot be read or holds none.
    """
    if not limits.samples:
        return []
    file = Path(__file__).with_name("probes.txt") if limits.probes is None else Path(limits.probes)
    probes = []
    try:
        for line, where in read_lines(file):
            if text := line.decode().strip():
                ids, targets = tokenizer.encode_chat([{"role": "user", "content": text}])
                probes.append(Sample(np.array(ids, np.int32), np.array(targets), where))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not probes:
        raise UserError(f"{file}: holds no prompts; write one a line, or leave eval.probes out")
    return probes


class Forgetting:
    """The general text and the probes of a run, and what its base says of them.

    before: loss and perplexity of the general text, {} without one; log_p: (tokens, V) float32, of `log_probabilities`;
    base_answers: what the base answers to the probes
    """

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, general: list[Sample], probes: list[Sample], base: Mistral
    ) -> None:
        """Ask the base, which is not kept: the model before a strategy touches it."""
        self.config, self.tokenizer, self.general, self.probes = config, tokenizer, general, probes
        self.before, self.base_answers = self.measure(base), self.answers(base)
        n_tokens = min(config.eval.general_tokens, sum(sample.n_targets for sample in general))
        self.log_p, start = torch.empty(n_tokens, base.config.vocab_size), 0
        for log_p, _ in self.log_probabilities(base) if general else ():
            self.log_p[start : (start := start + len(log_p))] = log_p

    def measure(self, model: Mistral) -> dict[str, float]:
        """Loss and perplexity of the whole general text; {} if there is none."""
        if not self.general:
            return {}
        loss = mean_loss(model, self.general, self.config.data.max_seq_len, self.config.eval.batch_size)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def glance(self, model: Mistral) -> dict[str, float]:
        """Loss, perplexity and KL(base || model) on the first `eval.general_tokens` targets; {} without a general text.
        Leaves the training mode as it was."""
        if not self.general:
            return {}
        loss, kl, start = 0.0, 0.0, 0
        with evaluating(model):
            for q, labels in self.log_probabilities(model):
                p = self.log_p[start : start + len(q)]
                kl, start = kl + float((p.exp() * (p - q)).sum()), start + len(q)
                loss -= float(q.gather(1, labels[:, None]).sum())
        return {"loss": loss / start, "perplexity": perplexity(loss / start), "kl": kl / start}

    def report(self, model: Mistral) -> dict[str, Any]:
        """{"before", "after": of the whole text, "kl", "kl_tokens": as `glance` has it}; {} without a general text."""
        if not self.general:
            return {}
        kl = self.glance(model)["kl"]
        return {"before": self.before, "after": self.measure(model), "kl": kl, "kl_tokens": len(self.log_p)}

    def answers(self, model: Mistral) -> list[str]:
        """The likeliest answers to the probes."""
        limits, prompts = self.config.eval, [probe.tokens.tolist() for probe in self.probes]
        given = answer(model, prompts, limits.max_new_tokens, self.tokenizer.eos_id, limits.batch_size)
        return [self.tokenizer.decode(ids) for ids in given]

    @torch.no_grad()
    def log_probabilities(self, model: Mistral) -> Iterator[tuple[Tensor, Tensor]]:
        """ln p(v) of the first `eval.general_tokens` targets of the general text, or of all, and the targets: (<= ROWS,
        V) float32 and (<= ROWS,) on the CPU at a time, in the order in which they are packed. For a model in eval mode.
        """
        limits, n_tokens = self.config.eval, self.config.eval.general_tokens
        text = first_tokens(self.general, n_tokens)
        for batch in batches(text, self.config.data.max_seq_len, limits.batch_size, model.device):
            here = batch.labels != IGNORE
            hidden = model.hidden(batch.tokens, batch.positions, batch.segments, runs=batch.runs)[here][:n_tokens]
            n_tokens -= len(hidden)
            for part, labels in zip(hidden.split(ROWS), batch.labels[here].cpu().split(ROWS), strict=False):
                yield model.lm_head(part).float().log_softmax(-1).cpu(), labels[: len(part)]
