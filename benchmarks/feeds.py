"""What both sides are fed: the same tokens, as each of them likes them best.

A feed is a JSON object, so that a contestant's process can make it anew:

    {"rows": 4, "length": 256, "vocab_size": V}            random tokens, each of them a target
    {"samples": FILE, "steps": [[3, 17], [4]], ...}        real samples by index, those of each step together
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, make_batch
from minilora.visible import Runs

Feed = Mapping[str, Any]


def packed_batches(feed: Feed) -> list[PackedBatch]:
    """Ours: one batch a step, samples side by side in one row of `max_seq_len`, as the trainer packs them."""
    if "samples" not in feed:
        return [random_batch(feed["rows"], feed["length"], feed["vocab_size"])]
    samples = load_samples(feed["samples"])
    return [make_batch(samples, [step], feed["max_seq_len"]) for step in feed["steps"]]


def peer_batches(feed: Feed, form: str) -> list[dict[str, Tensor]]:
    """The same for transformers: keyword arguments of a MistralForCausalLM, one dict a step.

    form: "rows" the tensors as ours are; "flat" the samples of a step end to end without any padding, positions
        beginning anew, which is padding-free training (DataCollatorWithFlattening); "padded" a row each, filled up to
        the longest

    The labels are given as `shift_labels`, shifted already, so that every side has the same targets.
    """
    if form == "rows":
        return [_arguments(batch) for batch in packed_batches(feed)]
    samples = load_samples(feed["samples"])
    if form == "flat":
        flat = [make_batch(samples, [step], _positions(samples, step)) for step in feed["steps"]]
        return [_arguments(batch) for batch in flat]
    return [_padded([samples[i] for i in step]) for step in feed["steps"]]


def tokens_of_steps(feed: Feed) -> list[int]:
    """Real tokens (positions that are no padding) of each step."""
    if "samples" not in feed:
        return [feed["rows"] * feed["length"]]
    samples = load_samples(feed["samples"])
    return [_positions(samples, step) for step in feed["steps"]]


def random_batch(rows: int, length: int, vocab_size: int) -> PackedBatch:
    """(rows, length) random tokens, the next one the label of each."""
    drawn = torch.from_numpy(np.random.default_rng(0).integers(10, vocab_size, (rows, length + 1)))
    positions = torch.arange(length).repeat(rows, 1)
    segments = torch.zeros(rows, length, dtype=torch.int32)
    tokens, labels = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    return PackedBatch(tokens, labels, positions, segments, Runs.of_rows(rows, length))


def save_samples(samples: Sequence[Sample], file: Path) -> None:
    """All samples end to end in one .npz."""
    np.savez(
        file,
        tokens=np.concatenate([sample.tokens for sample in samples]),
        targets=np.concatenate([sample.target_mask for sample in samples]),
        ends=np.cumsum([len(sample.tokens) for sample in samples]),
    )


def load_samples(file: str | Path) -> list[Sample]:
    """What `save_samples` wrote."""
    with np.load(file) as arrays:
        ends = arrays["ends"][:-1]
        tokens, targets = np.split(arrays["tokens"], ends), np.split(arrays["targets"], ends)
    return [Sample(t, m, str(i)) for i, (t, m) in enumerate(zip(tokens, targets, strict=True))]


def _positions(samples: Sequence[Sample], step: Sequence[int]) -> int:
    return sum(samples[i].length for i in step)


def _arguments(batch: PackedBatch) -> dict[str, Tensor]:
    labels = batch.labels
    return {"input_ids": batch.tokens, "labels": labels, "shift_labels": labels, "position_ids": batch.positions}


def _padded(samples: list[Sample]) -> dict[str, Tensor]:
    """A row each, padded on the right; the mask says what is real."""
    longest = max(sample.length for sample in samples)
    arguments = _arguments(make_batch(samples, [[i] for i in range(len(samples))], longest))
    real = torch.tensor([sample.length for sample in samples])[:, None] > torch.arange(longest)
    return arguments | {"attention_mask": real.long(), "position_ids": torch.arange(longest).repeat(len(samples), 1)}
