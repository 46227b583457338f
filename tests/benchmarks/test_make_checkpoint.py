"""Random checkpoints: both layouts hold one model, its weights look like weights."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minilora
from benchmarks import make_checkpoint
from benchmarks.make_checkpoint import main, random_weights
from benchmarks.shapes import SHAPES, block_linear_parameters, qlora_step_flops, shape
from minilora.config import ModelConfig
from minilora.errors import UserError

Weights = Iterator[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("random")
    for layout in ("hf", "mistral"):
        assert main(["--shape", "tiny", "--layout", layout, str(home / layout)]) == 0
    return {layout: home / layout for layout in ("hf", "mistral")}


def test_both_layouts_load_to_equal_weights(folders: dict[str, Path]) -> None:
    hf, mistral = (minilora.load_model(folder).state_dict() for folder in folders.values())
    assert hf.keys() == mistral.keys()
    assert all(torch.equal(hf[name], mistral[name]) for name in hf)


def test_weights_are_normal_and_differ(folders: dict[str, Path]) -> None:
    weights = minilora.load_model(folders["hf"]).state_dict()
    assert all(bool((w == 1).all()) for w in weights.values() if w.dim() == 1)
    head = weights["lm_head.weight"].float()
    assert head.std() == pytest.approx(0.02, rel=0.1)
    assert float((head.abs() < head.std()).float().mean()) == pytest.approx(0.683, abs=0.01)
    assert not torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"])
    assert not torch.equal(weights["layers.0.mlp.gate_proj.weight"], weights["layers.1.mlp.gate_proj.weight"])
    down = weights["layers.0.mlp.down_proj.weight"].float()
    assert down.std() == pytest.approx(0.02 / 2, rel=0.1)


def test_the_seed_decides() -> None:
    def head(seed: int) -> torch.Tensor:
        return next(w.clone() for name, w in random_weights(SHAPES["tiny"], seed) if name == "lm_head.weight")

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


def test_a_target_that_stands_is_refused(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "tiny", str(folders["hf"])]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "exists already" in error


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "13b", str(tmp_path / "x")]) == 1
    assert "mistral-7b-v0.3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "x")])
    with pytest.raises(UserError):
        shape("13b")


def failed(capsys: pytest.CaptureFixture[str], says: str) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("make_checkpoint: ")
    assert says in error


@pytest.mark.parametrize("seed", ["99999999999999999999999", "-1", str(2**63), "x"])
def test_a_seed_that_torch_does_not_take_is_wrong_usage(seed: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--shape", "tiny", f"--seed={seed}", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_names_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "tiny", str(tmp_path / ("x" * 300))]) == 1
    failed(capsys, "File name too long")
    assert main(["--shape", "tiny", ""]) == 1
    failed(capsys, "is empty")
    assert main(["--shape", "tiny", "--tokenizer", str(tmp_path), str(tmp_path / "x")]) == 1
    failed(capsys, f"{tmp_path}: no regular file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(config: ModelConfig, seed: int) -> Weights:
        for i, weight in enumerate(random_weights(config, seed)):
            if i == 3:
                os.kill(os.getpid(), signum)
            yield weight

    monkeypatch.setattr(make_checkpoint, "random_weights", weights)
    assert main(["--shape", "tiny", str(tmp_path / "x")]) == 128 + signum
    failed(capsys, "x: stopped, nothing was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(config: ModelConfig, seed: int) -> Weights:
        yield next(random_weights(config, seed))
        raise error

    monkeypatch.setattr(make_checkpoint, "random_weights", weights)
    assert main(["--shape", "tiny", str(tmp_path / "x")]) == 1
    failed(capsys, "out of memory; take a smaller model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_standard_output_that_takes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.make_checkpoint", "--shape", "tiny"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, tmp_path / "x"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, tmp_path / "y"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_7b_has_the_official_sizes() -> None:
    assert block_linear_parameters(SHAPES["mistral-7b-v0.3"]) == 6_979_321_856


def test_flops_of_a_step_by_hand() -> None:
    """One layer of Mistral's 7B and its head, 2 x 8 tokens."""
    config = SHAPES["mistral-7b-v0.3"]
    linear = 4 * (6_979_321_856 + 32768 * 4096) * 16
    attention = 12 * 4 * 4096 * 32 * 16  # six products of 2 T/2 Dh for each of 32 heads and 32 layers
    assert qlora_step_flops(config, rows=2, length=8) == linear + attention


def test_flops_of_attention_under_a_window_are_those_of_the_keys_that_are_seen() -> None:
    config, length, window = shape("tiny"), 64, 16
    per_key = 6 * 2 * config.n_heads * config.head_dim * config.n_layers

    def keys(config: ModelConfig) -> float:
        without = 4 * (block_linear_parameters(config) + config.vocab_size * config.dim) * length
        return (qlora_step_flops(config, 1, length) - without) / per_key

    seen = sum(min(i + 1, window) for i in range(length))
    assert keys(replace(config, sliding_window=window)) == pytest.approx(seen, rel=0.01)  # the diagonal is half
    assert keys(config) == length**2 / 2
