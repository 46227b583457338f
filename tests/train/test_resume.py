"""Real processes, killed: whatever moment a run is cut off at, resumed it ends with the same bytes.

Dropout, accumulation, several epochs, validation and the best checkpoint are all on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import MakeConfig

from minilora.cli import main
from minilora.config import RunConfig
from minilora.errors import UserError
from minilora.toml import config_toml
from minilora.train.run_folder import RunFolder

pytestmark = pytest.mark.slow
N_STEPS = 24


def run_config(make_config: MakeConfig, output: Path) -> RunConfig:
    return make_config(
        lora__dropout=0.1, train__output=str(output), train__max_steps=N_STEPS, train__accumulate=2,
        train__checkpoint_every=4, train__lr=3e-2, eval__every=3, eval__answers=0, eval__samples=1,
    )  # fmt: skip


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minilora", "train", str(folder.with_suffix(".toml")), *flags]
    warnings = "error::UserWarning,ignore:CUDA initialization:UserWarning"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def prepare(make_config: MakeConfig, folder: Path) -> Path:
    folder.with_suffix(".toml").write_text(config_toml(run_config(make_config, folder)))
    return folder


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Look often: a moment may be a few milliseconds long. An impatient reader would take the run's own time."""
    ends = time.monotonic() + 300
    while not happened():
        if process.poll() is not None:
            _, errors = process.communicate()
            pytest.fail(f"the run ended before the moment came: {errors}")
        if time.monotonic() > ends:
            process.kill()
            process.communicate()
            pytest.fail("the moment never came")
        time.sleep(0.001)


def stop(process: subprocess.Popen[str], signum: int) -> tuple[int, str]:
    """Exit status and stderr."""
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def finish(folder: Path, *flags: str) -> None:
    """Here: nobody kills it."""
    assert main(["train", str(folder.with_suffix(".toml")), *flags]) == 0


def lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".*.minilora-tmp-*"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first test that runs: the folder of the run that nobody interrupts."""
    return {"root": tmp_path_factory.mktemp("straight")}


@pytest.fixture
def expected(straight: dict[str, Path], make_config: MakeConfig) -> Path:
    if "folder" not in straight:
        straight["folder"] = prepare(make_config, straight["root"] / "run")
        finish(straight["folder"])
    return straight["folder"]


def assert_same(folder: Path, expected: Path) -> None:
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "before.json", "samples.md"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert lines(folder) == lines(expected) == N_STEPS
    kept = [sorted(c.name for c in (path / "checkpoints").iterdir()) for path in (folder, expected)]
    assert kept[0] == kept[1]
    assert (folder / "report.html").exists()


def test_killed_at_any_moment_it_goes_on_to_the_same_end(
    make_config: MakeConfig, tmp_path: Path, expected: Path
) -> None:
    folder = prepare(make_config, tmp_path / "run")
    moments: list[Callable[[], bool]] = [
        lambda: lines(folder) >= 6,  # between two checkpoints
        lambda: lines(folder) >= 10 and saving(folder),
    ]
    for i, moment in enumerate(moments):
        process = start(folder, *(["--resume"] if i else []))
        wait_for(process, moment)
        status, _ = stop(process, signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert not (folder / "adapter").exists()
    finish(folder, "--resume")
    assert_same(folder, expected)
    assert not list(folder.rglob(".*.minilora-tmp-*")), "what the killed ones left is gone"


def test_sigterm_and_sigint_save_and_stop(make_config: MakeConfig, tmp_path: Path, expected: Path) -> None:
    folder = prepare(make_config, tmp_path / "run")
    process = start(folder)
    wait_for(process, lambda: lines(folder) >= 6)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=f"{folder}: another run writes here"):
        RunFolder(run_config(make_config, folder), resume=True, overwrite=False)
    process.send_signal(signal.SIGCONT)
    status, errors = stop(process, signal.SIGTERM)
    assert status == 143, errors
    assert f"{folder}: stopped after step {lines(folder)}, saved; go on with --resume" in errors
    assert errors.count("\n") == 1

    seen = lines(folder)
    process = start(folder, "--resume")
    wait_for(process, lambda: lines(folder) >= seen + 3)
    status, errors = stop(process, signal.SIGINT)
    assert status == 130, errors
    assert "stopped after step" in errors
    finish(folder, "--resume")
    assert_same(folder, expected)
