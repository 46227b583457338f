"""The chat template of a tokenizer's version as Jinja, the form that other programs render a conversation with.

A rendered string forgets where its pieces came from: a user who types "[INST]" opens a turn there, where `encode_chat`
has it as text. Of other conversations the ids are the same, if the tokenizer takes the control pieces as such and puts
its space before each text (llama.cpp with tokenizer.ggml.add_space_prefix, transformers as `tokenizer_config` has it),
and if arguments of calls are objects and results are text, or objects and lists in Python's spacing of JSON.
"""

import json
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"


def chat_template(version: str) -> str:
    """The template of "v1", "v2" or "v3"; its variables are bos_token, eos_token, messages, tools."""
    return (TEMPLATES / f"chat_{version}.jinja").read_text("utf-8")


def tokenizer_config(version: str) -> str:
    """tokenizer_config.json, with which transformers reads tokenizer.model and the template.

    Its "legacy" puts the tokenizer's space before each text, also after a control piece.
    """
    fixed = json.loads((TEMPLATES / "tokenizer_config.json").read_text("utf-8"))
    return json.dumps(fixed | {"chat_template": chat_template(version)}, indent=2) + "\n"
