"""How many steps a run has, and the learning rate of each update: a straight rise over the warm-up, then cosine, a
straight fall, or nothing.

rise(u) = (u + 1) / warmup                  u < warmup; so the first update already learns
fall(p) = r + (1 - r) * shape(p)            p from 0 to 1 over the other updates (of one: 0), r = min_lr_ratio
shape   = (1 + cos(pi p)) / 2 | 1 - p | 1
"""

from collections.abc import Sequence
from math import ceil, cos, pi

from minilora.config import RunConfig, TrainConfig
from minilora.data.pack import Mix, epoch_rows


def too_short(n_updates: int, config: TrainConfig) -> str:
    """The warning of a run that its warm-up outlasts; "" of others."""
    if n_updates >= config.warmup_steps:
        return ""
    fact = f"warm-up takes {config.warmup_steps} steps, the run has {n_updates}"
    return f"{fact}: train.lr is never reached; lower train.warmup_steps, or train longer"


def lr_at(update: int, n_updates: int, config: TrainConfig) -> float:
    """The learning rate of the `update`-th (from 0) of n_updates updates."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (update - config.warmup_steps) / max(1, n_updates - config.warmup_steps - 1)
    shape = (1 + cos(pi * min(1.0, done))) / 2 if config.schedule == "cosine" else 1 - min(1.0, done)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def steps_of_run(lengths: Sequence[int], config: RunConfig, mix: Mix | None) -> int:
    """Optimizer steps: `train.max_steps`, or as many as the rows of `train.epochs` fill, and a part of one."""
    train, whole = config.train, int(config.train.epochs)

    def rows(epoch: int) -> int:  # each epoch packs anew, into a few rows more or less
        return len(epoch_rows(lengths, config.data.max_seq_len, train.seed, epoch, mix=mix))

    if train.max_steps:
        return train.max_steps
    part = train.epochs - whole
    n_rows = sum(map(rows, range(whole))) + (part * rows(whole) if part else 0)
    return max(1, ceil(n_rows / (train.batch_size * train.accumulate) - 1e-9))  # a sum's rounding is no step
