"""LoRA (https://arxiv.org/abs/2106.09685): a frozen linear layer plus a trained product of two thin matrices.

    y = W x + scale * B (A dropout(x))        A (rank, in), B (out, rank), scale = alpha / rank

A starts random and B at zero, so the first forward pass is the base's. A and B are float32 and are cast to x's dtype
once per use; W may be an `nn.Linear` or an `NF4Linear`: with the latter this is QLoRA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.linear import NF4Linear

Model = TypeVar("Model", bound=nn.Module)


class LoRALinear(nn.Module):
    """`base`, frozen, with an adapter beside it. The adapter's names are the field's: lora_A, lora_B."""

    def __init__(self, base: nn.Linear | NF4Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout, self.enabled = config.scale, config.dropout, True
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        bound = 1 / sqrt(base.in_features)  # PEFT's kaiming_uniform with a = sqrt(5)
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        reduced = linear(dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., rank)
        return y + self.scale * linear(reduced, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """scale * B A, the (out, in) float32 matrix that a merge adds to W."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())


def add_lora(model: Model, config: LoraConfig) -> Model:
    """Freeze `model` and put an adapter beside every linear layer of its blocks that `config.targets` names.

    A target is the last part of a layer's name, such as "q_proj". Changes the model in place and returns it. Raises
    UserError if a target names no layer, or the model has adapters already.
    """
    if any(True for _ in lora_layers(model)):
        raise UserError("the model has adapters already; load the base anew, or merge them first")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | NF4Linear) and "." in name}
    endings = {name.rsplit(".", 1)[-1] for name in linears}
    unknown = sorted(set(config.targets) - endings)
    if unknown:
        raise UserError(f"lora.targets names {unknown[0]!r}, which no layer is called; there are {sorted(endings)}")
    model.requires_grad_(False)
    for name, layer in linears.items():
        parent, _, child = name.rpartition(".")
        if child in config.targets:
            setattr(model.get_submodule(parent), child, LoRALinear(layer, config).train(layer.training))
    model.lora_config = config  # type: ignore[assignment]
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While entered, the model is its base."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers with an adapter, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))
