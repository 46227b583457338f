"""What a run's curves advise: one plain sentence for each thing that they show, none where they show nothing.

    training     last quarter of the steps against the first        rose: rate too high; stood still: rate too low
    validation   the last against the best, and the last third      rises: by heart, or the rate; falls still: go on;
                 of its way                                         stands still: stop here, or more data
    general      perplexity after against before                    forgotten: replay, or a lower rate

A difference counts where it cannot be chance or too small to matter:

NATS         0.01 nats are 1 % of perplexity; less is no difference that a reader of the answers would see
ERRORS       2 standard errors of the difference of two means of training losses: chance alone gives more once in 20
STEPS        a quarter of fewer than 20 steps has no standard error worth the name
STILL        a loss that nears its floor as exp(-t / T) has 1/20 of its way left when the last third of the way in time
             brought 1/10; up to there going on pays
FORGOTTEN    a tenth of perplexity: storing a model in 4 bits costs some hundredths, which users take, this is more
SKIPPED      ten steps and a tenth of all; float16's loss scale finds its place in fewer
"""

from collections.abc import Mapping, Sequence
from math import hypot, inf, isfinite
from statistics import fmean, stdev
from typing import Any

import numpy as np

NATS, ERRORS, STEPS, STILL, FORGOTTEN, SKIPPED = 0.01, 2.0, 20, 0.1, 0.1, 10
Points = list[tuple[int, float]]  # (step, loss)


def advise(metrics: Sequence[Mapping[str, Any]], forgetting: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences on a run.

    metrics: the records of metrics.jsonl; forgetting: {"before", "after": {"perplexity"}, "kl"}, or {}
    """
    train, validation = _points(metrics, "loss"), _points(metrics, "val_loss")
    rates = [record["lr"] for record in metrics if "lr" in record]
    said = [_skipped(metrics), _training(train, validation, max(rates, default=0.0))]
    said += [_validation(train, validation), _forgetting(forgetting or {})]
    return [sentence for sentence in said if sentence]


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    found = ((r["step"], r.get(key)) for r in metrics if key == "val_loss" or not r.get("skipped"))
    return [(step, value) for step, value in found if value is not None and isfinite(value)]


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> str:
    n = sum(bool(r.get("skipped")) for r in metrics)
    if n <= max(SKIPPED, len(metrics) / 10):
        return ""
    return f"{n} of {len(metrics)} steps were left out, loss or gradient was not finite: lower the learning rate."


def _training(train: Points, validation: Points, lr: float) -> str:
    quarter = len(train) // 4
    if len(train) < STEPS:
        return ""
    first, last = train[:quarter], train[-quarter:]
    (a, b), error = (fmean(loss for _, loss in part) for part in (first, last)), _error(first, last)
    figures = f"from {a:.3f} in the first {quarter} steps to {b:.3f} in the last {quarter}"
    if b - a > max(NATS, error):
        return f"The training loss rose, {figures}: the learning rate {lr:.2g} is too high, try a third of it."
    learns = bool(validation) and validation[0][1] - validation[-1][1] > NATS
    if abs(a - b) <= error < 0.05 * a and not learns:
        return (
            f"The training loss did not fall, {figures}: the learning rate {lr:.2g} is too low, try three times that, "
            "or there is nothing in the data to learn."
        )
    return ""


def _validation(train: Points, validation: Points) -> str:
    if len(validation) < 4:
        return ""
    at, loss = zip(*validation, strict=True)
    best, every = int(np.argmin(loss)), at[-1] - at[-2]
    before = [p for p in train if at[best] - every < p[0] <= at[best]]
    after = [p for p in train if p[0] > at[-1] - every]
    if best < len(loss) - 2 and loss[-1] - loss[best] > NATS:
        rose = f"The validation loss rose from {loss[best]:.3f} at step {at[best]} to {loss[-1]:.3f} at step {at[-1]}"
        if _fell(before, after):
            a, b = (fmean(x for _, x in part) for part in (before, after))
            gap = f"the gap between them grew from {loss[best] - a:.3f} to {loss[-1] - b:.3f}"
            return (
                f"{rose} while the training loss fell from {a:.3f} to {b:.3f} ({gap}): it learns the data by heart, so "
                f"stop at step {at[best]}, or bring more data or a lower learning rate."
            )
        return f"{rose}, and the training loss did not fall either: the learning rate is too high, lower it."
    start = at[0] + 2 / 3 * (at[-1] - at[0])
    there = float(np.interp(start, at, loss))
    gain, way = there - loss[-1], f"from {there:.3f} at step {start:.0f} to {loss[-1]:.3f} at step {at[-1]}"
    if gain > max(NATS, STILL * (loss[0] - loss[-1])):
        return f"The validation loss was still falling, {way}: train longer."
    if abs(gain) >= NATS:
        return ""
    third = [p for p in train if start - every < p[0] <= start]
    if _fell(third, after):
        a, b = (fmean(x for _, x in part) for part in (third, after))
        return (
            f"The validation loss stood still, {way}, while the training loss fell from {a:.3f} to {b:.3f}: "
            "more or cleaner data would help, more steps would not."
        )
    return f"The validation loss stood still, {way}: stop here, more steps bring nothing."


def _forgetting(forgetting: Mapping[str, Any]) -> str:
    before, after = (forgetting.get(when, {}).get("perplexity") for when in ("before", "after"))
    if before is None or after is None or not after > (1 + FORGOTTEN) * before:
        return ""
    return (
        f"The perplexity of the general text rose from {before:.3g} to {after:.3g}, by {after / before - 1:.0%} (KL "
        f"{forgetting['kl']:.3g} nats a token): it forgets, so mix general text into the training (data.replay = 0.1), "
        "or lower the learning rate."
    )


def _error(a: Points, b: Points) -> float:
    """ERRORS standard errors of the difference of the means; of single points nothing is known."""
    if min(len(a), len(b)) < 2:
        return inf
    return ERRORS * hypot(*(stdev(loss for _, loss in part) / len(part) ** 0.5 for part in (a, b)))


def _fell(a: Points, b: Points) -> bool:
    error = _error(a, b)
    return error < inf and fmean(loss for _, loss in a) - fmean(loss for _, loss in b) > error
