"""What a model takes at rest, predicted from its configuration: bytes by owner of weights, and of what training adds.

NF4 weight: 1/2 byte; absmax: 4/64, or with double quantization 1/64 + 4/(64 * 256) bytes a weight
adapter: 4 bytes a parameter, as much again for its gradient, twice as much for Adam's two moments
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from math import prod

import torch

from minilora.backend import dtype_name
from minilora.checkpoint.adapter_parts import expected_shapes
from minilora.checkpoint.names import tensor_specs
from minilora.config import LoraConfig, ModelConfig, PrefixConfig
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE


def storage_of(dtype: torch.dtype, double_quant: bool | None) -> str:
    """How the blocks' linear layers are stored, in words: in NF4, or where `double_quant` is None in `dtype`."""
    return dtype_name(dtype) if double_quant is None else "nf4 double-quantized" if double_quant else "nf4"


def predict(
    config: ModelConfig, dtype: torch.dtype, double_quant: bool | None, adapter: LoraConfig | PrefixConfig | None
) -> dict[str, int]:
    """Bytes by owner of a model at rest and of what training adapters adds; activations are not in it.

    dtype: of all weights that are not in NF4
    double_quant: of the blocks' linear layers in NF4, whether their absmax are in 8 bits; None: they are not in NF4
    """
    sizes = [prod(spec.shape) for spec in tensor_specs(config) if spec.is_projection]
    if double_quant is None:
        owners = {"linear weights": sum(sizes) * dtype.itemsize}
    else:
        blocks = [-(-n // BLOCK_SIZE) for n in sizes]
        absmax = sum(b + 4 * -(-b // NESTED_BLOCK_SIZE) + 4 if double_quant else 4 * b for b in blocks)
        owners = {"packed weights": sum(-(-n // 2) for n in sizes), "absmax": absmax}
    owners["embeddings, head, norms"] = (config.n_parameters - sum(sizes)) * dtype.itemsize
    if adapter is None:
        return owners
    shapes_added = expected_shapes(adapter, config)
    learned = sum(map(prod, shapes_added.values()))  # numbers
    # DoRA has a number of each row that is fixed, beside the one that learns.
    fixed = sum(n for name, (n, *_) in shapes_added.items() if name.endswith("magnitude_vector"))
    return owners | {"adapters": 4 * (learned + fixed), "gradients": 4 * learned, "optimizer": 8 * learned}


@dataclass(frozen=True)
class Learned:
    """How many numbers learn: `n` in all, `blocks` of each block; `head` of what the loss multiplies by."""

    n: int
    blocks: tuple[int, ...]
    embedding: int
    norm: int
    head: int

    @staticmethod
    def of(config: ModelConfig, names: Container[str] | None = None) -> "Learned":
        """Those of the parameters called `names`, or of all. A tied head is the embedding."""
        return Learned._of(config, {s.name: s.shape for s in tensor_specs(config) if names is None or s.name in names})

    @staticmethod
    def of_lora(config: ModelConfig, lora: LoraConfig) -> "Learned":
        """Those of adapters, and of the modules that learn whole beside them."""
        return Learned._of(config, expected_shapes(lora, config))

    @staticmethod
    def _of(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> "Learned":
        of = {name: prod(shape) for name, shape in shapes.items()}
        blocks = [0] * config.n_layers
        for name, n in of.items():
            if name.startswith("layers."):
                blocks[int(name.split(".")[1])] += n
        head = of.get("embed_tokens.weight" if config.tied_embeddings else "lm_head.weight", 0)
        embedding, norm = of.get("embed_tokens.weight", 0), of.get("norm.weight", 0)
        return Learned(sum(of.values()), tuple(blocks), embedding, norm, head)

    @property
    def reached(self) -> tuple[int, ...]:
        """The blocks that backward goes through: from the lowest on that learns, or all for the embedding's sake."""
        return self.blocks if self.embedding else tuple(dropwhile(lambda n: n == 0, self.blocks))
