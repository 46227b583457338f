"""minilora.json beside an adapter or a model: where it comes from; of an adapter checked when it is loaded.

    base_fingerprint  base_converted_from (its `Checkpoint.converted_from`)  base_path
    quantization {"type": "nf4" or "none", "double_quant", "block_size", "compute_dtype"}
    tokenizer {"sha256", "template"}  tokenizer_path  validation_path
    data (sha256 by key)  config (of the run)  metrics {"before", "after", "test"}  versions
    export {"to", "from", "fingerprint"} of a model in another form: what it was made of

Another base, tokenizer or template, or a file that was altered, is refused, or with `force` only said. That the base is
stored otherwise is said: such an adapter works, if not as well. Other programs' adapters have no such file and pass.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minilora.backend import dtype_name
from minilora.checkpoint.files import sha256_of
from minilora.checkpoint.json_file import read_json, short, write_json
from minilora.checkpoint.write import MANIFEST, verify_manifest
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.model import Mistral
from minilora.nf4 import BLOCK_SIZE
from minilora.tokenizer import Tokenizer

PROVENANCE = "minilora.json"
PROVENANCE_VERSION = 2

_IDENTITY = ("base_fingerprint", "base_converted_from")
_REMEDIES = {"sha256": "name the right one with --model.tokenizer", "template": "mend --model.old_hf_spaces"}


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What minilora.json tells of where it comes from that lies there; empty if another program wrote it."""
    file = Path(folder) / PROVENANCE
    if not os.path.isfile(file):
        return {}
    provenance = read_json(file)
    if (written := provenance.get("format_version")) != PROVENANCE_VERSION:
        raise UserError(f"{file}: format_version is {short(written)}; this minilora knows {PROVENANCE_VERSION}")
    texts = dict.fromkeys(("base_path", "tokenizer_path", "validation_path", *_IDENTITY), str)
    for key, kind in {**texts, "tokenizer": dict, "quantization": dict, "export": dict}.items():
        if not isinstance(provenance.get(key), kind | None):
            raise UserError(f"{file}: {key} is {short(provenance[key])}, but must be a {kind.__name__}")
    stored = provenance.get("quantization") or {}
    if stored.get("type", "none") not in ("nf4", "none") or not isinstance(stored.get("double_quant"), bool | None):
        raise UserError(f"{file}: quantization is {short(stored)}; its type must be nf4 or none")
    return provenance


def write_provenance(folder: Path, told: Mapping[str, Any]) -> None:
    """Put minilora.json into a folder that is being written."""
    write_json(folder / PROVENANCE, {**told, "format_version": PROVENANCE_VERSION})


def tokenizer_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Which tokenizer it is, and by which template it writes chats."""
    return {"sha256": sha256_of(tokenizer.path), "template": tokenizer.template}


def template_of(provenance: Mapping[str, Any]) -> Any:
    """The name of the template that was trained with (`Tokenizer.template`), None where that is not told."""
    return (provenance.get("tokenizer") or {}).get("template")


def versions() -> dict[str, Any]:
    """What the last bits of a run's numbers depend on, beside its settings."""
    return {"minilora": version("minilora"), "torch": torch.__version__, "threads": torch.get_num_threads()}


def quantization(double_quant: bool | None, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> dict[str, Any]:
    """How a base is stored and computed, as minilora.json has it. double_quant: None where it is not in NF4."""
    nf4 = {} if double_quant is None else {"double_quant": double_quant, "block_size": block_size}
    return {"type": "nf4" if nf4 else "none", **nf4, "compute_dtype": dtype_name(dtype)}


def base_of(model: Mistral) -> dict[str, Any]:
    """Which base a model that is loaded has, and how it is stored."""
    identity: dict[str, Any] = {key: getattr(model, key) for key in _IDENTITY if getattr(model, key)}
    for module in model.modules():
        if isinstance(module, NF4Linear):
            stored = quantization(module.nested_absmax is not None, model.dtype, module.block_size)
            return identity | {"quantization": stored}
    return identity | {"quantization": quantization(None, model.dtype)}


def check_origin(folder: Path, trained: dict[str, Any], here: dict[str, Any], force: bool | None) -> list[str]:
    """What should be said before the adapter in `folder` is used.

    trained: its provenance; here: the same keys of the base and tokenizer at hand, those that are known
    force: None where the user has no such option

    Raises UserError for another base, tokenizer or template and for altered files, unless `force` is given.
    """
    wrong = list[str]()
    if os.path.isfile(folder / MANIFEST):
        try:
            verify_manifest(folder)
        except UserError as error:
            wrong.append(str(error))
    theirs, ours = ([origin[key] for key in _IDENTITY if origin.get(key)] for origin in (trained, here))
    if theirs and ours and not set(theirs) & set(ours):
        wrong.append(f"{folder}: trained on another base: fingerprint {theirs[0]}, but this model's is {ours[0]}")
    for key, was, now in _differences(trained.get("tokenizer"), here.get("tokenizer")):
        other = f"a tokenizer whose {key} is {short(was)}, but here it is {short(now)}"
        wrong.append(f"{folder}: trained with {other}; {_REMEDIES.get(key, _REMEDIES['sha256'])}")
    if wrong and not force:
        raise UserError(wrong[0] + (" (--force overrides this)" if force is not None else ""))
    said = [f"overridden by force: {text}" for text in wrong]
    for key, was, now in _differences(trained.get("quantization"), here.get("quantization")):
        if key != "compute_dtype":
            stored = f"trained on a base stored with {key} {was}, here it is {now}"
            said.append(f"{folder}: {stored}; expect slightly other answers")
    return said


def _differences(trained: dict[str, Any] | None, here: dict[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Key and both values, where both are known and differ."""
    both = ((key, was, (here or {}).get(key)) for key, was in (trained or {}).items())
    return [(key, was, now) for key, was, now in both if None not in (was, now) and was != now]
