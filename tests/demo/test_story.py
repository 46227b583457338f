"""The demo from end to end, short, on little data: .ci/run tells the whole story and checks its figures."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import Quiet, Run, stop_after

from minilora.demo import story
from minilora.errors import UserError
from minilora.toml import config_toml
from minilora.train.run_folder import LOCK
from minilora.train.signals import Stopped


def tell(folder: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int = 6) -> None:
    """The story with a short run."""
    whole = story.demo_config

    def short(output: Path, seed: int) -> Any:
        config = whole(output, seed)
        return replace(config, train=replace(config.train, max_steps=n_steps, warmup_steps=1))

    with monkeypatch.context() as patch:
        patch.setattr(story, "demo_config", short)
        story.tell(folder, seed=0, console=Console(width=100))


def short_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    tell(folder, monkeypatch)
    shown = capsys.readouterr().out
    for title in ("Memory at rest", "QLoRA", "After", "exact match", "merge", "report"):
        assert title in shown
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.slow
@pytest.mark.usefixtures("little_demo_data")
def test_the_story_is_told_and_the_same_seed_gives_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = short_demo(tmp_path / "first", monkeypatch, capsys)
    second = short_demo(tmp_path / "second", monkeypatch, capsys)
    for name in ("before", "after", "ceiling", "merge"):
        assert first[name] == second[name]
    assert first["before"].keys() >= {"exact_match", "phoneme_error_rate", "own_text_perplexity", "loss"}
    assert first["after"]["loss"] < first["before"]["loss"]
    page = (tmp_path / "first" / "report.html").read_text("utf-8")
    assert "measured on the validation data; exact match and phoneme error rate on the demo&#x27;s test words" in page
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files >= {"config.toml", "metrics.jsonl", "timing.jsonl", "summary.json", "samples.md", "report.html"}
    assert files >= {"adapter", "merged", "checkpoints"}


@pytest.mark.slow
@pytest.mark.usefixtures("little_demo_data")
def test_a_stopped_demo_says_what_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    output = tmp_path / "demo"
    monkeypatch.setattr(story, "ConsoleReporter", lambda _: stop_after(1, Quiet()))
    with pytest.raises(Stopped, match=f"^{output}: stopped, saved; minilora train .* trains on, without") as stopped:
        tell(output, monkeypatch, n_steps=2)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    words = re.findall(r"minilora (train \S+ --resume)", str(stopped.value))[0].split()
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    assert "going on after step 1" in out
    assert (output / "report.html").exists()


def test_a_folder_that_cannot_be_had_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "open_checkpoint", lambda _: pytest.fail("the base is opened"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"^{output}: cannot write here: .*; name another --output$"):
            story.tell(output, seed=0, console=Console())


def test_a_demo_is_known_from_a_run_like_it(tmp_path: Path) -> None:
    output, config = tmp_path / "mine", story.demo_config(tmp_path / "x", seed=3)
    output.mkdir()
    story.refuse_other_run(output)
    (output / LOCK).touch()
    story.refuse_other_run(output)  # stopped before its run
    (output / "config.toml").write_text(config_toml(config))
    story.refuse_other_run(output)  # stopped
    (output / "summary.json").write_text('{"ceiling": {}}')
    story.refuse_other_run(output)  # done, maybe by another version
    (output / "summary.json").write_text('{"after": {}}')
    story.refuse_other_run(output)  # stopped after its training
    (output / "report.html").touch()
    with pytest.raises(UserError, match=r"mine holds something other than a demo; name another folder with --output"):
        story.refuse_other_run(output)  # `minilora train` with the demo's configuration
    for name in ("summary.json", "report.html"):
        (output / name).unlink()
    (output / "config.toml").write_text(config_toml(replace(config, lora=replace(config.lora, rank=8))))
    with pytest.raises(UserError, match="other than a demo"):
        story.refuse_other_run(output)
