"""The learning rate of an update: a straight rise over the warm-up, then cosine, a straight fall, or nothing.

rise(u) = (u + 1) / warmup                  u < warmup; so the first update already learns
fall(p) = r + (1 - r) * shape(p)            p from 0 to 1 over the other updates (of one: 0), r = min_lr_ratio
shape   = (1 + cos(pi p)) / 2 | 1 - p | 1
"""

from math import cos, pi

from minilora.config import TrainConfig


def too_short(n_updates: int, config: TrainConfig) -> str:
    """What is to be said of a run that its warm-up outlasts; nothing of others."""
    if n_updates >= config.warmup_steps:
        return ""
    told_of = f"warm-up takes {config.warmup_steps} steps, the run has {n_updates}"
    return f"{told_of}: train.lr is never reached; lower train.warmup_steps, or train longer"


def lr_at(update: int, n_updates: int, config: TrainConfig) -> float:
    """The learning rate of the `update`-th (from 0) of n_updates updates."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (update - config.warmup_steps) / max(1, n_updates - config.warmup_steps - 1)
    shape = (1 + cos(pi * min(1.0, done))) / 2 if config.schedule == "cosine" else 1 - min(1.0, done)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
