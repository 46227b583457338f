"""The chat template of a tokenizer's version as Jinja, the form that other programs render a conversation with.

A rendered string forgets where its pieces came from: a user who types "[INST]" opens a turn there, where `encode_chat`
has it as text. Of other conversations the ids are the same, if the tokenizer takes the control pieces as such and puts
its space before each text (llama.cpp with tokenizer.ggml.add_space_prefix, transformers as `write_tokenizer` sets it),
and if results that are JSON are objects or lists in Python's spacing, and others begin with neither { nor [.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minilora.checkpoint.files import copy_file
from minilora.checkpoint.json_file import MAX_BYTES, read_json, write_json
from minilora.checkpoint.provenance import read_provenance, template_of
from minilora.errors import UserError
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


def own_template(folder: Path) -> str:
    """The text of the chat template that transformers finds in a model's folder, of several templates all their texts;
    "" if there is none that can be read."""
    file = folder / OWN_FILE
    with suppress(OSError, ValueError, UserError):
        if os.path.isfile(file):
            return file.read_text("utf-8") if file.stat().st_size <= MAX_BYTES else ""
        found = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            texts = (one.get("template") for one in found if isinstance(one, dict))
            found = "".join(text for text in texts if isinstance(text, str))
        return found if isinstance(found, str) else ""
    return ""


def template_warnings(folder: Path, template: str, made_on: Mapping[str, Any] | None = None) -> list[str]:
    """What to say before `template` is put around chats with the model in `folder`, which may know another one only.

    made_on: the provenance of an adapter, which may have learnt it
    """
    own = own_template(folder)
    if not own or "[INST]" in own or template_of(made_on or {}) or template_of(read_provenance(folder)):
        return []
    until = "answers are worse, and may not stop, until it is trained"
    return [f"Mistral's chat template {template} is used, not the base's own: {until}"]
