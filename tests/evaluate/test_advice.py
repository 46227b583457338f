"""Advice: each thing that curves may show, silence where they show nothing, and two real runs."""

import math
import random
import re
from typing import Any

import pytest
from tiny_runs import MakeConfig, Quiet

from minilora.evaluate.advice import advise
from minilora.train.loop import fine_tune

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
    assert "more steps would be in vain" in said


def test_one_that_still_falls_goes_on() -> None:
    [said] = advise(records(lambda t: 3 - 2 * t, lambda t: 3.1 - 2 * t))
    assert "still falling" in said
    assert "train longer, in a new run of more train.epochs, or train.max_steps" in said


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
    """Without any trend, what is said of a loss is that it stands still, never that it rose or fell."""
    for noise in (0.01, 0.1, 0.5):
        for validation in (None, lambda _: 3.1):
            said = " ".join(advise(records(lambda _: 3.0, validation, noise=noise)))
            assert not re.search(r"\b(rose|fell|falling)\b", said), said


def test_a_single_validation_that_is_worse_is_no_rise() -> None:
    assert advise(records(falls, lambda t: 1 + 2 * math.exp(-6 * t) + (0.2 if t == 1 else 0))) == []


def test_a_last_validation_right_after_the_one_before() -> None:
    """At the end it is validated in any case, so the last stretch may hold a single step."""
    for learns, word in ((lambda t: 3 - 2.5 * t, "by heart"), (lambda t: 2 + 3 * t, "lower it")):
        lines = records(learns, lambda t: 2 + (2 * t - 0.8) ** 2)
        lines.append({**lines[-1], "step": STEPS + 1})
        assert any(word in sentence for sentence in advise(lines))


def test_where_nothing_is_known_of_the_training_loss_nothing_is_said() -> None:
    lines = records(falls, lambda t: 2 + (2 * t - 0.8) ** 2)
    assert advise([line | {"loss": None} for line in lines]) == []


def test_a_training_loss_that_hardly_fell_has_opened_no_gap() -> None:
    """Validation fell more than training, both by too little to matter."""
    said = advise(records(lambda t: 2 - 0.008 * t, lambda t: 2 - 0.009 * t + math.exp(-60 * t), noise=1e-5))
    assert not any("grew" in sentence for sentence in said), said


def test_steps_that_were_left_out() -> None:
    lines = records(falls)
    for line in lines[::4]:
        line |= {"skipped": True, "loss": None}
    [said] = advise(lines)
    assert "50 of 200 steps were left out" in said


@pytest.mark.slow
def test_a_run_that_learns_by_heart_and_forgets_is_told_so(make_config: MakeConfig, quiet: Quiet) -> None:
    """A few chats over and over, at a high rate, against others of the same random words."""
    data = make_config().data
    config = make_config(
        data__validation=data.train, data__train=data.validation, data__general=data.train,
        train__max_steps=60, train__lr=3e-2, train__batch_size=1, eval__every=6, eval__answers=0, eval__samples=0,
    )  # fmt: skip
    summary = fine_tune(config, quiet).folder.read_json("summary.json")
    assert any("learns by heart; stop at step" in sentence for sentence in summary["advice"]), summary["advice"]
    assert [said.removeprefix("advice: ") for said in quiet.said if said.startswith("advice: ")] == summary["advice"]


def test_a_run_that_diverges_is_told_so(make_config: MakeConfig, quiet: Quiet) -> None:
    """The rate rises step by step: at first it learns, at the end every step undoes what was learnt."""
    config = make_config(
        train__strategy="full", train__max_steps=40, train__warmup_steps=40, train__lr=2.0, train__schedule="constant",
        data__validation=None, eval__samples=0,
    )  # fmt: skip
    (sentence,) = fine_tune(config, quiet).folder.read_json("summary.json")["advice"]
    assert "The training loss rose, from" in sentence
    assert "the learning rate 2 is too high" in sentence
