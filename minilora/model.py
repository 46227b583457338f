"""The Mistral decoder (https://arxiv.org/abs/2310.06825), in plain nn.Linear: it knows neither NF4 nor LoRA.

    h = embed(tokens)
    h = h + attention(norm(h));  h = h + mlp(norm(h))        n_layers times
    logits = head(norm(h))

Parameters are named as in Hugging Face's files, without their leading "model.".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.attention import attend, has_flash_attention
from minilora.config import LoraConfig, ModelConfig
from minilora.kv_cache import KVCache
from minilora.neftune import with_noise
from minilora.norm import RMSNorm
from minilora.prefix import Prefix
from minilora.rope import apply_rope, rope_cos_sin
from minilora.swiglu import gated
from minilora.visible import Pieces, Runs, Sees, as_added, visible


class Context:
    """What all blocks of one forward pass share: rotations, who sees whom, the cache, and a prefix (prefix.py)."""

    def __init__(
        self,
        config: ModelConfig,
        positions: Tensor,
        segments: Tensor | None,
        cache: KVCache | None,
        dtype: torch.dtype,
        prefix: Prefix | None = None,
        runs: Runs | None = None,
    ) -> None:
        self.positions, self.cache, self.windows = positions, cache, config.windows
        self._runs = runs
        self._in_one_launch = runs is not None and has_flash_attention(positions.device, dtype, config.head_dim)
        self.prefix = prefix.by_layer(dtype) if prefix is not None and prefix.enabled else ()
        n_before = len(self.prefix[0]) if self.prefix else 0
        self.cos, self.sin = rope_cos_sin(positions + n_before, config.head_dim, config.rope_theta, dtype)
        self._groups = config.n_heads // config.n_kv_heads
        self._sees = {window: self._who_sees(window, segments, n_before) for window in set(self.windows)}

    def _who_sees(self, window: int | None, segments: Tensor | None, n_before: int) -> Sees:
        """Under that window, `attend`'s argument."""
        positions, cache = self.positions, self.cache
        alone = not self.prefix and (cache is None or (cache.is_empty and positions.shape[1] > 1))
        if alone and self._runs is not None:
            if self._in_one_launch:
                return replace(self._runs, window=window if window and window < self._runs.longest else None)
            if positions.device.type == "cpu" and positions.shape[1] > 1:  # a lone token's mask is no larger
                return Pieces.of(self._runs.lengths, window)
        k_positions = positions if cache is None else cache.seen(window, positions)
        mask = visible(positions, k_positions, window, segments)
        if self.prefix:
            before = torch.arange(n_before, device=positions.device).expand(len(positions), -1)
            mask = torch.cat([visible(positions + n_before, before, window), mask], dim=-1)
        if cache is None or positions.shape[1] > 1:
            return mask
        return as_added(mask.expand(-1, -1, self._groups, -1), self.cos.dtype)  # once, where torch would in every layer

    def sees(self, layer: int) -> Sees:
        """Who sees whom in that layer: `attend`'s argument."""
        return self._sees[self.windows[layer % len(self.windows)]]

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, T, Hkv, Dh) of the tokens, and before them those of the prefix and of the cache."""
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v, self.positions)
        if self.prefix:
            before = (part.expand(len(k), -1, -1, -1) for part in self.prefix[2 * layer : 2 * layer + 2])
            k, v = (torch.cat([part, x], dim=1) for part, x in zip(before, (k, v), strict=True))
        return k, v


class Attention(nn.Module):
    """Grouped-query attention over (B, T, D): Hq query heads share Hkv key and value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, Hq, Dh)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, Hkv, Dh)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, Hkv, Dh)
        q = apply_rope(q, context.cos, context.sin)
        k = apply_rope(k, context.cos, context.sin)
        k, v = context.join(self.layer, k, v)
        y: Tensor = self.o_proj(attend(q, k, v, context.sees(self.layer)).flatten(-2))  # (B, T, Hq * Dh) -> (B, T, D)
        return y


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, F) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return y


class Block(nn.Module):
    """One layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Mistral(nn.Module):
    """The decoder: tokens (B, T) int64 -> logits (B, T, V).

    `activation_checkpointing` keeps only each block's input while training and computes the block again in backward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.base_fingerprint: str | None = None  # of the files that the weights came from
        self.base_converted_from: str | None = None  # and of those that they were made of
        self.lora_config: LoraConfig | None = None  # once it has adapters
        self.prefix: Prefix | None = None
        self.neftune_alpha = 0.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weights, and so of what is computed; an embedding that learns has a float32 copy above it."""
        plain: nn.Module = getattr(self.embed_tokens, "base", self.embed_tokens)
        return plain.get_parameter("weight").dtype

    def init_weights(self, seed: int, top: int | None = None) -> None:
        """Random weights to train from: N(0, 0.02), the layers that write to the residual stream 1/sqrt(2L) of that.

        top: only those of the `top` last blocks
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        of_blocks = tuple(f"layers.{i}." for i in range(self.config.n_layers)[-top:]) if top else ()
        for name, weight in self.named_parameters():
            if top is not None and not name.startswith(of_blocks):
                continue
            if weight.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)
            else:
                nn.init.ones_(weight)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        """The normalised last hidden state, (B, T, D): what the head turns into logits.

        positions: (B, T) int64; None is 0, 1, 2, ... and not for a cache that holds tokens; negative ones are padding
        segments: (B, T), the sample that each token of a packed row belongs to
        cache: what was seen before; the new tokens are added to it
        runs: the same as positions and segments say, so that attention need not go by a mask (B, 1, T, T); of tokens
            without positions and segments they are known

        Raises ValueError where there is no token, or nothing says which positions they have.
        """
        if tokens.numel() == 0:
            raise ValueError(f"tokens must be (B, T) with at least one, not {tuple(tokens.shape)}")
        if positions is None and cache is not None and not cache.is_empty:
            raise ValueError("tokens that follow others in a cache need positions")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
            if segments is None:
                runs = Runs.of_rows(len(tokens), tokens.shape[1], tokens.device)
        x = self.embed_tokens(tokens)
        if self.neftune_alpha and self.training:
            x = with_noise(x, segments, self.neftune_alpha)
        context = Context(self.config, positions, segments, cache, x.dtype, self.prefix, runs)
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.layers:
            x = checkpoint(block, x, context, use_reentrant=False) if checkpointing else block(x, context)
        if cache is not None:
            cache.advance(positions)
        y: Tensor = self.norm(x)
        return y

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); the arguments are those of `hidden`."""
        logits: Tensor = self.lm_head(self.hidden(tokens, positions, segments, cache))
        return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; after it the training mode is as it was found."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
