"""The learning rate at its borders: first and last update, where the warm-up ends, and every shape between."""

from math import cos, pi

import pytest

from minilora.config import TrainConfig
from minilora.train.schedule import lr_at


def rates(n: int, **settings: object) -> list[float]:
    config = TrainConfig(lr=2.0, **settings)  # type: ignore[arg-type]
    return [lr_at(update, n, config) for update in range(n)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_straight_and_the_first_update_learns(schedule: str) -> None:
    assert rates(20, schedule=schedule, warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine() -> None:
    got = rates(9, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    want = [2 * (0.1 + 0.9 * (1 + cos(pi * i / 6)) / 2) for i in range(7)]
    assert got[2:] == pytest.approx(want, rel=1e-12)
    assert got[5] == pytest.approx(1.1)  # half-way between 2 and 0.2
    assert got[-1] == pytest.approx(0.2)


def test_linear() -> None:
    got = rates(9, schedule="linear", warmup_steps=2, min_lr_ratio=0.1)
    assert got[2:] == pytest.approx([2 - 1.8 * i / 6 for i in range(7)], rel=1e-12)


def test_constant_stays() -> None:
    assert rates(6, schedule="constant", warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_it_starts_at_the_top(schedule: str) -> None:
    assert rates(5, schedule=schedule, warmup_steps=0)[0] == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_update_has_the_least_rate_and_none_lies_outside(schedule: str) -> None:
    for n in (2, 3, 7):
        for ratio in (0.0, 0.25, 1.0):
            got = rates(n, schedule=schedule, warmup_steps=0, min_lr_ratio=ratio)
            assert got[-1] == pytest.approx(2 * ratio)
            assert all(2 * ratio - 1e-12 <= rate <= 2 for rate in got)
            assert got == sorted(got, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("n", "warmup"), [(1, 0), (1, 10), (3, 3), (3, 10), (4, 3)])
def test_short_runs_have_a_rate_too(schedule: str, n: int, warmup: int) -> None:
    assert all(0 < rate <= 2 for rate in rates(n, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.0))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_past_the_end_it_stays_at_the_least(schedule: str) -> None:
    config = TrainConfig(lr=2.0, schedule=schedule, warmup_steps=1, min_lr_ratio=0.1)  # type: ignore[arg-type]
    assert lr_at(50, 10, config) == pytest.approx(0.2)
