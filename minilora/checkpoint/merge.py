"""A model with adapters as plain weights: W' + scale * B A, tensor by tensor; with DoRA its rows of length m.

W' may be (`Route`)

    trained       what the adapter was trained beside: the NF4 weight, dequantized, or a plain base as it is
    original      the weight before it was quantized
    requantized   as trained, and the sum is quantized again

The first is exact but for one rounding. The others put back, or add, an error of quantization that training never saw
(https://github.com/huggingface/peft/issues/2321 shows what becomes of it), so what they lose is measured
(`evaluate/merge_pass.py`).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minilora.config import PrefixConfig
from minilora.dispatch import quantize
from minilora.errors import UserError
from minilora.lora import LoRALinear
from minilora.nf4 import BLOCK_SIZE, NF4Tensor
from minilora.prefix import Prefix


def merged_weight(layer: nn.Module, original: Tensor | None = None) -> Tensor:
    """A layer's weight with its adapter in it; onto `original`, if given, instead of its own. float32 if adapted."""
    if isinstance(layer, LoRALinear):
        return layer.merged(plain_weight(layer.base) if original is None else original)
    return plain_weight(layer) if original is None else original


def requantized_weight(layer: nn.Module, double_quant: bool, dtype: torch.dtype) -> NF4Tensor:
    """A projection's weight with its adapter in it, in NF4; one without an adapter as it is. dtype: to decode it to."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, NF4Tensor):
        stored = weight.block_size, weight.nested_absmax is not None
        if stored == (BLOCK_SIZE, double_quant):
            return replace(weight, dtype=dtype)
    return quantize(merged_weight(layer).to(dtype), double_quant=double_quant)


def refuse_prefix(adapter: object) -> None:
    """Raise UserError if `adapter`, of a model or of a folder, is a prefix."""
    if isinstance(adapter, Prefix | PrefixConfig):
        raise UserError("a prefix has no place in the weights, so it cannot be merged; use base and adapter together")


def plain_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a float tensor; an NF4 one dequantized to float32."""
    weight: NF4Tensor | Tensor = layer.weight  # type: ignore[assignment]
    return weight.dequantize(torch.float32) if isinstance(weight, NF4Tensor) else weight.detach()
