"""What lies at a path, as `minilora inspect` tells it: a model, an adapter, a run, a GGUF export, a tokenizer.

The readers themselves are asked, up to where they would take memory, so "would load" is their word and the reason
theirs. A folder may be broken in any way: then the reason is the answer, beside what could still be read.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from minilora.checkpoint.adapter import CONFIG, PROVENANCE, WEIGHTS, check_origin, checked_entries, read_adapter_config
from minilora.checkpoint.config_files import read_config
from minilora.checkpoint.gguf_file import read_gguf
from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.layout import find_layout
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.safetensors_file import read_header
from minilora.checkpoint.write import MANIFEST, verify_manifest
from minilora.config import LoraConfig, base_folder, to_dict
from minilora.data.records import data_fingerprint
from minilora.errors import UserError
from minilora.memory import DenseDtype, Storage, predict
from minilora.tokenizer import load_tokenizer

Facts = dict[str, Any]
Listed = tuple[str, tuple[int, ...], str, int]  # of a tensor: name, shape, dtype, bytes
_DENSE: dict[str, DenseDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MISTRAL_FINETUNE = "lora.safetensors"


def gather(path: str | Path, *, checksum: bool = False) -> Facts:
    """All that can be said of `path`, as what JSON can hold. "reason" is None if it would load, else one line why not.

    checksum: also take the sha256 of every file, and hold them against the manifest

    Raises UserError if there is nothing at `path`.
    """
    found = base_folder(path)
    if not found.exists():
        raise UserError(f"{path}: no such file or folder")
    folder = found.parent if found.is_file() else found
    files = [found] if found.is_file() else sorted(f for f in found.rglob("*") if f.is_file())
    names = [f.name for f in files if f.parent == folder]
    kind, _, look = next((k for k in _KINDS if any(matching(names, pattern) for pattern in k[1])), _KINDS[-1])
    facts: Facts = {"path": str(found), "kind": kind, "reason": None, "bytes": sum(f.stat().st_size for f in files)}
    facts["files"] = {str(f.relative_to(folder)): f.stat().st_size for f in files}
    try:
        if PROVENANCE in names:
            facts["provenance"] = read_json(folder / PROVENANCE)
        if checksum:
            facts["sha256"] = {name: data_fingerprint(folder / name) for name in facts["files"]}
        look(found, facts)
        if checksum and MANIFEST in names:
            facts["manifest"] = f"{len(verify_manifest(folder)['files'])} files are as they were written"
    except (UserError, OSError) as error:
        facts["reason"] = str(error)
    return facts


def fold(tensors: Iterable[Listed]) -> Iterator[str]:
    """A line a tensor, those alike in many layers as one: "layers.0-31.mlp.up_proj.weight (14336, 4096) BF16"."""
    layers = defaultdict[str, list[int]](list)
    for name, shape, dtype, _ in tensors:
        layer = re.search(r"\b(?:layers|blk)\.(\d+)\.", name)
        key = f"{name[: layer.start(1)]}*{name[layer.end(1) :]}" if layer else name
        layers[f"{key} {shape} {dtype}"] += [int(layer[1])] if layer else []
    for line, numbers in layers.items():
        whole = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        yield line.replace("*", f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers)), 1)


def _listed(tensors: list[Listed]) -> Facts:
    dtypes = {dtype: {"tensors": 0, "bytes": 0} for _, _, dtype, _ in tensors}
    for _, _, dtype, n_bytes in tensors:
        dtypes[dtype] = {"tensors": dtypes[dtype]["tensors"] + 1, "bytes": dtypes[dtype]["bytes"] + n_bytes}
    return {"dtypes": dtypes, "tensors": list(fold(tensors))}


def _model(path: Path, facts: Facts) -> None:
    facts["layout"], config = find_layout(path), read_config(path)
    facts["sizes"] = to_dict(config) | {"sliding_window": config.sliding_window, "parameters": config.n_parameters}
    checkpoint, listed = open_checkpoint(path), list[Listed]()
    for spec in checkpoint.tensors():
        entry, packed = checkpoint.entries[spec.name], checkpoint.nf4.get(spec.name)
        beside = sum(part.nbytes for part in packed.parts.values()) if packed else 0
        listed.append((spec.name, spec.shape, "NF4" if packed else entry.dtype, entry.nbytes + beside))
    dense = _DENSE[checkpoint.entries["embed_tokens.weight"].dtype]
    storage: Storage = dense
    for packed in checkpoint.nf4.values():
        storage = "nf4 double-quantized" if checkpoint.double_quant else "nf4"
        dtype, stored = str(packed.dtype).removeprefix("torch."), packed.packed.dtype
        facts["quantization"] = {"type": storage, "block_size": packed.block_size, "of": dtype, "stored_as": stored}
    facts |= _listed(listed) | {"memory_at_load": predict(config, storage, dense, None)}
    facts["fingerprint"] = checkpoint.fingerprint()
    checkpoint.check_tied_head()
    if matching(facts["files"], "*tokenizer*.model*"):
        _tokenizer(path, facts)


def _adapter(path: Path, facts: Facts) -> None:
    file = next((f for f in (path / WEIGHTS, path / _MISTRAL_FINETUNE) if f.exists()), path)
    facts["layout"] = "mistral-finetune" if file.name == _MISTRAL_FINETUNE else "PEFT"
    if facts["layout"] == "PEFT":
        config, file = read_adapter_config(path), path / WEIGHTS
        facts["adapter"] = {"type": "LoRA" if isinstance(config, LoraConfig) else "prefix"} | to_dict(config)
    facts |= _listed([(key, e.shape, e.dtype, e.nbytes) for key, e in read_header(file).items()])
    if facts["layout"] != "PEFT":
        raise UserError(f"{file}: adapters of mistral-finetune are not read, only those in PEFT's layout")
    if base := facts.get("provenance", {}).get("base_path"):
        checkpoint = open_checkpoint(str(base))
        checked_entries(path, read_adapter_config(path, checkpoint.config), checkpoint.config)
        check_origin(path, checkpoint.fingerprint())


def _run(path: Path, facts: Facts) -> None:
    try:
        facts["config"] = tomllib.loads((path / "config.toml").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'config.toml'}: not readable as TOML: {error}") from None
    facts["steps"] = sum(1 for _ in (path / "metrics.jsonl").open("rb")) if "metrics.jsonl" in facts["files"] else 0
    facts["latest_checkpoint"] = max((f.name for f in path.glob("checkpoints/step-????????")), default=None)
    summary = read_json(path / "summary.json") if "summary.json" in facts["files"] else {}
    facts["finished"] = bool(summary)
    facts |= {name: summary[name] for name in ("before", "after", "test", "peak_memory_bytes") if summary.get(name)}
    learnt = next((path / name for name in ("adapter", "model") if (path / name).is_dir()), None)
    if learnt is None:
        raise UserError(f"{path}: the run has neither adapter nor model yet; minilora train --resume goes on")
    facts["result"] = gather(learnt)
    facts["reason"] = facts["result"]["reason"]


def _tokenizer(path: Path, facts: Facts) -> None:
    found = load_tokenizer(path)
    said = {"version": found.version, "vocabulary": found.vocab_size, "sha256": data_fingerprint(found.path)}
    facts["tokenizer"] = {"file": found.path.name} | said


def _gguf(path: Path, facts: Facts) -> None:
    keys, tensors = read_gguf(min(path.glob("*.gguf"), default=path))
    facts["keys"] = {key: f"{len(value)} values" if isinstance(value, list) else value for key, value in keys.items()}
    facts |= _listed(tensors) | {"read_by": "llama.cpp; minilora only compares what it wrote"}


_KINDS = (  # what one file of each is called, and who looks closer; the last one says why a folder is none of them
    ("adapter", (CONFIG, _MISTRAL_FINETUNE), _adapter),
    ("run", ("config.toml",), _run),
    ("GGUF", ("*.gguf",), _gguf),
    ("model", ("config.json", "params.json", "*.safetensors"), _model),
    ("tokenizer", ("*tokenizer*.model*", "tekken.json", "tokenizer.json"), _tokenizer),
    ("model", (), _model),
)
