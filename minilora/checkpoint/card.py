"""README.md of a model: the card that a repository of models shows.

What is not known is said to be unknown. Text from files is data, not markup: it stands in indented blocks of JSON,
which no text in it can end, or is made of letters and digits alone.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from minilora.checkpoint.chat_template import TEMPLATES
from minilora.checkpoint.files import reading
from minilora.checkpoint.provenance import write_provenance
from minilora.config import ModelConfig, to_dict
from minilora.hub import hub_name

Facts = Mapping[str, Any]  # what minilora.json tells
_LIBRARY = {"gguf": "gguf", "mistral": "vllm"}  # of the others: transformers


def write_card(
    folder: Path, name: str, kind: str, config: ModelConfig, facts: Facts, tokenizer: str | None, notes: Sequence[str]
) -> None:
    """Put README.md into a folder of weights that will be called `name`, and minilora.json, which it was made of.

    kind: its format, a key of `export.FORMATS`; "hf" is what a merge writes
    facts: what minilora.json tells, each key of it optional: license, base_path, base_fingerprint, quantization, data,
        config (of the run), metrics, audit (of the merge), versions, export
    tokenizer: the version, None if the folder has no tokenizer that we know
    notes: what limits it, a sentence each, of our own words
    """
    base, (form, _, bits) = str(facts.get("base_path") or ""), kind.partition("-")
    hub = hub_name(base)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    known = {key: value for key, value in facts.items() if value}
    of_base = {"base_path": Path(base).name} if base else {}
    card = Template((TEMPLATES / "card.md").read_text("utf-8")).substitute(
        name=plain,
        kind=kind,
        license=json.dumps(re.sub(r"[^\w.-]", "", str(facts.get("license") or "unknown"), flags=re.ASCII)),
        library=_LIBRARY.get(form, "transformers"),
        base_model=f"base_model: {hub[0]}\n" if hub else "",
        n_parameters=f"{config.n_parameters:,}",
        tokenizer=tokenizer or "none",
        sizes=_block(to_dict(config)),
        base=_block({k: known[k] for k in ("base_fingerprint", "quantization") if k in known} | of_base),
        **{key: _block(facts.get(key)) for key in ("export", "data", "config", "versions")},
        metrics=_block({k: known[k] for k in ("metrics", "audit") if k in known}),
        usage=Template((TEMPLATES / f"use_{form}.md").read_text("utf-8")).substitute(name=plain, bits=bits).strip(),
        limits="".join(f"- {note}\n" for note in (*notes, *([] if tokenizer else ["No tokenizer lies with it."]))),
    )
    (folder / "README.md").write_text(card, "utf-8")
    write_provenance(folder, facts)


def license_of(folder: Path) -> str | None:
    """As the card in `folder` has it: a line of the block that it begins with. Raises UserError if it is unreadable."""
    card = folder / "README.md"
    if not os.path.isfile(card):
        return None
    with reading(card) as opened:
        head = opened.read(4096).decode("utf-8", "replace").replace("\r\n", "\n")
    found = re.match(r"---\n(?:(?!---).*\n)*?license:[ \t]*\"?([\w.-]+)\"?[ \t]*\n", head)
    return found[1] if found else None


def _block(value: object) -> str:
    """JSON as an indented block, which no text in it can end: JSON escapes line ends and what is not ASCII."""
    lines = json.dumps(value, indent=2, default=str).splitlines() if value else []
    return "\n".join(f"    {line}" for line in lines) or "Unknown: the files that this was made from do not say."
