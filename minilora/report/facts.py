"""What lies at a path, as `minilora inspect` tells it: a model, an adapter, a run, a GGUF export, a tokenizer.

The readers themselves are asked, so "would load" is their word and the reason theirs: of a model all but the numbers of
its matrices is looked at, an adapter is read whole and held against its base. A folder may be broken in any way: then
the reason is the answer, beside what could still be read.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from fnmatch import filter as matching
from functools import partial
from pathlib import Path
from typing import Any

from minilora.backend import dtype_name
from minilora.base import Base
from minilora.checkpoint.adapter import CONFIG, WEIGHTS, adapter_folder
from minilora.checkpoint.config_files import read_config
from minilora.checkpoint.files import sha256_of
from minilora.checkpoint.gguf_file import read_gguf
from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.layout import find_layout
from minilora.checkpoint.mistral_adapter import WEIGHTS as MISTRAL_WEIGHTS
from minilora.checkpoint.mistral_adapter import is_mistral
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.provenance import PROVENANCE, read_provenance
from minilora.checkpoint.safetensors_file import FLOATS, read_header
from minilora.checkpoint.write import MANIFEST, verify_manifest
from minilora.config import TOKENIZER_FILES, UNNAMED, BaseConfig, LoraConfig, PrefixConfig, base_folder, to_dict
from minilora.errors import UserError, of_system
from minilora.memory_at_rest import predict, storage_of
from minilora.tokenizer import load_tokenizer

Facts = dict[str, Any]
Find = Callable[[str], Base]  # the base of the adapter in a folder
Listed = tuple[str, tuple[int, ...], str, int]  # of a tensor: name, shape, dtype, bytes
ITS_OWN = BaseConfig(path=UNNAMED)  # the base that an adapter names itself


def gather(
    path: str | Path, *, base: BaseConfig = ITS_OWN, scaling: float | None = None, checksum: bool = False
) -> Facts:
    """All that can be said of `path`, as what JSON can hold. "reason" is None if it would load, else one line why not.

    base: of an adapter, where it does not say itself where that and its tokenizer lie; scaling: as in `read_adapter`
    checksum: also take the sha256 of every file, and hold them against the manifest

    Raises UserError if there is nothing at `path`, OSError if that may not be read.
    """
    return _gather(path, partial(Base.find, base, scaling=scaling), checksum)


def _gather(path: str | Path, find: Find, checksum: bool = False) -> Facts:
    found = base_folder(path)
    if not found.exists():
        raise UserError(f"{path}: no such file or folder")
    found = adapter_folder(found) if found.is_file() else found
    folder = found.parent if found.is_file() else found
    if found.is_dir():
        next(found.iterdir(), None)  # raises where it may not be read, where a search finds nothing
    files = [found] if found.is_file() else sorted(f for f in found.rglob("*") if f.is_file())
    names = [f.name for f in files if f.parent == folder]
    kind, _, look = next((k for k in _KINDS if any(matching(names, pattern) for pattern in k[1])), _KINDS[-1])
    facts: Facts = {"path": str(found), "kind": kind, "reason": None, "bytes": sum(f.stat().st_size for f in files)}
    facts["files"] = {str(f.relative_to(folder)): f.stat().st_size for f in files}
    try:
        if PROVENANCE in names:
            facts["provenance"] = read_provenance(folder)
        if checksum:
            facts["sha256"] = {name: sha256_of(folder / name) for name in facts["files"]}
        look = _other if found.is_file() and look in (_run, _state) else look
        look(found, facts, find)
        if checksum and MANIFEST in names:
            facts["manifest"] = f"{len(verify_manifest(folder)['files'])} files are as they were written"
    except (UserError, OSError) as error:
        facts["reason"] = of_system(error) if isinstance(error, OSError) else str(error)
    return facts


def fold(tensors: Iterable[Listed]) -> Iterator[str]:
    """A line a tensor, those alike in many layers as one: "layers.0-31.mlp.up_proj.weight (14336, 4096) BF16"."""
    layers = defaultdict[str, list[int]](list)
    for name, shape, dtype, _ in tensors:
        layer = re.search(r"\b(?:layers|blk)\.(\d+)\.", name)
        key = f"{name[: layer.start(1)]}*{name[layer.end(1) :]}" if layer else name
        layers[f"{key} {shape} {dtype}"] += [int(layer[1])] if layer else []
    for line, unsorted in layers.items():
        numbers = sorted(unsorted)  # a file may have its keys sorted as text, 10 before 2
        whole = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        yield line.replace("*", f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers)), 1)


def _listed(tensors: list[Listed]) -> Facts:
    dtypes = {dtype: {"tensors": 0, "bytes": 0} for _, _, dtype, _ in tensors}
    for _, _, dtype, n_bytes in tensors:
        dtypes[dtype] = {"tensors": dtypes[dtype]["tensors"] + 1, "bytes": dtypes[dtype]["bytes"] + n_bytes}
    return {"dtypes": dtypes, "tensors": list(fold(tensors))}


def _model(path: Path, facts: Facts, find: Find) -> None:
    if path.is_file() and path.suffix == ".safetensors" and any(".lora_A." in key for key in read_header(path)):
        facts["kind"] = "adapter"
        _adapter(path, facts, find)
        return
    facts["layout"] = layout = find_layout(path)
    config, _ = read_config(path, layout)
    facts["architecture"] = to_dict(config) | {"parameters": config.n_parameters}
    checkpoint, listed = open_checkpoint(path), list[Listed]()
    for spec in checkpoint.tensors():
        entry, packed = checkpoint.entries[spec.name], checkpoint.nf4.get(spec.name)
        beside = sum(part.nbytes for part in packed.parts.values()) if packed else 0
        listed.append((spec.name, spec.shape, "NF4" if packed else entry.dtype, entry.nbytes + beside))
    embeddings = FLOATS[checkpoint.entries["embed_tokens.weight"].dtype]
    double_quant = checkpoint.double_quant if checkpoint.nf4 else None
    storage = storage_of(embeddings, double_quant)
    for packed in checkpoint.nf4.values():
        dtype, stored = dtype_name(packed.dtype), packed.packed.dtype
        facts["quantization"] = {"type": storage, "block_size": packed.block_size, "of": dtype, "stored_as": stored}
    facts |= _listed(listed) | {"memory_at_load": predict(config, embeddings, double_quant, None)}
    facts["fingerprint"] = checkpoint.fingerprint()
    checkpoint.check_tied_head()
    if any(matching(facts["files"], pattern) for pattern in TOKENIZER_FILES):
        _tokenizer(path, facts, find)


def _adapter(path: Path, facts: Facts, find: Find) -> None:
    """The facts of an adapter in either layout. What is known without the base comes first."""
    mistral = is_mistral(path)
    facts["layout"] = "mistral-finetune" if mistral else "PEFT"
    if not mistral:
        facts["adapter"] = read_json(path / CONFIG)
    file = path if path.is_file() else path / (MISTRAL_WEIGHTS if mistral else WEIGHTS)
    facts |= _listed([(key, e.shape, e.dtype, e.nbytes) for key, e in read_header(file).items()])
    on = find(str(path))
    adapter = on.read_adapter()
    kind = "LoRA" if isinstance(adapter.config, LoraConfig) else "prefix"
    facts["adapter"] = {"type": kind} | to_dict(adapter.config)
    facts["vllm"] = _in_vllm(adapter.config) if not mistral else "reads PEFT's layout only"
    facts["base"] = str(on.checkpoint.folder)
    if on.warnings:
        facts["warnings"] = list(on.warnings)


def _in_vllm(config: LoraConfig | PrefixConfig) -> str:
    """Whether vLLM serves it beside its base: by `vllm/lora/peft_helper.py`, which reads one rank and one alpha."""
    if isinstance(config, PrefixConfig):
        return "does not serve prefixes"
    features = ("dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    if used := [name for name in features if getattr(config, name)]:
        return f"does not serve {', '.join(used)} right; merge it"
    return f"serves it with --enable-lora --max-lora-rank {config.rank} or more"


def _run(path: Path, facts: Facts, find: Find) -> None:
    try:
        facts["config"] = tomllib.loads((path / "config.toml").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'config.toml'}: not readable as TOML: {error}") from None
    metrics = path / "metrics.jsonl"
    facts["steps"] = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    steps = [f for f in path.glob(f"checkpoints/step-{'[0-9]' * 8}") if f.is_dir() and not f.is_symlink()]
    facts["latest_checkpoint"] = max((f.name for f in steps), default=None)
    summary = read_json(path / "summary.json") if "summary.json" in facts["files"] else {}
    facts["finished"] = bool(summary)
    facts |= {name: summary[name] for name in ("before", "after", "test", "peak_memory_bytes") if summary.get(name)}
    learnt = next((path / name for name in ("adapter", "model") if (path / name).is_dir()), None)
    if learnt is None:
        raise UserError(f"{path}: the run has neither adapter nor model yet; minilora train --resume goes on")
    facts["result"] = _gather(learnt, find)
    facts["reason"] = facts["result"]["reason"]


def _state(path: Path, facts: Facts, _: Find) -> None:
    verify_manifest(path)
    state = read_json(path / "state.json")
    why = ", at its end, for the weights that validated best" if path.name.startswith("best-") else " --resume"
    facts |= {key: state.get(key) for key in ("counters", "versions")} | {"read_by": f"minilora train{why}"}
    facts |= _listed([(key, e.shape, e.dtype, e.nbytes) for key, e in read_header(path / "state.safetensors").items()])


def _tokenizer(path: Path, facts: Facts, _: Find) -> None:
    tokenizer = load_tokenizer(path)
    own = {"version": tokenizer.version, "vocabulary": tokenizer.vocab_size, "sha256": sha256_of(tokenizer.path)}
    facts["tokenizer"] = {"file": tokenizer.path.name} | own
    sizes = facts.get("architecture")
    if sizes and (mismatch := tokenizer.mismatch(sizes["vocab_size"])):
        raise UserError(mismatch)


def _other(path: Path, facts: Facts, find: Find) -> None:
    """Raises UserError, which says what else it is."""
    if runs := [name.removesuffix("/config.toml") for name in facts["files"] if name.endswith("/config.toml")]:
        facts["kind"] = "runs"
        raise UserError(f"{path}: holds runs, and is none; name one: {', '.join(runs)}")
    if path.is_file():
        facts["kind"] = "file"
        raise UserError(f"{path}: no file that tells all; name its folder, or if it holds data: minilora data check")
    _model(path, facts, find)


def _gguf(path: Path, facts: Facts, _: Find) -> None:
    keys, tensors = read_gguf(min(path.glob("*.gguf"), default=path))
    facts["keys"] = {key: f"{len(value)} values" if isinstance(value, list) else value for key, value in keys.items()}
    facts |= _listed(tensors) | {"read_by": "llama.cpp; minilora only compares what it wrote"}


_KINDS: tuple[tuple[str, tuple[str, ...], Callable[[Path, Facts, Find], None]], ...] = (
    # what one file of each is called, and who looks closer; the last one says why it is none of them
    ("adapter", (CONFIG, MISTRAL_WEIGHTS), _adapter),
    ("run", ("config.toml",), _run),
    ("checkpoint of a run", ("state.json",), _state),
    ("GGUF", ("*.gguf",), _gguf),
    ("model", ("config.json", "params.json", "*.safetensors"), _model),
    ("tokenizer", (*TOKENIZER_FILES, "tekken.json", "tokenizer.json"), _tokenizer),
    ("model", (), _other),
)
