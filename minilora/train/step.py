"""One optimizer step over several micro-batches, with the token-exact loss.

    loss = (sum of target-token losses in all micro-batches) / (number of target tokens in all micro-batches)

Each micro-batch's sum is divided by the step's count before backward, so 1 batch of 8 rows and 8 batches of 1 give the
same gradients; a mean of means would weigh a token by the company it came in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from minilora.adamw import FlatAdamW
from minilora.data.pack import PackedBatch
from minilora.loss import cross_entropy_sum
from minilora.model import Mistral

LEAST_SCALE = 2.0**-14


@dataclass(frozen=True)
class StepResult:
    """What a step did: mean loss of its target tokens, length of the gradient before clipping, whether it updated."""

    loss: float
    grad_norm: float
    updated: bool


@dataclass
class LossScale:
    """float16 holds nothing below 6e-8: the loss is multiplied by `scale` before backward and the gradients divided.

    An overflow halves the scale and the step is left out; `patience` good steps double it. Off (scale 1) elsewhere.
    """

    enabled: bool
    scale: float = 1.0
    good_steps: int = 0
    patience: int = 1000

    def __post_init__(self) -> None:
        if self.enabled and self.scale == 1.0:
            self.scale = 2.0**16

    @property
    def shrinking(self) -> bool:
        """Whether an overflow may still be the scale's fault."""
        return self.enabled and self.scale > LEAST_SCALE

    def update(self, overflowed: bool) -> None:
        if not self.enabled:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale = max(self.scale / 2, LEAST_SCALE)
        elif self.good_steps >= self.patience:
            self.scale, self.good_steps = self.scale * 2, 0


def loss_sum(model: Mistral, batch: PackedBatch) -> Tensor:
    """Summed loss of a packed batch's target tokens, () float32."""
    batch = batch.to(model.device)
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments)
    return cross_entropy_sum(hidden, model.lm_head.weight, batch.labels)


def train_step(
    model: Mistral,
    optimizer: FlatAdamW,
    batches: Sequence[PackedBatch],
    lr: float,
    clip_norm: float,
    loss_scale: LossScale,
    after_forward: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward, guard, update, which clips. Where loss or gradient is not finite, nothing is changed.

    after_forward is called when a micro-batch's activations are all alive: the moment of most memory.
    """
    n_targets = sum(batch.n_targets for batch in batches)
    optimizer.zero_grad()
    total = torch.zeros((), device=model.device)
    for batch in batches:
        loss = loss_sum(model, batch) / n_targets
        after_forward()
        (loss * loss_scale.scale).backward()
        total += loss.detach()
    mean_loss, scaled_norm = torch.stack((total, optimizer.grad_norm())).tolist()  # the one wait for a GPU
    norm = scaled_norm / loss_scale.scale
    finite = isfinite(mean_loss) and isfinite(norm)
    if finite:
        clip = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        optimizer.step(lr, clip / loss_scale.scale)
    loss_scale.update(overflowed=not isfinite(norm))
    return StepResult(mean_loss, norm, finite)
