"""A run against its interrupted twin: equal as they come, and told where they are not."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from tiny_runs import MakeConfig

from minilora.cli import main
from minilora.config import RunConfig
from minilora.errors import UserError
from minilora.toml import config_toml
from minilora.train import twins
from minilora.train.signals import Stopped
from minilora.train.twins import compare_twins

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["qlora", "partial"])
def test_twins_leave_the_same_bytes(
    strategy: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, accumulation and validation are on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = make_config(
        train__strategy=strategy, train__layers=1 if strategy == "partial" else None, train__accumulate=2,
        lora__dropout=0.1, eval__every=100,
    )  # fmt: skip
    said: list[str] = []
    found = compare_twins(config, 6, said.append, "my.toml")
    assert found == "6 steps, and 6 interrupted after 3: figures and weights are the same bytes"
    first = "a run of 6 steps of my.toml on cpu; set for the check: eval.every 2, eval.answers 0, eval.samples 0 ..."
    assert said == [first, "its twin, stopped after step 3 ...", "and resumed ..."]
    assert not Path(config.train.output).exists()
    assert not [*tmp_path.glob("minilora-verify-*")]


def spoil_line(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1].replace("4", "5")]) + "\n")


def spoil_weights(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))  # a bit of the last number's exponent


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(spoil_line, 'the whole one has {"step": 4'), (spoil_weights, "the runs' weights differ by up to")],
)
def test_twins_that_differ(
    spoil: Callable[[Path], None], words: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twins.in_a_process

    def and_spoil(config: RunConfig, resume: bool, stop_after: int) -> str | None:
        failed = run(config, resume, stop_after=stop_after)
        if resume:
            spoil(Path(config.train.output))
        return failed

    monkeypatch.setattr(twins, "in_a_process", and_spoil)
    with pytest.raises(UserError, match="please report this bug") as told:
        compare_twins(make_config(), 4, list[str]().append)
    assert words in str(told.value)


def test_on_a_gpu_twins_may_be_as_far_apart_as_any_two_runs(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a second whole run says how far that is."""
    runs, distances = list[tuple[str, bool, int]](), iter([3e-6, 1e-6, 5e-6, 1e-6])  # of the twins, of two whole runs
    monkeypatch.setattr(twins, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(twins, "_apart", lambda *_: next(distances))
    monkeypatch.setattr(twins, "_bytes", lambda config: config.train.output)
    monkeypatch.setattr(
        twins,
        "in_a_process",
        lambda c, resume, stop_after: runs.append((Path(c.train.output).name, resume, stop_after)),
    )
    said: list[str] = []
    assert compare_twins(make_config(data__test="test.jsonl"), 2, said.append).endswith(
        "weights lie 3e-06 apart, and those of two whole runs 1e-06, by chance"
    )
    changed = "data.test unset, eval.every 1, eval.answers 0, eval.samples 0"
    assert said[0] == f"a run of 2 steps of a configuration on cuda; set for the check: {changed} ..."
    assert runs == [("whole", False, 0), ("twin", False, 1), ("twin", True, 0), ("again", False, 0)]
    with pytest.raises(UserError, match="lie 5e-06 apart, two whole runs 1e-06: please report this bug"):
        compare_twins(make_config(), 2, said.append)


def test_a_run_that_fails_says_why(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such"):
        compare_twins(make_config(model__path="nowhere"), 2, list[str]().append)


def n_lines(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def signal_after_a_step(metrics: Path, before: int) -> None:
    """Once it has more lines than before."""
    ends = time.monotonic() + 120
    while n_lines(metrics) <= before:
        if time.monotonic() > ends:
            return
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_signal_ends_it_and_nothing_is_left(
    at: int, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever of its runs it comes, also the one that is stopped in any case."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: list[str] = []

    def say(text: str) -> None:
        started.append(text)
        if len(started) == at:
            [folder] = tmp_path.glob("minilora-verify-*")
            metrics = folder / ("whole" if at == 1 else "twin") / "metrics.jsonl"
            Thread(target=signal_after_a_step, args=[metrics, n_lines(metrics)], daemon=True).start()

    with pytest.raises(Stopped, match="stopped; nothing was kept") as stopped:
        compare_twins(make_config(), 100, say)
    assert (stopped.value.exit_status, len(started)) == (128 + signal.SIGTERM, at)
    assert not [*tmp_path.glob("minilora-verify-*")]


def refuse(config: RunConfig) -> None:
    raise UserError(f"no run here on {Path(config.data.train).name}")  # type: ignore[arg-type]


def test_the_verb(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(config_toml(make_config()))
    assert main(["verify", "resume", str(file), "--steps", "2"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"a run of 2 steps of {file} on cpu; set for the check: eval.every 1, ")
    assert last == "2 steps, and 2 interrupted after 1: figures and weights are the same bytes"
    monkeypatch.setattr(twins, "_run", refuse)
    for more, named in (([], ""), ([str(file), "--data.train", ""], f" and {file}")):
        assert main(["verify", "resume", *more]) == 1
        told = capsys.readouterr()
        assert told.out.startswith(f"a run of 6 steps of the demo's configuration{named} on ")
        assert "no run here on chat_train.jsonl" in told.err
    assert main(["verify", "--model.device", "cpu", "resume"]) == 2
    assert "name resume first" in capsys.readouterr().err
    assert main(["verify", "resume", str(file), "--steps", "1"]) == 2  # which has no middle
    assert "see minilora verify resume --help" in capsys.readouterr().err
