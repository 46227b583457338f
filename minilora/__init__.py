"""minilora: QLoRA for Mistral on one GPU, from scratch, every line readable.

What to read in which order, README.md says.
Importing the package imports no torch; each name below is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora import nf4
    from minilora.checkpoint.adapter import load_adapter, save_adapter
    from minilora.checkpoint.load import load_model
    from minilora.config import LoraConfig, ModelConfig, PrefixConfig, RunConfig
    from minilora.errors import UserError
    from minilora.generation import generate
    from minilora.lora import add_lora
    from minilora.model import Mistral
    from minilora.prefix import add_prefix
    from minilora.tokenizer import load_tokenizer

_HOME = {
    "LoraConfig": "config",
    "Mistral": "model",
    "ModelConfig": "config",
    "PrefixConfig": "config",
    "RunConfig": "config",
    "UserError": "errors",
    "add_lora": "lora",
    "add_prefix": "prefix",
    "generate": "generation",
    "load_adapter": "checkpoint.adapter",
    "load_model": "checkpoint.load",
    "load_tokenizer": "tokenizer",
    "save_adapter": "checkpoint.adapter",
}

__all__ = [
    "LoraConfig",
    "Mistral",
    "ModelConfig",
    "PrefixConfig",
    "RunConfig",
    "UserError",
    "add_lora",
    "add_prefix",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "nf4",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "nf4":
        return import_module("minilora.nf4")
    if name in _HOME:
        return getattr(import_module(f"minilora.{_HOME[name]}"), name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
