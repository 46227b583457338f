"""What a run's curves advise: one plain sentence for each thing that they show, none where they show nothing.

    training     last quarter of the steps against the first        rose: rate too high; stood still: rate too low
    validation   the last against the best, and the last third      rises: by heart, or the rate; falls still: go on;
                 of its way                                         stands still: enough, or more data
    general      perplexity after against before                    forgotten: replay, or a lower rate

A difference counts where it cannot be chance or too small to matter:

NATS         0.01 nats are 1 % of perplexity; less is no difference that a reader of the answers would see
ERRORS       2 standard errors of the difference of two means of training losses: chance alone gives more once in 20
STEPS        a quarter of fewer than 20 steps has no standard error worth the name
STILL        a loss that nears its floor as exp(-t / T) has 1/20 of its way left when the last third of the way in time
             brought 1/10; up to there going on pays
FORGOTTEN    a tenth of perplexity: storing a model in 4 bits costs some hundredths, which users take, this is more
CLEAR        a loss stands still only where 2 errors are under 1/20 of it: behind more noise it may be falling
SKIPPED      ten steps and a tenth of all; float16's loss scale finds its place in fewer
"""

from collections.abc import Mapping, Sequence
from math import hypot, inf, isfinite, nan
from statistics import fmean, stdev
from typing import Any

import numpy as np

NATS, ERRORS, STEPS, STILL, FORGOTTEN, CLEAR, SKIPPED = 0.01, 2.0, 20, 0.1, 0.1, 0.05, 10
Points = list[tuple[int, float]]  # (step, loss)


def advise(metrics: Sequence[Mapping[str, Any]], forgetting: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences on a run.

    metrics: the records of metrics.jsonl; forgetting: {"before", "after": {"perplexity"}, "kl"}, or {}
    """
    train = _points([r for r in metrics if not r.get("skipped")], "loss")
    validation, n_skipped = _points(metrics, "val_loss"), sum(bool(r.get("skipped")) for r in metrics)
    learns = bool(validation) and validation[0][1] - validation[-1][1] > NATS
    lr = f"the learning rate {max((r['lr'] for r in metrics), default=0):.2g}"
    texts = [_training(train, learns, lr), _validation(train, validation, lr), _forgetting(forgetting or {})]
    if n_skipped > max(SKIPPED, len(metrics) / 10):
        texts.append(f"{n_skipped} of {len(metrics)} steps were left out, loss or gradient was not finite: lower {lr}.")
    return [text for text in texts if text]


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(r["step"], r[key]) for r in metrics if r.get(key) is not None and isfinite(r[key])]


def _training(train: Points, learns: bool, lr: str) -> str:
    quarter = len(train) // 4
    if len(train) < STEPS:
        return ""
    a, b, error = _compare(train[:quarter], train[-quarter:])
    way = f"from {a:.3f} in the first {quarter} steps to {b:.3f} in the last {quarter}"
    if b - a > max(NATS, error):
        return f"The training loss rose, {way}: {lr} is too high, try a third of it."
    if abs(a - b) <= error < CLEAR * a and not learns:
        return f"The training loss did not fall, {way}: {lr} is too low, try three times that."
    return ""


def _validation(train: Points, validation: Points, lr: str) -> str:
    if len(validation) < 4:
        return ""
    at, loss = zip(*validation, strict=True)
    best, every = int(np.argmin(loss)), max(at[1] - at[0], STEPS // 4)  # the last stretch may be cut short
    rising = best < len(loss) - 2 and loss[-1] - loss[best] > NATS
    since = at[best] if rising else round(at[0] + 2 / 3 * (at[-1] - at[0]))  # what lies between is looked at
    there = float(np.interp(since, at, loss))
    ends = (since, at[-1])
    a, b, error = _compare(*([p for p in train if end - every < p[0] <= end] for end in ends))
    falls, gain = a - b > max(NATS, error), there - loss[-1]
    way = f"from {there:.3f} at step {since} to {loss[-1]:.3f} at step {at[-1]}"
    gap = f"and the gap between them grew from {there - a:.3f} to {loss[-1] - b:.3f}"
    gap = f"while the training loss fell from {a:.3f} to {b:.3f}, {gap}"
    if error == inf:  # of the training loss nothing is known
        return ""
    if rising and falls:
        return f"The validation loss rose {way} {gap}: it learns by heart; stop at step {since}, or bring more data."
    if rising:
        return f"The validation loss rose {way}, and the training loss did not fall: {lr} is too high, lower it."
    if gain > max(NATS, STILL * (loss[0] - loss[-1])):
        longer = "train longer, in a new run of more train.epochs, or train.max_steps"
        return f"The validation loss was still falling, {way}: {longer}."
    if abs(gain) >= NATS:
        return ""
    if falls:
        return f"The validation loss stood still, {way} {gap}: more or cleaner data would help, more steps would not."
    return f"The validation loss stood still, {way}: more steps would be in vain."


def _forgetting(forgetting: Mapping[str, Any]) -> str:
    before, after = (forgetting.get(when, {}).get("perplexity") for when in ("before", "after"))
    if before is None or after is None or not after > (1 + FORGOTTEN) * before:
        return ""
    return (
        f"The perplexity of the general text rose by {after / before - 1:.0%}, from {before:.3g} to {after:.3g} (KL "
        f"{forgetting['kl']:.3g} nats a token): it forgets; mix general text in (data.replay), or lower train.lr."
    )


def _compare(a: Points, b: Points) -> tuple[float, float, float]:
    """Means of two stretches, and ERRORS standard errors of their difference: of single points nothing is known."""
    if min(len(a), len(b)) < 2:
        return nan, nan, inf
    one, other = ([loss for _, loss in part] for part in (a, b))
    error = ERRORS * hypot(*(stdev(part) / len(part) ** 0.5 for part in (one, other)))
    return fmean(one), fmean(other), error
