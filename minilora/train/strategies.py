"""Which weights learn: all ("full"), some of them ("partial"), or what is added to a frozen base: adapters ("qlora" on
NF4, "lora" on a plain base), or keys and values before the tokens of every layer ("prefix")."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from minilora.checkpoint.adapter import read_adapter
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.safetensors_file import checksum
from minilora.config import ModelConfig, PrefixConfig, RunConfig, TrainConfig
from minilora.errors import UserError
from minilora.fast_block import fuse
from minilora.fused import Keep
from minilora.lora import add_lora
from minilora.model import Mistral
from minilora.prefix import add_prefix


def apply_strategy(model: Mistral, config: RunConfig, keep: Sequence[Keep] = ()) -> Mistral:
    """Make the model of a run from its base, in place. What is added is drawn from torch's global random state.

    keep: what each fast block keeps for backward; none: as `train.activation_checkpointing` says
    """
    train = config.train
    model.activation_checkpointing, model.neftune_alpha = train.activation_checkpointing, train.neftune_alpha
    if train.base_learns:
        learned = learned_names(model.config, train)
        if train.reinit != "none":
            model.init_weights(train.seed, train.reinit_top)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
    elif train.strategy == "prefix":
        add_prefix(model, PrefixConfig(train.prefix_tokens))
    else:
        if train.adapter is None:
            add_lora(model, config.lora)
        else:
            replace(read_adapter(train.adapter, model.config), config=config.lora).attach(model)
        fuse(model, keep)
    return model


def learned_names(sizes: ModelConfig, train: TrainConfig) -> set[str]:
    """The names of the base's parameters that "full" or "partial" trains.

    Raises UserError where there are not so many layers, where a name of `train.parameters` is none of this model's, and
    where `train.reinit` draws what would not learn.
    """
    names = [spec.name for spec in tensor_specs(sizes)]
    for key, n in (("layers", train.layers or 0), ("reinit", train.reinit_top or 0)):
        if n > sizes.n_layers:
            raise UserError(f"train.{key} is {getattr(train, key)!r}, but the model has {sizes.n_layers} layers")
    if train.strategy == "full":
        return set(names)
    learned = _of_top(sizes, train.layers or 0)
    for pattern in train.parameters:
        matches = {name for name in names if any(fnmatchcase(part, pattern) for part in _holders(name))}
        if not matches:
            near = get_close_matches(pattern, {part for name in names for part in _holders(name)}, cutoff=0)
            raise UserError(f"train.parameters: no parameter is called {pattern!r}; near: {', '.join(near)}")
        learned |= matches
    if not learned >= _of_top(sizes, train.reinit_top or 0):
        raise UserError(f"train.reinit {train.reinit!r} draws weights anew that train.layers and parameters let be")
    return learned


def _of_top(sizes: ModelConfig, n: int) -> set[str]:
    """Names of the parameters in the n uppermost layers."""
    return {spec.name for spec in tensor_specs(sizes) if spec.layer >= sizes.n_layers - n}


def _holders(name: str) -> list[str]:
    """A parameter's name, and those of the modules that it lies in: layers.0.mlp.up_proj.weight, layers.0.mlp, ..."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class MovementCheck:
    """Did every trained tensor get a gradient and move? A forgotten one would train nothing, and say nothing.

    What backward has not reached has a gradient of zeros (and yet would move, by weight decay). So has LoRA's A in the
    first update, where B is zero, and A's gradient is a product with it. So after the first update all tensors but the
    A's must have had a gradient and have moved, after the second all of them.
    Excused is a tensor whose every number is so large that float32 cannot add the learning rate to it, such as a norm's
    ones in the first updates of a long warm-up.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = {name: checksum(p) for name, p in parameters.items()}

    def still(self, updates: int, lr: float) -> list[str]:
        """The tensors that got no gradient, or did not move though they should have after `updates` updates by `lr`."""
        still, large = list[str](), lr / torch.finfo(torch.float32).eps
        for name, p in self.parameters.items():
            if updates == 1 and name.endswith("lora_A"):
                continue
            if p.grad is None or not p.grad.any():
                still.append(f"{name} (got no gradient)")
            elif checksum(p) == self.start[name] and p.abs().min() < large:
                still.append(f"{name} (did not move)")
        return still
