"""A tiny random Mistral with the demo's tokenizer, small files of chats and text, and a short run's configuration."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minilora.adamw import FlatAdamW
from minilora.config import ModelConfig, RunConfig
from minilora.data.pack import PackedBatch
from minilora.model import Mistral
from minilora.train.step import Backward, LossScale, StepResult, backward_of, train_step

TOKENIZER = Path(__file__).parents[1] / "minilora" / "demo" / "base" / "tokenizer.model"
TINY = ModelConfig(
    dim=32, n_layers=2, head_dim=16, hidden_dim=48, n_heads=4, n_kv_heads=2, vocab_size=458, sliding_window=12
)


def tiny_model(seed: int = 0, config: ModelConfig = TINY) -> Mistral:
    """Random float32 weights, large enough that the logits are far from uniform."""
    model = Mistral(config)
    model.init_weights(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    return model.requires_grad_(False).eval()


def step_of(
    model: Mistral,
    optimizer: FlatAdamW,
    batches: Sequence[PackedBatch],
    lr: float = 1e-3,
    clip_norm: float = 0.0,
    loss_scale: LossScale | None = None,
    backward: Backward | None = None,
) -> StepResult:
    """`train_step`, by autograd and without a loss scale unless told otherwise."""
    backward, loss_scale = backward or backward_of(model, optimizer), loss_scale or LossScale.of(torch.float32)
    n_targets = sum(batch.n_targets for batch in batches)
    return train_step(backward, optimizer, batches, n_targets, lr, clip_norm, loss_scale)


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


MakeConfig = Callable[..., RunConfig]
Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], status: int, *words: str) -> None:
    """Of a `Run`: the exit status, and one line on stderr that has these words in it."""
    got, out, err = result
    assert got == status, (out, err)
    assert err.count("\n") == 1, err
    assert len(err) < 400, err
    for word in words:
        assert word in err


class Quiet:
    """A `Reporter` that remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.ended = False

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, step: int, n_steps: int) -> None:
        self.began = step, n_steps

    def step(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        assert timing["seconds"] > 0
        self.steps.append(metrics)

    def end(self) -> None:
        self.ended = True


def stop_after(step: int, quiet: Quiet, signum: int = signal.SIGTERM) -> Quiet:
    report = quiet.step

    def and_then(metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        report(metrics, timing)
        if metrics["step"] == step:
            os.kill(os.getpid(), signum)

    quiet.step = and_then  # type: ignore[method-assign]
    return quiet
