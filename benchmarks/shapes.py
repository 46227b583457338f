"""The sizes that are measured, by name. Their weights are random: speed and memory do not ask what was learnt."""

from math import prod

from minilora.checkpoint.names import tensor_specs
from minilora.config import MISTRAL_7B, ModelConfig
from minilora.errors import UserError

SHAPES = {
    "mistral-7b-v0.3": MISTRAL_7B,
    "1.1b": ModelConfig(
        dim=2048, n_layers=22, head_dim=64, hidden_dim=5632, n_heads=32, n_kv_heads=4, vocab_size=32768
    ),
    "135m": ModelConfig(dim=576, n_layers=30, head_dim=64, hidden_dim=1536, n_heads=9, n_kv_heads=3, vocab_size=49152),
    # As many ids as Mistral's tokenizer v3, so that real text can be measured in seconds.
    "tiny": ModelConfig(dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2, vocab_size=32768),
}


def shape(name: str) -> ModelConfig:
    """Raises UserError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise UserError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """(out, in) of the seven linear layers of a block."""
    first = (spec for spec in tensor_specs(config) if spec.is_projection and spec.layer == 0)
    return {spec.module.rpartition(".")[2]: spec.shape for spec in first}


def block_linear_parameters(config: ModelConfig) -> int:
    """Weights of the seven linear layers of all blocks."""
    return config.n_layers * sum(map(prod, projection_shapes(config).values()))


def qlora_step_flops(config: ModelConfig, rows: int, length: int) -> float:
    """Model FLOPs of one QLoRA step over `rows` sequences of `length` tokens, each of them a target.

    linear layers    4 a weight and token: forward, and the gradient of the input; frozen weights have none
    head             the same two products
    attention        six products of (T, Dh) with (T, Dh), two forward and four backward, of what a query sees
    Not counted: what is computed a second time, LoRA, elementwise work.
    """
    tokens = rows * length
    linear = 4 * (block_linear_parameters(config) + config.vocab_size * config.dim) * tokens
    held = [min(length, window or length) for window in config.windows]
    seen = sum(window * (1 - window / (2 * length)) for window in held) / len(held)  # by a query, on average
    attention = 6 * 2 * seen * config.n_heads * config.head_dim * config.n_layers * tokens
    return float(linear + attention)
