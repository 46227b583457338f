"""How far one model's next-token distribution is from another's, on the target tokens of held-out text.

KL(p, q) = sum over v of p(v) (ln p(v) - ln q(v)),  in nats a token
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from minilora.data.encode import Sample


@dataclass(frozen=True)
class Distance:
    """mean_kl, max_kl: KL(p, q) of a token; max_logit_difference; top1_agreement: share of tokens with the same
    likeliest next."""

    mean_kl: float
    max_kl: float
    max_logit_difference: float
    top1_agreement: float
    n_tokens: int

    @staticmethod
    def of(logits_p: Tensor, logits_q: Tensor) -> "Distance":
        """The distance on N tokens, one at least: from the logits of p to those of q, both (N, V) float32."""
        log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        largest = float((logits_p - logits_q).abs().max())
        agreed = (logits_p.argmax(-1) == logits_q.argmax(-1)).double().mean()
        return Distance(float(kl.mean()), float(kl.max()), largest, float(agreed), len(kl))

    def __add__(self, other: "Distance") -> "Distance":
        """The distance on the tokens of both, taken together."""
        n, share = self.n_tokens + other.n_tokens, other.n_tokens / (self.n_tokens + other.n_tokens)
        return Distance(
            self.mean_kl + share * (other.mean_kl - self.mean_kl),
            max(self.max_kl, other.max_kl),
            max(self.max_logit_difference, other.max_logit_difference),
            self.top1_agreement + share * (other.top1_agreement - self.top1_agreement),
            n,
        )


def first_tokens(samples: Sequence[Sample], n_tokens: int) -> list[Sample]:
    """The first samples that have so many targets, or all."""
    reach = accumulate(sample.n_targets for sample in samples)
    return list(samples[: 1 + sum(n < n_tokens for n in reach)])
