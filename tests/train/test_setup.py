"""How a run's process is set up: what its heap keeps."""

import pytest
from tiny_runs import MakeConfig, Quiet

from minilora.fused import Keep
from minilora.train import ledger, setup
from minilora.train.loop import fine_tune


@pytest.mark.parametrize(
    ("keep", "checkpointing", "plentiful", "short"),
    [
        ((), False, False, False),
        ((), True, False, True),
        ((Keep.ALL, Keep.ALL), False, False, False),
        ((Keep.INPUT, Keep.ALL), False, False, True),
        ((Keep.WEIGHTS, Keep.WEIGHTS), False, True, False),
    ],
)
def test_the_heap_is_as_memory_is(
    make_config: MakeConfig,
    keep: tuple[Keep, ...],
    checkpointing: bool,
    plentiful: bool,
    short: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[tuple[bool, bool]]()
    monkeypatch.setattr(setup, "keep_freed_memory", lambda *how: asked.append(how))
    setup.settle_heap(make_config(train__activation_checkpointing=checkpointing).train, keep)
    assert asked == [(plentiful, short)]


def test_a_run_that_just_fits_leaves_no_holes_in_the_heap(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where less than half as much again as is predicted is free."""
    calls = list[tuple[bool, bool]]()
    monkeypatch.setattr(setup, "keep_freed_memory", lambda *asked: calls.append(asked))
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)  # else it moves between two predictions
    config, predicted = make_config(train__max_steps=1), 0.0
    for times, short in ((1.0, False), (1.51, False), (1.49, True)):
        monkeypatch.setattr(setup, "free_bytes", lambda _, free=times * predicted: free or 1e15)
        run = fine_tune(config, quiet, overwrite=True)
        predicted = float(sum(run.predicted_bytes.values()))
        [(large_pages, is_short)] = calls
        assert (is_short, large_pages and short) == (short, False), times
        calls.clear()
