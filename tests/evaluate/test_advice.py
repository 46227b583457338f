"""Advice from curves: each thing that they may show, and silence where they show nothing."""

import math
import random
from typing import Any

import pytest

from minilora.evaluate.advice import advise

STEPS = 200


def records(train: Any, validation: Any = None, every: int = 20, noise: float = 0.02) -> list[dict[str, Any]]:
    """metrics.jsonl of a run whose losses are functions of the share of the run that is done."""
    draw = random.Random(0)
    out = []
    for step in range(1, STEPS + 1):
        done = step / STEPS
        record = {"step": step, "loss": train(done) + draw.gauss(0, noise), "lr": 1e-3}
        if validation is not None and step % every == 0:
            record["val_loss"] = validation(done)
        out.append(record)
    return out


def falls(done: float) -> float:
    return 1 + 2 * math.exp(-6 * done)


def test_a_run_that_went_well_and_stands_still_is_stopped() -> None:
    [said] = advise(records(lambda t: 1 + 2 * math.exp(-40 * t), lambda t: 1.1 + 2 * math.exp(-40 * t)))
    assert "stood still" in said
    assert "stop here" in said


def test_one_that_still_falls_goes_on() -> None:
    [said] = advise(records(lambda t: 3 - 2 * t, lambda t: 3.1 - 2 * t))
    assert "still falling" in said
    assert "train longer" in said


def test_learning_by_heart() -> None:
    [said] = advise(records(lambda t: 3 - 2.5 * t, lambda t: 2 + (2 * t - 0.8) ** 2))
    assert "by heart" in said
    assert "step 80" in said, "where validation was best"
    assert "gap between them grew" in said


def test_a_rate_that_is_too_high() -> None:
    said = advise(records(lambda t: 2 + 3 * t))
    assert len(said) == 1
    assert "0.001 is too high" in said[0]
    both = advise(records(lambda t: 2 + 3 * t, lambda t: 2 + 3 * t))
    assert any("validation loss rose" in sentence and "lower it" in sentence for sentence in both)


def test_a_loss_that_does_not_move() -> None:
    [said] = advise(records(lambda _: 3.0))
    assert "did not fall" in said
    assert "three times that" in said


def test_validation_stands_still_while_training_falls() -> None:
    said = advise(records(lambda t: 3 - 2 * t, lambda t: 2 + math.exp(-40 * t)))
    assert len(said) == 1
    assert "more or cleaner data" in said[0]


@pytest.mark.parametrize(("after", "n"), [(3.2, 0), (3.29, 0), (3.31, 1), (6.0, 1)])
def test_forgetting_is_told_from_a_tenth_of_perplexity_on(after: float, n: int) -> None:
    said = advise([], {"before": {"perplexity": 3.0}, "after": {"perplexity": after}, "kl": 0.2})
    assert len(said) == n
    assert all("data.replay" in sentence and "KL 0.2" in sentence for sentence in said)


def test_silence_where_nothing_is_known() -> None:
    assert advise([]) == []
    assert advise(records(falls)[:10]) == [], "too few steps to tell from chance"
    assert advise(records(falls)) == [], "a loss that falls, and no validation"
    assert advise([{"step": 1, "loss": None, "lr": 1e-3, "skipped": True}]) == []
    assert advise(records(lambda _: float("nan"))) == []


def test_noise_is_no_trend() -> None:
    """Without any trend, what is said of the training loss is that it stands still, never that it rose or fell."""
    for noise in (0.01, 0.1, 0.5):
        said = " ".join(advise(records(lambda _: 3.0, noise=noise)))
        assert "rose" not in said


def test_steps_that_were_left_out() -> None:
    lines = records(falls)
    for line in lines[::4]:
        line |= {"skipped": True, "loss": None}
    [said] = advise(lines)
    assert "50 of 200 steps were left out" in said
