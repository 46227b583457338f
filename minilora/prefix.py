"""A trained prefix (P-tuning v2, https://arxiv.org/abs/2110.07602): keys and values before the tokens of every layer.

    attention over [prefix keys; keys] and [prefix values; values]        P of them in each of the L layers

The prefix stands at positions 0 .. P-1 and the tokens of each sample at P, P+1, ..., so the window holds for it as it
does for tokens. Its keys are learnt as they are used, unrotated, and every sample of a packed row sees it. Nothing else
changes: the KV cache holds tokens alone, and the base may be in NF4.

The numbers lie as PEFT's do: one float32 tensor (P, 2 * L * Hkv * Dh), seen as (P, 2L, Hkv, Dh), layer l's keys at 2l
and its values at 2l + 1. They are learnt directly; there is no network that makes them while training
(`prefix_projection`), which the paper found to help on some tasks and to harm on others.
"""

import torch
from torch import Tensor, nn

from minilora.config import ModelConfig, PrefixConfig
from minilora.lora import Added, Model, refuse_added


class Prefix(Added):
    """`prompt_embeddings` (P, 2 * L * Hkv * Dh) float32, drawn from N(0, 1) as PEFT draws them."""

    def __init__(self, config: ModelConfig, n_tokens: int, device: torch.device) -> None:
        super().__init__()
        self.shape = (n_tokens, 2 * config.n_layers, config.n_kv_heads, config.head_dim)
        self.prompt_embeddings = nn.Parameter(torch.empty(n_tokens, prefix_width(config), device=device))
        nn.init.normal_(self.prompt_embeddings)

    @property
    def n_tokens(self) -> int:
        return self.shape[0]

    def by_layer(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Keys and values of each layer in turn: 2L tensors (P, Hkv, Dh), whose gradients meet once, at the end."""
        return self.prompt_embeddings.view(self.shape).to(dtype).unbind(1)


def add_prefix(model: Model, config: PrefixConfig) -> Model:
    """Freeze a `Mistral` and give it a new prefix, in place; returns it. Raises UserError if it has adapters."""
    refuse_added(model)
    model.requires_grad_(False)
    sizes: ModelConfig = model.config  # type: ignore[assignment]
    model.prefix = Prefix(sizes, config.n_tokens, next(model.parameters()).device).train(model.training)
    return model


def prefix_width(config: ModelConfig) -> int:
    """Numbers of a prefix token: a key and a value of every layer."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim
