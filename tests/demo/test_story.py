"""The demo from end to end, short, on little data: .ci/run tells the whole story and checks its figures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minilora.demo import story
from minilora.errors import UserError
from minilora.toml import config_toml


def short_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    whole = story.demo_config

    def short(output: Path, seed: int) -> Any:
        config = whole(output, seed)
        return replace(config, train=replace(config.train, max_steps=6, warmup_steps=1))

    monkeypatch.setattr(story, "demo_config", short)
    story.tell(folder, seed=0, console=Console(width=100))
    monkeypatch.setattr(story, "demo_config", whole)
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
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files >= {"config.toml", "metrics.jsonl", "timing.jsonl", "summary.json", "samples.md", "report.html"}
    assert files >= {"adapter", "merged", "checkpoints"}


def test_a_demo_is_known_from_a_run_like_it(tmp_path: Path) -> None:
    output, config = tmp_path / "mine", story.demo_config(tmp_path / "x", seed=3)
    output.mkdir()
    story.refuse_other_run(output)
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
