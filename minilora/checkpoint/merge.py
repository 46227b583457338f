"""A model with adapters as plain weights: W' + scale * B A, tensor by tensor; with DoRA its rows of length m.

W' is the dequantized NF4 weight, not the original: it is the base that the adapter was trained beside, and so the one
that it fits (https://github.com/huggingface/peft/issues/2321 shows what becomes of the other way).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minilora.checkpoint.names import tensor_specs
from minilora.config import PrefixConfig
from minilora.errors import UserError
from minilora.lora import LoRALinear
from minilora.model import Mistral
from minilora.nf4 import NF4Tensor
from minilora.prefix import Prefix


def merged_weights(model: Mistral, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight with its adapter's share, each summed in float32 and rounded once to dtype.

    Raises UserError for a prefix.
    """
    refuse_prefix(model.prefix)
    for spec in tensor_specs(model.config):
        layer = model.get_submodule(spec.module)
        if isinstance(layer, LoRALinear):
            yield spec.name, layer.merged(plain_weight(layer.base)).to(dtype)
        else:
            yield spec.name, plain_weight(layer).to(dtype)


def refuse_prefix(adapter: object) -> None:
    """Raise UserError if `adapter`, of a model or of a folder, is a prefix."""
    if isinstance(adapter, Prefix | PrefixConfig):
        raise UserError("a prefix has no place in the weights, so it cannot be merged; use base and adapter together")


def plain_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a float tensor; an NF4 one dequantized to float32."""
    weight: NF4Tensor | Tensor = layer.weight  # type: ignore[assignment]
    return weight.dequantize(torch.float32) if isinstance(weight, NF4Tensor) else weight.detach()
