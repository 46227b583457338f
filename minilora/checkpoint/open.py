"""A checkpoint folder, opened: every header held against the config before any memory is taken.

The rules are strict. A tensor that is missing, unknown, of another shape or of another type than a float stops the
load with a line that names it; nothing is filled with random numbers, nothing is skipped silently except the rotary
frequencies that old converters stored.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.checkpoint.config_files import read_config
from minilora.checkpoint.json_file import short
from minilora.checkpoint.layout import CONFIG_NAMES, Layout, find_layout, read_entries
from minilora.checkpoint.names import TensorSpec, n_tensors, tensor_specs
from minilora.checkpoint.safetensors_file import FLOATS, TensorEntry
from minilora.config import ModelConfig, base_folder
from minilora.errors import UserError

TIED_HEAD = TensorSpec("lm_head", "output", ())  # not needed, but may be stored beside the embedding that it equals


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: its sizes, and where each tensor lies. Iterate `tensors()`, `read` one at a time."""

    folder: Path
    layout: Layout
    config: ModelConfig
    entries: dict[str, TensorEntry]  # by our name

    def tensors(self) -> Iterator[TensorSpec]:
        return tensor_specs(self.config)

    def read(self, spec: TensorSpec) -> Tensor:
        """One tensor in the file's dtype, on the CPU, its rows in our order. It may be a view of the mapped file."""
        return spec.from_layout(self.entries[spec.name].read(), self.layout)

    def check_tied_head(self) -> None:
        """Raise UserError if the embedding is said to be the head, too, yet the files hold another head."""
        head = self.entries.get(TIED_HEAD.name) if self.config.tied_embeddings else None
        if head and not torch.equal(head.read(), self.entries["embed_tokens.weight"].read()):
            raise UserError(
                f"{head.file}: {head.key} is not the embedding, though {CONFIG_NAMES[self.layout]} ties them"
            )

    def fingerprint(self) -> str:
        """sha256 over each tensor's name, type, shape, and its first and last row, in hexadecimal.

        It is the same for every sharding and for both layouts (which leave those rows where they are), and reads a few
        pages a tensor. It tells one model or fine-tune from another; it does not see a change within a matrix, such
        as a flipped bit: hash the files themselves for that.
        """
        digest = hashlib.sha256()
        for spec in self.tensors():
            entry = self.entries[spec.name]
            digest.update(f"{spec.name} {entry.dtype} {list(entry.shape)}\n".encode())
            for row in entry.read_ends():
                digest.update(row.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of either layout, or "demo". Only headers are read.

    Raises UserError for a folder that is no checkpoint, a bad config, a corrupt header, and for tensors that are
    missing, unknown, misshapen or of a type other than F32, BF16 and F16.
    """
    folder = base_folder(path)
    layout, config = find_layout(folder), read_config(folder)
    held = read_entries(folder, layout)
    if n_tensors(config) > len(held) + 1000:  # a made-up number of layers must not make us list billions of names
        counts = f"the files hold {len(held):,} tensors, {CONFIG_NAMES[layout]} expects {n_tensors(config):,}"
        raise UserError(f"{folder}: {counts}")
    specs = {spec.key(layout): spec for spec in tensor_specs(config)}
    if config.tied_embeddings and (head := TIED_HEAD.key(layout)) in held:
        specs[head] = replace(TIED_HEAD, shape=(config.vocab_size, config.dim))
    _refuse(folder, "missing tensor", [key for key in specs if key not in held])
    unknown = (key for key in held if key not in specs and not key.endswith("rotary_emb.inv_freq"))
    _refuse(folder, "unknown tensor", [short(key) for key in unknown])
    faults = (_fault(spec, held[key]) for key, spec in specs.items())
    _refuse(folder, "wrong tensor", [fault for fault in faults if fault])
    return Checkpoint(folder, layout, config, {spec.name: held[key] for key, spec in specs.items()})


def _fault(spec: TensorSpec, entry: TensorEntry) -> str | None:
    """What is wrong with the tensor in the file, None if nothing is."""
    if entry.dtype not in FLOATS:
        return f"{entry.key} in {entry.file.name}, stored as {entry.dtype}: only {', '.join(FLOATS)} can be read"
    if entry.shape != spec.shape:
        return f"{entry.key} in {entry.file.name}, shape {short(entry.shape)}: the config wants {spec.shape}"
    return None


def _refuse(folder: Path, kind: str, found: list[str]) -> None:
    """Raise UserError for the first of `found`, with the count of the others."""
    if found:
        others = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        raise UserError(f"{folder}: {kind}{others}: {found[0]}")
