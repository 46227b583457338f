"""minilora: QLoRA for Mistral on one GPU, from scratch, every line readable.

What to read in which order, README.md says.
Importing the package imports no torch; each name below is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora import nf4 as nf4
    from minilora.checkpoint.adapter import load_adapter as load_adapter
    from minilora.checkpoint.adapter import save_adapter as save_adapter
    from minilora.checkpoint.load import load_model as load_model
    from minilora.config import LoraConfig as LoraConfig
    from minilora.config import ModelConfig as ModelConfig
    from minilora.config import PrefixConfig as PrefixConfig
    from minilora.config import RunConfig as RunConfig
    from minilora.errors import UserError as UserError
    from minilora.generation import generate as generate
    from minilora.lora import add_lora as add_lora
    from minilora.model import Mistral as Mistral
    from minilora.prefix import add_prefix as add_prefix
    from minilora.tokenizer import load_tokenizer as load_tokenizer

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

__all__ = sorted([*_HOME, "nf4"])


def __getattr__(name: str) -> Any:
    if name == "nf4":
        return import_module("minilora.nf4")
    if name in _HOME:
        return getattr(import_module(f"minilora.{_HOME[name]}"), name)
    raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
