"""LoRA (https://arxiv.org/abs/2106.09685): a frozen linear layer plus a trained product of two thin matrices.

    y = W x + scale * B (A dropout(x))        A (rank, in), B (out, rank), scale = alpha / rank

A starts random and B at zero, so the first forward pass is the base's. A and B are float32 and are cast to x's dtype
once per use, or before many uses (`casts`); W may be an `nn.Linear` or an `NF4Linear`: with the latter this is QLoRA.

DoRA (https://arxiv.org/abs/2402.09353) learns the length m of each row apart from its direction:

    y = m / n * (W x + scale * B A x)        n = ||W + scale * B A||, row by row; a constant to the gradient

m (out,) starts at the row lengths of W. n needs no W + scale * B A, for W A^T is what W makes of A's rows:

    n^2 = ||w||^2 + 2 scale b . (W A^T) + scale^2 b . (A A^T b)

Dropout touches what goes into A alone. (PEFT drops from W x, too, where DoRA meets dropout, in a second product.)

`modules_to_save` are embedding, head or norms that learn whole: a float32 copy takes the frozen module's place.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout, embedding, linear

from minilora.config import ALL_LINEAR, LoraConfig
from minilora.dispatch import undifferentiated_on_gpu
from minilora.errors import UserError
from minilora.linear import NF4Linear, slices
from minilora.nf4 import NF4Tensor
from minilora.patterns import first_match

Model = TypeVar("Model", bound=nn.Module)
SAVABLE = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")  # modules_to_save


class Added(nn.Module):
    """What training adds to a frozen base; without it (`adapters_off`) the model is its base."""

    enabled = True


def init_a(lora_A: Tensor, generator: torch.Generator | None = None) -> None:
    """As PEFT does: kaiming_uniform with a = sqrt(5). B begins as zeros, so the adapter adds nothing yet."""
    bound = 1 / sqrt(lora_A.shape[1])
    nn.init.uniform_(lora_A, -bound, bound, generator)


class LoRALinear(Added):
    """`base`, frozen, with an adapter beside it. Its names are the field's: lora_A, lora_B, lora_magnitude_vector."""

    lora_magnitude_vector: nn.Parameter | None
    squared_rows: Tensor | None  # ||w||^2 of each row of the base

    def __init__(self, base: nn.Linear | NF4Linear, config: LoraConfig, name: str = "") -> None:
        """name: the layer's own, by which `config` may have another rank or alpha for it."""
        super().__init__()
        self.base = base
        self.scale, self.dropout, rank = config.scale_of(name), config.dropout, config.rank_of(name)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        init_a(self.lora_A)
        squared = _squared_rows(base.weight) if config.dora else None
        self.register_buffer("squared_rows", squared, persistent=False)
        magnitude = None if squared is None else nn.Parameter(squared.sqrt())
        self.register_parameter("lora_magnitude_vector", magnitude)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        if undifferentiated_on_gpu(x) and self.lora_magnitude_vector is None and not (self.training and self.dropout):
            # Onto y where it lies: two launches, and one rounding instead of three.
            reduced, rows = linear(x, cast_of(self.lora_A, x.dtype)).flatten(0, -2), y.flatten(0, -2)
            return rows.addmm_(reduced, cast_of(self.lora_B, x.dtype).T, alpha=self.scale).view(y.shape)
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


def cast_of(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in `dtype`, without a gradient: the copy that `casts` or `FlatAdamW.casts` keeps on the parameter for many
    uses, `p.kept_cast`, if one of them is entered."""
    kept: Tensor = getattr(p, "kept_cast", p)
    return kept.detach().to(dtype)


@contextmanager
def casts(model: nn.Module, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """While entered, A and B of each adapter have a copy in `dtype` of what they are now: the copies."""
    low_rank = [p for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)]
    copies = [p.detach().to(dtype) for p in low_rank]
    for p, copy in zip(low_rank, copies, strict=True):
        p.kept_cast = copy  # type: ignore[attr-defined]
    try:
        yield copies
    finally:
        for p in low_rank:
            del p.kept_cast  # type: ignore[attr-defined]


class TrainedCopy(Added):
    """`base`, a frozen embedding, head or norm, whose weight a float32 copy, `trained`, stands in for and learns."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.trained = nn.Parameter(weight.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The weight in use."""
        return self.trained if self.enabled else self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            y: Tensor = self.base(x)
        elif isinstance(self.base, nn.Embedding):
            y = embedding(x, self.trained).to(self.base.weight.dtype)
        else:
            y = functional_call(self.base, {"weight": self.trained.to(x.dtype)}, (x,))
        return y


@torch.no_grad()
def _squared_rows(weight: NF4Tensor | Tensor) -> Tensor:
    """||w||^2 (out,) float32 of each row of a weight (out, in), which is decoded by slices."""
    like = torch.empty(0, device=weight.device if isinstance(weight, Tensor) else weight.packed.device)
    return torch.cat([torch.linalg.vector_norm(rows, dim=1).pow(2) for _, _, rows in slices(weight, like)])


def add_lora(model: Model, config: LoraConfig) -> Model:
    """Freeze `model`, put an adapter beside every linear layer of its blocks that `config.targets` means, and a copy
    that learns in the place of every module that `config.modules_to_save` means.

    Changes the model in place and returns it. Raises UserError if a target, pattern or module to save means nothing
    here, or the model has adapters already.
    """
    refuse_added(model)
    linears = [name for name, module in model.named_modules() if _is_linear(name, module)]
    others = {name for name, _ in model.named_modules()} - {*linears, ""}
    refuse_unknown(config, linears, others, getattr(getattr(model, "config", None), "tied_embeddings", False))
    attach_lora(model, config)
    return model


def refuse_unknown(config: LoraConfig, linears: Iterable[str], others: Iterable[str], tied: bool = False) -> None:
    """Raise UserError for a target or pattern that means none of the blocks' linear layers, `linears`, a regular
    expression that means one of the `others` too, and a module to save that is none of them, or is `tied`."""
    linears, others, targets = list(linears), sorted(others), config.targets
    ends = sorted({name.rpartition(".")[2] for name in linears})
    for alone in (targets,) if isinstance(targets, str) else ((target,) for target in targets):
        if not any(map(LoraConfig(targets=alone).adapts, linears)):
            if isinstance(alone, str):
                instead = f"as a regular expression of the whole name; for the ends of names write a list, [{ends[0]}]"
                raise UserError(f"lora.targets names {alone!r}, which no layer is called {instead}; there are {ends}")
            raise UserError(f"lora.targets names {alone[0]!r}, which no layer is called; there are {ends}")
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        inside = [f"{name}.act_fn" for name in others if name.endswith(".mlp")]  # which PEFT sees
        if wrong := [name for name in (*others, *inside) if config.adapts(name)]:
            raise UserError(f"lora.targets is {targets!r}, which matches {wrong[0]}, too; an adapter can be at {ends}")
    adapted = list(filter(config.adapts, linears))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(first_match({pattern: True}, name, False) for name in adapted):
                raise UserError(f"lora.{key} names {pattern!r}, which no layer with an adapter is called")
    for module in config.modules_to_save:
        saved = set(filter(LoraConfig(modules_to_save=(module,)).saves, (*linears, *others)))
        if not saved or any(name.rpartition(".")[2] not in SAVABLE for name in saved):
            raise UserError(f"lora.modules_to_save names {module!r}; it may name {', '.join(SAVABLE)}")
        if tied and saved & {"embed_tokens", "lm_head"}:
            raise UserError(f"lora.modules_to_save names {module!r}, but here one weight is both embedding and head")


def attach_lora(module: nn.Module, config: LoraConfig) -> None:
    """Freeze `module`, the model or some of its blocks, and put what `config` adds in the place of what it means."""
    module.requires_grad_(False)
    for name, layer in list(module.named_modules()):
        if _is_linear(name, layer) and config.adapts(name):
            module.set_submodule(name, LoRALinear(layer, config, name).train(layer.training))
        elif name.rpartition(".")[2] in SAVABLE and config.saves(name):
            module.set_submodule(name, TrainedCopy(layer).train(layer.training))
    module.lora_config = config  # type: ignore[assignment]


def _is_linear(name: str, module: nn.Module) -> bool:
    """Of a block: the head has no adapter."""
    return isinstance(module, nn.Linear | NF4Linear) and "." in name


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While entered, the model is its base."""
    layers = [module for module in model.modules() if isinstance(module, Added) and module.enabled]
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
