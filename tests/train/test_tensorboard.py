"""What TensorBoard is told, read back by its own reader."""

from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import MakeConfig, Quiet

from minilora.errors import UserError
from minilora.train.loop import fine_tune
from minilora.train.tensorboard import scalars


def steps_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_figures_of_each_step_also_after_a_resume(make_config: MakeConfig, quiet: Quiet) -> None:
    config = make_config(train__tensorboard=True, train__max_steps=5, train__checkpoint_every=2)
    run = fine_tune(config, quiet)
    board, losses = run.folder.path / "tensorboard", [(m["step"], m["loss"]) for m in quiet.steps]
    assert dict(steps_of(board, "loss")) == pytest.approx(dict(losses))
    assert [step for step, _ in steps_of(board, "val_loss")] == [2, 4, 5]
    assert len(steps_of(board, "tok_per_s")) == len(steps_of(board, "lr")) == 5

    run.folder.checkpoint("step", 5).rename(run.folder.path / "lost")  # as if it had been killed after step 4 was saved
    quiet.steps.clear()
    fine_tune(config, quiet, resume=True)
    assert [m["step"] for m in quiet.steps] == [5]
    assert [step for step, _ in steps_of(board, "loss")] == [1, 2, 3, 4, 5], "no step stands there twice"


def test_it_is_no_part_of_what_a_resume_depends_on(make_config: MakeConfig, quiet: Quiet) -> None:
    config = make_config(train__checkpoint_every=2)
    path = fine_tune(config, quiet).folder.path
    assert not (path / "tensorboard").exists()
    fine_tune(replace(config, train=replace(config.train, tensorboard=True)), quiet, resume=True)


def test_without_the_library_nothing_begins(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilora.errors.find_spec", lambda name: None if name == "tensorboard" else object())
    with pytest.raises(UserError, match=r"train\.tensorboard needs tensorboard.*minilora\[tensorboard\]"):
        fine_tune(make_config(train__tensorboard=True), quiet)


def test_a_disk_that_is_full_from_the_start_ends_the_logging_alone(tmp_path: Path) -> None:
    said = list[str]()
    (tmp_path / "board").write_text("in the way")
    with scalars(tmp_path / "board", 1, said.append) as log:
        log({"step": 1, "loss": 1.0})
    assert len(said) == 1
    assert said[0].endswith("training goes on without TensorBoard")


def test_a_disk_that_fails_ends_the_logging_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    said = list[str]()
    with scalars(tmp_path / "board", 1, said.append) as log:
        log({"step": 1, "loss": 1.0, "skipped": True, "samples": ["a"]})
        monkeypatch.setattr(SummaryWriter, "flush", full)
        log({"step": 2, "loss": 2.0})
        log({"step": 3, "loss": 3.0})
    assert len(said) == 1
    assert "No space left on device; training goes on" in said[0]
    assert steps_of(tmp_path / "board", "loss")[0] == (1, 1.0)
