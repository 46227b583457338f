"""LoRA (https://arxiv.org/abs/2106.09685): a frozen linear layer plus a trained product of two thin matrices.

    y = W x + scale * B (A dropout(x))        A (rank, in), B (out, rank), scale = alpha / rank

A starts random and B at zero, so the first forward pass is the base's. A and B are float32 and are cast to x's dtype
once per use; W may be an `nn.Linear` or an `NF4Linear`: with the latter this is QLoRA.

DoRA (https://arxiv.org/abs/2402.09353) learns the length m of each row apart from its direction:

    y = m / n * (W x + scale * B A x)        n = ||W + scale * B A||, row by row; a constant to the gradient

m (out,) starts at the row lengths of W. n is made without decoding W, for W A^T is what W makes of A's rows:

    n^2 = ||w||^2 + 2 scale b . (W A^T) + scale^2 b . (A A^T b)

Dropout touches what goes into A alone. (PEFT drops from W x, too, where DoRA meets dropout, in a second product.)
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
from minilora.linear import NF4Linear, slices
from minilora.nf4 import NF4Tensor

Model = TypeVar("Model", bound=nn.Module)


class Added(nn.Module):
    """What training adds to a frozen base; without it (`adapters_off`) the model is its base."""

    enabled = True


class LoRALinear(Added):
    """`base`, frozen, with an adapter beside it. Its names are the field's: lora_A, lora_B, lora_magnitude_vector."""

    lora_magnitude_vector: nn.Parameter | None
    squared_rows: Tensor | None  # ||w||^2 of each row of the base

    def __init__(self, base: nn.Linear | NF4Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout = config.scale, config.dropout
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        bound = 1 / sqrt(base.in_features)  # PEFT's kaiming_uniform with a = sqrt(5)
        nn.init.uniform_(self.lora_A, -bound, bound)
        squared = _squared_rows(base.weight) if config.dora else None
        self.register_buffer("squared_rows", squared, persistent=False)
        magnitude = None if squared is None else nn.Parameter(squared.sqrt())
        self.register_parameter("lora_magnitude_vector", magnitude)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        reduced = linear(dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., rank)
        y = y + self.scale * linear(reduced, self.lora_B.to(x.dtype))
        if self.lora_magnitude_vector is None:
            return y
        return y * (self.lora_magnitude_vector / self.row_lengths(x.dtype)).to(x.dtype)

    @torch.no_grad()
    def row_lengths(self, dtype: torch.dtype) -> Tensor:
        """n (out,) float32, the lengths of the rows of W + scale * B A; products with W run in `dtype`."""
        assert self.squared_rows is not None
        a, b = self.lora_A, self.lora_B
        across: Tensor = self.base(a.to(dtype)).float().T  # W A^T (out, rank)
        squared = self.squared_rows + self.scale * (b * (2 * across + self.scale * (b @ (a @ a.T)))).sum(1)
        return squared.clamp_min(1e-30).sqrt()  # a row of zeros stays one

    def delta(self) -> Tensor:
        """scale * B A, the (out, in) float32 matrix that a merge adds to W."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def merged(self, weight: Tensor) -> Tensor:
        """`weight`, the base's (out, in), with the adapter in it, float32."""
        merged = weight.float() + self.delta()
        if self.lora_magnitude_vector is None:
            return merged
        lengths = torch.linalg.vector_norm(merged, dim=1).clamp_min(1e-15)
        return merged.mul_((self.lora_magnitude_vector.detach() / lengths)[:, None])


@torch.no_grad()
def _squared_rows(weight: NF4Tensor | Tensor) -> Tensor:
    """||w||^2 (out,) float32 of each row of a weight (out, in), which is decoded by slices."""
    like = torch.empty(0, device=weight.device if isinstance(weight, Tensor) else weight.packed.device)
    return torch.cat([torch.linalg.vector_norm(rows, dim=1).pow(2) for _, _, rows in slices(weight, like)])


def add_lora(model: Model, config: LoraConfig) -> Model:
    """Freeze `model` and put an adapter beside every linear layer of its blocks that `config.targets` names.

    A target is the last part of a layer's name, such as "q_proj". Changes the model in place and returns it. Raises
    UserError if a target names no layer, or the model has adapters already.
    """
    refuse_added(model)
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
    layers = [module for module in model.modules() if isinstance(module, Added)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def refuse_added(model: nn.Module) -> None:
    """Raise UserError if something was added to the model already."""
    if any(isinstance(module, Added) for module in model.modules()):
        raise UserError("the model has adapters already; load the base anew, or merge them first")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers with an adapter, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))
