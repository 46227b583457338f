"""The one table of names: what each tensor of a Mistral is called, here and in both layouts, and its shape.

Our names are the model's own, which are Hugging Face's without their leading "model.". Mistral's own files name the
same tensors otherwise and order the rows of W_q and W_k otherwise (`minilora.rope` says why); everything else is equal.

    V vocab_size   D dim   F hidden_dim   Q n_heads * head_dim   K n_kv_heads * head_dim
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from minilora.checkpoint.layout import Layout
from minilora.config import PROJECTIONS, ModelConfig
from minilora.patterns import hf_name
from minilora.rope import half_split_to_interleaved, interleaved_to_half_split

# ours, Mistral's, shape
_FIRST = (("embed_tokens", "tok_embeddings", "VD"),)
_BLOCK = (
    ("input_layernorm", "attention_norm", "D"),
    ("self_attn.q_proj", "attention.wq", "QD"),
    ("self_attn.k_proj", "attention.wk", "KD"),
    ("self_attn.v_proj", "attention.wv", "KD"),
    ("self_attn.o_proj", "attention.wo", "DQ"),
    ("post_attention_layernorm", "ffn_norm", "D"),
    ("mlp.gate_proj", "feed_forward.w1", "FD"),
    ("mlp.up_proj", "feed_forward.w3", "FD"),
    ("mlp.down_proj", "feed_forward.w2", "DF"),
)
_LAST = (("norm", "norm", "D"), ("lm_head", "output", "VD"))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. `module` is the name of the layer it is the weight of; `rope_heads` counts the heads whose rows
    Mistral's files interleave, 0 where there are none."""

    module: str
    mistral_module: str
    shape: tuple[int, ...]
    rope_heads: int = 0

    @property
    def name(self) -> str:
        return f"{self.module}.weight"

    @property
    def layer(self) -> int:
        """The block that it lies in; -1 outside of them."""
        return int(self.module.split(".")[1]) if self.module.startswith("layers.") else -1

    @property
    def is_projection(self) -> bool:
        """A linear layer of a block: what is quantized and adapted."""
        return self.module.rpartition(".")[2] in PROJECTIONS

    def key(self, layout: Layout) -> str:
        """The tensor's name in the files of `layout`."""
        if layout == "mistral":
            return f"{self.mistral_module}.weight"
        return hf_name(self.name)

    def from_layout(self, tensor: Tensor, layout: Layout) -> Tensor:
        """A tensor as the files of `layout` have it, in our order of rows."""
        return interleaved_to_half_split(tensor, self.rope_heads) if layout == "mistral" and self.rope_heads else tensor

    def to_layout(self, tensor: Tensor, layout: Layout) -> Tensor:
        """The inverse of `from_layout`."""
        return half_split_to_interleaved(tensor, self.rope_heads) if layout == "mistral" and self.rope_heads else tensor


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order of a forward pass; without the head if it is tied to the embedding."""
    sizes = {
        "V": config.vocab_size,
        "D": config.dim,
        "F": config.hidden_dim,
        "Q": config.n_heads * config.head_dim,
        "K": config.n_kv_heads * config.head_dim,
    }
    heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}
    blocks = ((f"layers.{layer}.", _BLOCK) for layer in range(config.n_layers))
    for prefix, table in chain([("", _FIRST)], blocks, [("", _LAST)]):
        for ours, theirs, letters in table:
            if not (ours == "lm_head" and config.tied_embeddings):
                shape = tuple(sizes[letter] for letter in letters)
                yield TensorSpec(prefix + ours, prefix + theirs, shape, heads.get(ours, 0))
