"""A checkpoint in the formats of other programs. Each is reopened and held against its source before it gets its name.

    hf            config.json, model.safetensors               each weight equal, in the dtype that was asked for
    mistral       params.json, consolidated.safetensors        the same
    bnb-4bit      as `minilora quantize` writes it             codes and absmax equal
    gguf-f16      one file for llama.cpp                       each weight equal, in F16
    gguf-q8_0     the same in 8 bits                           each weight within half a step

A tensor at a time, so memory holds a few of them. Beside the weights lie the tokenizer, README.md, which is the model's
card, and minilora.json: where all of it comes from.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minilora.checkpoint.card import model_card
from minilora.checkpoint.chat_template import tokenizer_config
from minilora.checkpoint.gguf_file import GGUFKind, compare_gguf, gguf_keys, write_gguf
from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.layout import Layout
from minilora.checkpoint.load import quantize_weight
from minilora.checkpoint.names import TensorSpec
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import PROVENANCE, PROVENANCE_VERSION
from minilora.checkpoint.quantize import quantize_checkpoint, tokenizer_files
from minilora.checkpoint.safetensors_file import DTYPES
from minilora.checkpoint.save import SPARE_BYTES, write_layout
from minilora.checkpoint.write import atomic_folder, check_target, sweep_stale
from minilora.config import base_folder
from minilora.errors import UserError, need_library
from minilora.tokenizer import Tokenizer, load_tokenizer


@dataclass
class _Job:
    """What is exported where, and how far it has come: each weight is written, then compared."""

    source: Checkpoint
    out: Path
    to: str
    dtype: torch.dtype | None
    tokenizer: Tokenizer | None
    own_files: list[Path]  # the source's tokenizer, unless another was given
    overwrite: bool
    progress: Callable[[int, int], None]
    done: int = 0

    def weights(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        for spec in self.source.tensors():
            yield spec, self.source.read(spec)
            self.done += prod(spec.shape)
            self.progress(self.done, 2 * self.source.config.n_parameters)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the files, by our names."""
        own = {name: DTYPES[entry.dtype] for name, entry in self.source.entries.items()}
        own |= {name: entry.dtype for name, entry in self.source.nf4.items()}
        return {spec.name: self.dtype or own[spec.name] for spec in self.source.tensors()}


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> tuple[str, list[str]]:
    """Write the checkpoint `source`, of either layout or in NF4 or "demo", to the folder `out`; what was compared, and
    what a user of it should know.

    to: a key of `FORMATS`
    dtype: of the files, where the format leaves a choice; None is each tensor's own
    tokenizer: a file or folder, where it does not lie with the source; GGUF needs one
    progress: called after each tensor with the weights done and those to do, which are written and compared

    Raises UserError if the source is wrong or changes meanwhile, if `out` stands or cannot be written, if a number does
    not fit the dtype, and if what was written is not what it should be; `out` is then as it was.
    """
    checkpoint = open_checkpoint(source)
    has_one = tokenizer or any(checkpoint.folder.glob("*tokenizer*.model*"))
    found = load_tokenizer(tokenizer or checkpoint.folder) if has_one else None
    check_target(out, overwrite, [checkpoint.folder])
    sweep_stale(Path(out).absolute().parent, Path(out).name)
    checkpoint.check_tied_head()
    own = [] if tokenizer else tokenizer_files(checkpoint.folder)
    job = _Job(checkpoint, Path(out), to, dtype, found, own, overwrite, progress)
    return FORMATS[to](job), _notes(job)


def _write_layout(layout: Layout, job: _Job) -> str:
    weights = ((spec.name, weight) for spec, weight in job.weights())
    options = {"overwrite": job.overwrite, "finish": partial(_compare, job, layout)}
    write_layout(layout, job.source.config, job.dtypes(), weights, job.out, options)
    return f"{len(job.dtypes())} tensors reopened and compared: all equal"


def _write_nf4(job: _Job) -> str:
    def progress(done: int, of: int) -> None:
        job.progress(done, 2 * of)

    finish = partial(_compare, job, "hf")
    quantize_checkpoint(
        job.source.folder, job.out, dtype=job.dtype, overwrite=job.overwrite, progress=progress, finish=finish
    )
    return f"{len(job.dtypes())} tensors reopened and compared: codes, absmax and all else equal"


def _compare(job: _Job, layout: Layout, folder: Path) -> None:
    """Hold what was written against the source, a weight in NF4 against one quantized anew; add the small files."""
    written, dtypes, job.done = open_checkpoint(folder), job.dtypes(), job.source.config.n_parameters
    for spec, weight in job.weights():
        if packed := written.nf4.get(spec.name):
            got, expected = packed.read(), quantize_weight(weight, spec.name, True)
            pairs = [(got.packed, expected.packed), (got.block_absmax(), expected.block_absmax())]
        else:
            pairs = [(written.read(spec), weight.to(dtypes[spec.name]))]
        if written.config != job.source.config or not all(torch.equal(a, b) for a, b in pairs):
            raise UserError(f"{job.out}: not written: read back, {spec.name} differs; export again, and report it")
    job.source.check_unchanged()
    _write_beside(job, layout, folder)


def _write_gguf(kind: GGUFKind, job: _Job) -> str:
    need_library("gguf", "gguf", "a GGUF file")
    if job.dtype is not None:
        raise UserError(f"{job.to} says itself which dtype it has; leave --dtype out")
    if job.tokenizer is None:
        raise UserError(f"{job.source.folder}: holds no tokenizer.model, which GGUF needs; name one with --tokenizer")
    config, name = job.source.config, job.out.resolve().name
    keys = gguf_keys(config, job.tokenizer, kind, name)
    n_bytes = int(config.n_parameters * {"F16": 2, "Q8_0": 34 / 32}[kind]) + SPARE_BYTES
    with atomic_folder(job.out, overwrite=job.overwrite, manifest={}, needed_bytes=n_bytes) as folder:
        write_gguf(folder / f"model-{kind.lower()}.gguf", keys, config, job.weights(), kind)
        compare_gguf(folder / f"model-{kind.lower()}.gguf", keys, config, job.weights(), kind)
        job.source.check_unchanged()
        _write_beside(job, None, folder)
    how = "all equal in F16" if kind == "F16" else "all within half a step"
    return f"{len(job.dtypes())} tensors, the tokenizer and its template read back and compared: {how}"


FORMATS: dict[str, Callable[[_Job], str]] = {
    "hf": partial(_write_layout, "hf"),
    "mistral": partial(_write_layout, "mistral"),
    "bnb-4bit": _write_nf4,
    "gguf-f16": partial(_write_gguf, "F16"),
    "gguf-q8_0": partial(_write_gguf, "Q8_0"),
}


def _write_beside(job: _Job, layout: Layout | None, folder: Path) -> None:
    """The small files: tokenizer, card, provenance. None: the weights' file has the tokenizer itself."""
    home, tokenizer, name = job.source.folder, job.tokenizer, job.source.folder.resolve().name
    licence = _license(home / "README.md")
    if home == base_folder("demo"):
        name, licence = "demo", "apache-2.0"
    origin = {"to": job.to, "from": name, "fingerprint": job.source.fingerprint()}
    theirs = read_json(home / PROVENANCE) if (home / PROVENANCE).exists() else {}
    facts = {"license": licence, **theirs, "format_version": PROVENANCE_VERSION, "export": origin}
    version = tokenizer.version if tokenizer else None
    card = model_card(job.out.resolve().name, job.to, job.source.config, facts, tokenizer=version, notes=_notes(job))
    (folder / "README.md").write_text(card, "utf-8")
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n")
    for file in job.own_files if layout else ():
        shutil.copyfile(file, folder / file.name)
    if tokenizer and layout == "mistral":  # mistral-common takes the version from the name, and wants one such file
        for copied in folder.glob("*tokenizer*"):
            copied.unlink()
        shutil.copyfile(tokenizer.path, folder / f"tokenizer.model.{tokenizer.version}")
    elif tokenizer and layout and not (folder / "tokenizer_config.json").exists():
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(tokenizer_config(tokenizer.version), "utf-8")


def _notes(job: _Job) -> list[str]:
    """What a user of the export should know."""
    window, notes = job.source.config.sliding_window, list[str]()
    if window and job.to.startswith("gguf"):
        agree = f"its answers agree with the model's up to {window:,} tokens only"
        notes.append(f"llama.cpp knows no sliding window, so {agree}; that is the context length in the file")
    if job.source.nf4:
        notes.append("The weights were in NF4: these are their dequantized values.")
    return notes


def _license(card: Path) -> str | None:
    """As the source's own card has it: a line of the block that it begins with."""
    head = card.read_text("utf-8", errors="replace")[:4096] if card.is_file() else ""
    found = re.match(r"---\n(?:(?!---).*\n)*?license:[ \t]*([\w.-]+)[ \t]*\n", head)
    return found[1] if found else None
