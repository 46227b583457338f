"""Does the run fit? What it will need, by owner, before a weight is loaded, and which settings would make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, cast

import torch

from minilora.attention import causal_runs
from minilora.backend import pick_dtype
from minilora.config import ModelConfig, RunConfig
from minilora.data.pack import PackedBatch
from minilora.errors import UserError
from minilora.memory import DenseDtype, StepPlan, private_bytes

LEAST_LENGTH = 64  # shorter rows are not advised


@dataclass(frozen=True)
class Ledger:
    """The memory of a run. sample: its first micro-batch, which the others are like; longest: positions of a sample."""

    config: RunConfig
    sizes: ModelConfig
    device: torch.device
    sample: PackedBatch
    longest: int

    def predict(self) -> dict[str, int]:
        """Bytes by owner when they are most; on a CPU with what the process holds already."""
        model, train, length, sample = self.config.model, self.config.train, self.config.data.max_seq_len, self.sample
        full, on_cpu = train.strategy == "full", self.device.type == "cpu"
        dtype = torch.float32 if full else pick_dtype(self.device, model.dtype)[0]
        dense = cast(DenseDtype, str(dtype).removeprefix("torch."))
        runs = causal_runs(sample.positions, self.sizes.sliding_window, sample.segments) if on_cpu else None
        plan = StepPlan(
            self.sizes,
            storage=dense if not self.config.quantize else "nf4 double-quantized" if model.double_quant else "nf4",
            dtype=dense,
            lora=None if full else self.config.lora,
            rows=train.batch_size,
            length=length,
            targets=round(train.batch_size * length * sample.n_targets / sample.tokens.numel()),
            sees="mask" if runs is None else "rows" if len(set(runs)) == 1 else "runs",
            checkpointing=train.activation_checkpointing,
            accumulated=train.accumulate > 1,
            device=self.device,
        )
        return ({"process": private_bytes()} if on_cpu else {}) | plan.predict()

    def check(self) -> dict[str, int]:
        """The prediction. Raises UserError if it does not fit, with the mildest form of each setting that is enough."""
        predicted, free = self.predict(), free_bytes(self.device)
        if sum(predicted.values()) <= free:
            return predicted
        enough, strongest, together = dict[str, str](), dict[str, str](), self
        for key, value, changes in self._smaller():
            total = self._with(changes)._total()
            if total <= free:
                enough.setdefault(key, f"{key} {value} ({as_text(total)})")
            strongest[key], together = f"{key} {value}", together._with(changes)
        advice = f"it fits with {', or with '.join(enough.values())}"
        if not enough:
            too_much = "" if together._total() <= free else ", too much still: take a smaller model"
            advice = f"even {', '.join(strongest.values()) or 'this'} comes to {as_text(together._total())}{too_much}"
        raise UserError(f"the run needs {as_text(self._total())} of memory, {as_text(free)} are free: {advice}")

    def _smaller(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Settings that need less memory, the mildest form of each first: key, value, what changes in its sections."""
        train, length = self.config.train, self.config.data.max_seq_len
        if not train.activation_checkpointing:
            yield "train.activation_checkpointing", "true", {"train": {"activation_checkpointing": True}}
        for n in (n for n in range(train.batch_size - 1, 0, -1) if train.batch_size % n == 0):
            accumulate = train.accumulate * train.batch_size // n
            changes = {"train": {"batch_size": n, "accumulate": accumulate}}
            yield "train.batch_size", f"{n} and train.accumulate {accumulate}", changes
        while (length := length // 2) >= max(self.longest, LEAST_LENGTH):
            yield "data.max_seq_len", str(length), {"data": {"max_seq_len": length}}
        if train.strategy != "full" and pick_dtype(self.device, self.config.model.dtype)[0] == torch.float32:
            yield "model.dtype", "bfloat16", {"model": {"dtype": "bfloat16"}}
        if not self.config.quantize:
            yield "train.strategy", "qlora", {"model": {"quantize": "auto"}, "train": {"strategy": "qlora"}}

    def _with(self, changes: dict[str, Any]) -> "Ledger":
        new = {section: replace(getattr(self.config, section), **values) for section, values in changes.items()}
        return replace(self, config=replace(self.config, **new))

    def _total(self) -> int:
        return sum(self.predict().values())


def free_bytes(device: torch.device) -> float:
    """What a run can have: a GPU's free memory; on a CPU what is available, and what this process has of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return available[0] + private_bytes() if available else inf


def as_text(n_bytes: float) -> str:
    """In GB (1e9 bytes), small numbers in MB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
