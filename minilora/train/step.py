"""One optimizer step over several micro-batches, with the token-exact loss.

    loss = (sum of target-token losses in all micro-batches) / (number of target tokens in all micro-batches)

Each micro-batch's sum is divided by the step's count before backward, so 1 batch of 8 rows and 8 batches of 1 give the
same gradients; a mean of means would weigh a token by the company it came in.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from minilora.adamw import FlatAdamW
from minilora.ahead import Ahead
from minilora.backend import product_dtype_of
from minilora.data.pack import PackedBatch
from minilora.evaluate.perplexity import loss_sum
from minilora.fast_block import FusedBlock
from minilora.model import Mistral

FIRST_SCALE, LEAST_SCALE = 2.0**16, 2.0**-14


@dataclass(frozen=True)
class StepResult:
    """What a step did: mean loss of its target tokens, length of the gradient before clipping, whether it updated."""

    loss: float
    grad_norm: float
    updated: bool


@dataclass
class LossScale:
    """float16 holds nothing below 6e-8: the loss is multiplied by `scale` before backward and the gradients divided.

    An overflow halves the scale and the step is left out; `patience` good steps double it. Elsewhere it is off, and 1.
    """

    enabled: bool
    scale: float
    good_steps: int = 0
    patience: int = 1000

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        """The one that a run in `dtype` begins with."""
        return cls(True, FIRST_SCALE) if dtype == torch.float16 else cls(False, 1.0)

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


# A batch and a factor -> its summed loss times the factor, () float32, whose gradients have been added up.
Backward = Callable[[PackedBatch, float | Tensor], Tensor]


def backward_of(
    model: Mistral, optimizer: FlatAdamW, after_forward: Callable[[], None] = lambda: None, ahead: Ahead | None = None
) -> Backward:
    """Forward and backward as autograd does it. `graph.py` has the other way.

    after_forward is called when a micro-batch's activations are all alive: the moment of most memory
    ahead: decodes frozen weights ahead of their use
    """

    multiplied = product_dtype_of(model.dtype, model.device)
    reads_casts = any(isinstance(block, FusedBlock) for block in model.layers)  # projections.py does, nobody else

    def both(batch: PackedBatch, factor: float | Tensor) -> Tensor:
        with optimizer.casts(multiplied) if reads_casts else nullcontext(), ahead.step() if ahead else nullcontext():
            loss = loss_sum(model, batch.to(model.device)) * factor
            after_forward()
            loss.backward()
        return loss.detach()

    return both


def train_step(
    backward: Backward,
    optimizer: FlatAdamW,
    batches: Iterable[PackedBatch],
    n_targets: int,
    lr: float,
    clip_norm: float,
    loss_scale: LossScale,
) -> StepResult:
    """Forward, backward, guard, update, which clips. Where loss or gradient is not finite, nothing is changed.

    batches: the micro-batches, gone over once, so that they can be made one by one
    n_targets: target tokens of all of them together
    clip_norm: the gradient is shortened to this length where it is longer; 0 leaves it

    Raises ValueError where no token is a target.
    """
    if n_targets == 0:
        raise ValueError("there is no token to train on: every label is IGNORE")
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        total = total + backward(batch, loss_scale.scale / n_targets)  # on the device of the losses
    loss, norm = (torch.stack((total, optimizer.grad_norm())) / loss_scale.scale).tolist()  # the one wait for a GPU
    finite = isfinite(loss) and isfinite(norm)
    if finite:
        clip = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        optimizer.step(lr, clip / loss_scale.scale)
    loss_scale.update(overflowed=not isfinite(norm))
    return StepResult(loss, norm, finite)
