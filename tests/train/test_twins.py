"""A run against its interrupted twin: equal as they come, and told where they are not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import MakeConfig, Quiet

from minilora.cli import main
from minilora.errors import UserError
from minilora.train import twins
from minilora.train.run_folder import config_toml
from minilora.train.twins import compare_twins

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["qlora", "partial"])
def test_twins_leave_the_same_bytes(strategy: str, make_config: MakeConfig) -> None:
    """Dropout, accumulation and validation are on."""
    config = make_config(
        train__strategy=strategy, train__layers=1 if strategy == "partial" else None, train__accumulate=2,
        lora__dropout=0.1, eval__every=100,
    )  # fmt: skip
    quiet = Quiet()
    assert (
        compare_twins(config, 6, quiet) == "6 steps, and 6 interrupted after 3: figures and weights are the same bytes"
    )
    assert [step["step"] for step in quiet.steps] == [1, 2, 3, 4, 5, 6, 1, 2, 3]  # the others in a process of their own
    assert any("stopped after step 3" in said for said in quiet.said)
    assert not Path(config.train.output).exists()


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
    resume = twins._resume

    def and_spoil(folder: Path) -> None:
        resume(folder)
        spoil(folder)

    monkeypatch.setattr(twins, "_resume", and_spoil)
    with pytest.raises(UserError, match="please report this bug") as told:
        compare_twins(make_config(), 4, Quiet())
    assert words in str(told.value)


def test_on_a_gpu_twins_may_be_as_far_apart_as_any_two_runs(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a second whole run says how far that is."""
    distances = iter([3e-6, 1e-6, 5e-6, 1e-6])  # of the twins, and of two whole runs
    monkeypatch.setattr(twins, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(twins, "_apart", lambda *_: next(distances))
    monkeypatch.setattr(twins, "_bytes", lambda config: config.train.output)
    assert compare_twins(make_config(), 2, quiet := Quiet()).endswith(
        "weights lie 3e-06 apart, and those of two whole runs 1e-06, by chance"
    )
    assert [step["step"] for step in quiet.steps] == [1, 2, 1, 1, 2]
    with pytest.raises(UserError, match="lie 5e-06 apart, two whole runs 1e-06: please report this bug"):
        compare_twins(make_config(), 2, Quiet())


def test_a_run_that_cannot_be_resumed_says_why(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train = twins.fine_tune

    def and_remove(*args: object, **kwargs: bool) -> None:
        try:
            train(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            for checkpoint in Path(args[0].train.output).glob("checkpoints/*/*"):  # type: ignore[attr-defined]
                checkpoint.write_text("spoilt")

    monkeypatch.setattr(twins, "fine_tune", and_remove)
    with pytest.raises(UserError, match="the run could not be resumed: minilora train: ") as told:
        compare_twins(make_config(), 2, Quiet())
    assert "\n" not in str(told.value)


def test_the_verb(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text(config_toml(make_config()))
    assert main(["verify", "resume", str(file), "--steps", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "2 steps, and 2 interrupted after 1: figures and weights are the same bytes"
    with pytest.raises(SystemExit) as usage:
        main(["verify", "resume", str(file), "--steps", "1"])  # which has no middle
    assert usage.value.code == 2
    assert "see minilora verify resume --help" in capsys.readouterr().err
