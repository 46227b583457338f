"""The chat template of a tokenizer's version as Jinja, the form that other programs render a conversation with.

A rendered string forgets where its pieces came from: a user who types "[INST]" opens a turn there, where `encode_chat`
has it as text. Of other conversations the ids are the same, if the tokenizer takes the control pieces as such and puts
its space before each text (llama.cpp with tokenizer.ggml.add_space_prefix, transformers as `write_tokenizer` sets it),
and if results that are JSON are objects or lists in Python's spacing, and others begin with neither { nor [.
"""

import json
from pathlib import Path

from minilora.checkpoint.files import copy_file
from minilora.checkpoint.json_file import write_json
from minilora.tokenizer import OLD_HF, Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
OWN_FILE = "chat_template.jinja"  # where transformers 5 puts it, and what counts if the config has one, too


def chat_template(template: str) -> str:
    """That of a `Tokenizer.template`. Its variables are bos_token, eos_token, messages, tools."""
    if template in ("v1", OLD_HF):
        set_first, file = f"{{%- set space = '{'' if template == OLD_HF else ' '}' -%}}\n", "chat_v1.jinja"
    else:
        set_first, file = f"{{%- set version = '{template}' -%}}\n", "chat.jinja"
    return set_first + (TEMPLATES / file).read_text("utf-8")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.model and tokenizer_config.json, with which transformers encodes and renders as we do.

    The config's "legacy" puts the tokenizer's space before each text, also after a control piece. A template that lies
    there in a file of its own is removed.
    """
    config = json.loads((TEMPLATES / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = chat_template(tokenizer.template)
    write_json(folder / "tokenizer_config.json", config)
    (folder / OWN_FILE).unlink(missing_ok=True)
    copy_file(tokenizer.path, folder / "tokenizer.model")
