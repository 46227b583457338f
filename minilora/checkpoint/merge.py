"""A model with adapters as plain weights: W' + scale * B A, tensor by tensor.

W' is the dequantized NF4 weight, not the original: it is the base that the adapter was trained beside, and so the one
that it fits (https://github.com/huggingface/peft/issues/2321 shows what becomes of the other way).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minilora.checkpoint.names import tensor_specs
from minilora.lora import LoRALinear
from minilora.model import Mistral
from minilora.nf4 import NF4Tensor


def merged_weights(model: Mistral, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight with its adapter's share, each summed in float32 and rounded once to dtype."""
    for spec in tensor_specs(model.config):
        layer = model.get_submodule(spec.module)
        if isinstance(layer, LoRALinear):
            yield spec.name, (plain_weight(layer.base).float() + layer.delta()).to(dtype)
        else:
            yield spec.name, plain_weight(layer).to(dtype)


def plain_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a float tensor; an NF4 one dequantized to float32."""
    weight: NF4Tensor | Tensor = layer.weight  # type: ignore[assignment]
    return weight.dequantize(torch.float32) if isinstance(weight, NF4Tensor) else weight.detach()
