"""A checkpoint folder, opened: every header held against the config before any memory is taken.

The rules are strict. A tensor that is missing, unknown, of another shape or of another type than a float stops the
load with a line that names it; nothing is filled with random numbers, nothing is skipped silently except the rotary
frequencies that old converters stored.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.checkpoint.config_files import read_config
from minilora.checkpoint.json_file import short
from minilora.checkpoint.layout import CONFIG_NAMES, Layout, find_layout, read_entries
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.checkpoint.nf4_file import PARTS, NF4Entry, is_packed, open_nf4
from minilora.checkpoint.provenance import read_provenance
from minilora.checkpoint.safetensors_file import DTYPES, FLOATS, TensorEntry
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.hub import hub_name, local_folder

TIED_HEAD = TensorSpec("lm_head", "output", ())  # not needed, but may be stored beside the embedding that it equals


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: its sizes, and where each tensor lies. Iterate `tensors()`, `read` one at a time."""

    name: str  # for people: the folder's, "demo", or ORG/NAME@COMMIT
    folder: Path
    layout: Layout
    config: ModelConfig
    entries: dict[str, TensorEntry]  # by our name
    nf4: dict[str, NF4Entry]  # those that are quantized already, by our name

    def tensors(self) -> Iterator[TensorSpec]:
        return tensor_specs(self.config)

    def read(self, spec: TensorSpec) -> Tensor:
        """One tensor in the file's dtype, on the CPU, its rows in our order; one in NF4 dequantized."""
        if spec.name in self.nf4:
            return self.nf4[spec.name].read().dequantize()
        return spec.from_layout(self.entries[spec.name].read(), self.layout)

    def dtype_of(self, spec: TensorSpec) -> torch.dtype:
        """The dtype that `read` gives."""
        packed = self.nf4.get(spec.name)
        return packed.dtype if packed else DTYPES[self.entries[spec.name].dtype]

    def check_unchanged(self) -> None:
        """Raise UserError if one of the files has changed since it was opened."""
        for entry in {entry.file: entry for entry in self.entries.values()}.values():
            entry.check_unchanged()

    @property
    def double_quant(self) -> bool:
        """Whether there are weights in NF4 whose absmax are in 8 bits."""
        return any(entry.nested_offset is not None for entry in self.nf4.values())

    def refuse_nf4(self, who: str) -> None:
        """Raise UserError if there are weights in NF4; `who` needs them plain."""
        if self.nf4:
            use = 'use them so (to train, with train.strategy "qlora"), or the checkpoint that they were made from'
            raise UserError(
                f"{self.folder}: {who} needs plain weights, but by these files model.quantize is nf4; {use}"
            )

    def check_tied_head(self) -> None:
        """Raise UserError if the embedding is said to be the head, too, yet the files hold another head."""
        head = self.entries.get(TIED_HEAD.name) if self.config.tied_embeddings else None
        if head and not torch.equal(head.read(), self.entries["embed_tokens.weight"].read()):
            config = CONFIG_NAMES[self.layout]
            raise UserError(f"{head.file}: {head.key} is not the embedding, though {config} ties them")

    def fingerprint(self) -> str:
        """sha256 over each tensor's name, type, shape, and its first and last row, in hexadecimal.

        It is the same for every sharding and for both layouts (which leave those rows where they are), and reads a few
        pages a tensor. Of a tensor in NF4 it takes the state (but for spaces), and the ends of the codes and the
        absmax (`NF4Entry.ends`): the same for every sharding and storage type, but another one than that of
        the weights before they were quantized. It tells one model or fine-tune from another; it does not see a change
        within a matrix, such as a flipped bit: hash the files themselves for that.
        """
        digest = hashlib.sha256()
        for spec in self.tensors():
            if packed := self.nf4.get(spec.name):
                kind = f"NF4/{packed.block_size} {packed.dtype} {packed.nested_offset}"
                shape, ends = packed.shape, packed.ends()
            else:
                entry = self.entries[spec.name]
                kind, shape, ends = entry.dtype, entry.shape, entry.read_ends(entry.nbytes // entry.shape[0])
            digest.update(f"{spec.name} {kind} {list(shape)}\n".encode())
            for end in ends:
                digest.update(end.numpy().data)
        return digest.hexdigest()

    def converted_from(self) -> str | None:
        """The fingerprint of what `minilora quantize` or `export`, once or in turn, made it of; None of an original."""
        fingerprint = (read_provenance(self.folder).get("export") or {}).get("fingerprint")
        return fingerprint if isinstance(fingerprint, str) else None

    def made_of(self, to: str) -> dict[str, str]:
        """What minilora.json tells, by the key "export", of a model that is made of this one in the form `to`."""
        return {"to": to, "from": self.name, "fingerprint": self.converted_from() or self.fingerprint()}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of either layout, "demo", or a name on the hub (hub.py).

    Only headers are read, and the states of tensors in NF4.

    Raises UserError for a folder that is no checkpoint, a bad config, a corrupt header, and for tensors that are
    missing, unknown, misshapen or of a type other than F32, BF16, F16 and bitsandbytes' NF4.
    """
    folder = local_folder(path)
    layout = find_layout(folder)
    config, may_pack = read_config(folder, layout)
    held = read_entries(folder, layout)
    if config.n_layers > len(held):  # a made-up number of layers must not make us list billions of names
        counts = f"the files hold {len(held):,} tensors, but {CONFIG_NAMES[layout]} says {config.n_layers:,} layers"
        raise UserError(f"{folder}: {counts}")
    specs = {spec.key(layout): spec for spec in tensor_specs(config)}
    if config.tied_embeddings and (head := TIED_HEAD.key(layout)) in held:
        specs[head] = replace(TIED_HEAD, shape=(config.vocab_size, config.dim))
    _refuse(folder, "missing tensor", [key for key in specs if key not in held])
    if layout == "hf" and not may_pack and (key := next((k for k in specs if is_packed(k, held)), None)):
        lacks = "config.json lacks quantization_config; fetch config.json again"
        raise UserError(f"{folder}: {key} is in NF4, but {lacks}")
    packed = {key for key, spec in specs.items() if may_pack and spec.is_projection and is_packed(key, held)}
    known = {*specs, *(f"{key}.{part}" for key in packed for part in PARTS)}
    unknown = (key for key in held if key not in known and not key.endswith("rotary_emb.inv_freq"))
    _refuse(folder, "unknown tensor", [short(key) for key in unknown])
    faults = (_fault(spec, held[key]) for key, spec in specs.items() if key not in packed)
    _refuse(folder, "wrong tensor", [fault for fault in faults if fault])
    if may_pack and not packed:
        raise UserError(f"{folder}: no tensor is in NF4, though config.json has a quantization_config; delete that key")
    nf4 = {specs[key].name: open_nf4(key, specs[key].shape, held) for key in specs if key in packed}
    name = "demo" if path == "demo" else os.path.basename(os.path.realpath(folder))  # of the hub's, the commit
    name = f"{hub[0]}@{name}" if (hub := hub_name(path)) else name
    return Checkpoint(name, folder, layout, config, {spec.name: held[key] for key, spec in specs.items()}, nf4)


def _fault(spec: TensorSpec, entry: TensorEntry) -> str | None:
    """What is wrong with the tensor in the file, None if nothing is."""
    if entry.dtype not in FLOATS:
        return f"{entry.key} in {entry.file.name}, stored as {entry.dtype}: only {', '.join(FLOATS)} can be read"
    if entry.shape != spec.shape:
        return f"{entry.key} in {entry.file.name}, shape {short(entry.shape)}: the config wants {spec.shape}"
    return None


def _refuse(folder: Path, kind: str, faults: list[str]) -> None:
    """Raise UserError for the first of `faults`, with the count of the others."""
    if faults:
        others = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
        raise UserError(f"{folder}: {kind}{others}: {faults[0]}")
