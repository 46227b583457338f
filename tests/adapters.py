"""What tests ask of a model with adapters."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minilora.checkpoint.merge import merged_weight
from minilora.checkpoint.names import tensor_specs
from minilora.data.pack import PackedBatch
from minilora.evaluate.distance import Predictor, predictor
from minilora.lora import LoRALinear, adapters_off
from minilora.model import Mistral


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers with an adapter, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def merged_weights(model: Mistral, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight with its adapter's share, each summed in float32 and rounded once to dtype."""
    for spec in tensor_specs(model.config):
        yield spec.name, merged_weight(model.get_submodule(spec.module)).to(dtype)


def base_predictor(model: Mistral) -> Predictor:
    """The predictions of a model with its adapters off."""

    def logits(batch: PackedBatch) -> Tensor:
        with adapters_off(model):
            return predictor(model)(batch)

    return logits
