"""Which weights learn: the adapters of a frozen base ("qlora" on NF4, "lora" on a plain one), or all ("full")."""

import torch
from torch import nn

from minilora.config import RunConfig
from minilora.fused import fuse
from minilora.lora import add_lora
from minilora.model import Mistral


def apply_strategy(model: Mistral, config: RunConfig) -> Mistral:
    """Make the model of a run from its base, in place. New adapters are drawn from torch's global random state."""
    model.activation_checkpointing = config.train.activation_checkpointing
    if config.train.strategy == "full":
        return model.requires_grad_(True)
    add_lora(model, config.lora)
    fuse(model)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class MovementCheck:
    """Did every trained tensor get a gradient and move? A forgotten one would train nothing, and say nothing.

    LoRA's A cannot move in the first update: B is zero, and A's gradient is a product with it. So after the first
    update every tensor must have had a gradient and all but the A's must have moved, after the second all of them.
    Excused is a tensor whose every number is so large that float32 cannot add the learning rate to it, such as a norm's
    ones in the first updates of a long warm-up.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = {name: _bits(p) for name, p in parameters.items()}

    def still(self, updates: int, lr: float) -> list[str]:
        """The tensors that got no gradient, or did not move though they should have after `updates` updates by `lr`."""
        still, large = list[str](), lr / torch.finfo(torch.float32).eps
        for name, p in self.parameters.items():
            if p.grad is None:
                still.append(f"{name} (got no gradient)")
            elif updates == 1 and name.endswith("lora_A"):
                continue
            elif _bits(p) == self.start[name] and p.abs().min() < large:
                still.append(f"{name} (did not move)")
        return still


def _bits(p: nn.Parameter) -> int:
    """A sum over the bits of float32 numbers: another one is another tensor, and no copy of all that learns is kept."""
    return int(p.detach().view(torch.int32).sum(dtype=torch.int64))
