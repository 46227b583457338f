"""A checkpoint in the formats of other programs. Each is reopened and held against its source before it gets its name.

    hf            config.json, model.safetensors               each weight equal, in the dtype that was asked for
    mistral       params.json, consolidated.safetensors        the same
    bnb-4bit      as `minilora quantize` writes it             codes and absmax equal
    gguf-f16      one file for llama.cpp                       each matrix equal, in F16
    gguf-q8_0     the same in 8 bits                           codes and scales equal

A tensor at a time, so memory holds a few of them. Beside the weights lie the tokenizer, README.md, which is the model's
card, and minilora.json: where all of it comes from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.checkpoint.card import license_of, write_card
from minilora.checkpoint.chat_template import template_warnings, write_tokenizer
from minilora.checkpoint.config_files import read_eos
from minilora.checkpoint.files import copy_file
from minilora.checkpoint.gguf_file import GGUFKind, compare_gguf, gguf_keys, write_gguf
from minilora.checkpoint.layout import Layout
from minilora.checkpoint.load import Progress, quantize_weight, unheard
from minilora.checkpoint.names import TensorSpec
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import read_provenance, template_of, versions
from minilora.checkpoint.quantize import quantize_checkpoint, tokenizer_files
from minilora.checkpoint.save import SPARE_BYTES, as_stored, plan_hf, write_plan
from minilora.checkpoint.write import atomic_folder, check_target
from minilora.errors import UserError, need_library
from minilora.hub import hub_name
from minilora.nf4 import BLOCK_SIZE
from minilora.tokenizer import OLD_HF, Tokenizer, load_tokenizer


@dataclass
class _Job:
    """What is exported where, and how far it has come: each weight is written, then compared."""

    source: Checkpoint
    origin: dict[str, Any]  # what minilora.json tells of the source
    out: Path
    to: str
    dtype: torch.dtype | None
    tokenizer: Tokenizer | None
    own_files: list[Path]  # the source's tokenizer, unless another was given
    overwrite: bool
    progress: Progress
    done: int = 0

    def weights(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        for spec in self.source.tensors():
            yield spec, self.source.read(spec)
            self.done += prod(spec.shape)
            self.progress(self.done, 2 * self.source.config.n_parameters)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the files, by our names."""
        return {spec.name: self.dtype or self.source.dtype_of(spec) for spec in self.source.tensors()}


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = unheard,
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
    home, origin = checkpoint.folder, read_provenance(checkpoint.folder)
    found = None
    if tokenizer or any(home.glob("*tokenizer*.model*")):
        found = load_tokenizer(tokenizer or home, old_hf_spaces=template_of(origin) == OLD_HF)
        if mismatch := found.mismatch(checkpoint.config.vocab_size):
            raise UserError(mismatch)
    check_target(out, overwrite, [home])
    checkpoint.check_tied_head()
    base_path = {"base_path": checkpoint.name} if hub_name(source) else {}
    origin = {"license": license_of(home), "versions": versions(), **base_path, **origin}
    origin["export"] = checkpoint.made_of(to)
    own = [] if tokenizer else tokenizer_files(home)
    job = _Job(checkpoint, origin, Path(out), to, dtype, found, own, overwrite, progress)
    return FORMATS[to](job), _notes(job)


def _write_layout(layout: Layout, job: _Job) -> str:
    dtypes, source = job.dtypes(), job.source
    plan = plan_hf(source.config, dtypes, layout=layout, eos=read_eos(source.folder, source.config))
    parts = as_stored(job.weights(), dtypes, layout)
    write_plan(plan, job.out, parts, overwrite=job.overwrite, finish=partial(_compare, job, layout))
    return f"{len(dtypes)} tensors reopened and compared: all equal"


def _write_nf4(job: _Job) -> str:
    quantize_checkpoint(
        job.source.folder, job.out, dtype=job.dtype, overwrite=job.overwrite,
        progress=lambda done, of: job.progress(done, 2 * of), finish=partial(_compare, job, "hf"),
    )  # fmt: skip
    return f"{len(job.dtypes())} tensors reopened and compared: codes, absmax and all else equal"


def _compare(job: _Job, layout: Layout, folder: Path) -> None:
    """Hold what was written against the source, a weight in NF4 against one quantized anew; add the small files."""
    written, dtypes, job.done = open_checkpoint(folder), job.dtypes(), job.source.config.n_parameters
    wrong = [] if written.config == job.source.config else ["the config"]
    for spec, weight in job.weights():
        if packed := written.nf4.get(spec.name):
            got, expected = packed.read().parts, quantize_weight(weight, spec.name, True).parts
        else:
            got, expected = [written.read(spec)], [weight.to(dtypes[spec.name])]
        if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            wrong.append(spec.name)
    if wrong:
        raise UserError(f"{job.out}: not written: read back, {wrong[0]} differs; export again, and report it")
    _write_beside(job, layout, folder)


def _write_gguf(kind: GGUFKind, job: _Job) -> str:
    need_library("gguf", "gguf", "a GGUF file")
    if job.dtype is not None:
        raise UserError(f"{job.to} says itself which dtype it has; leave --dtype out")
    if job.tokenizer is None:
        needs = "holds no tokenizer.model, which GGUF needs; name one with --model.tokenizer"
        raise UserError(f"{job.source.folder}: {needs}")
    config, name = job.source.config, job.out.resolve().name
    keys = gguf_keys(config, job.tokenizer, kind, name, read_eos(job.source.folder, config))
    n_bytes = int(config.n_parameters * {"F16": 2, "Q8_0": 34 / 32}[kind]) + SPARE_BYTES
    with atomic_folder(job.out, overwrite=job.overwrite, needed_bytes=n_bytes) as folder:
        write_gguf(folder / f"model-{kind.lower()}.gguf", keys, config, job.weights(), kind)
        compare_gguf(folder / f"model-{kind.lower()}.gguf", keys, config, job.weights(), kind)
        _write_beside(job, None, folder)
    return f"{len(job.dtypes())} tensors, the tokenizer and its template read back and compared: all equal in {kind}"


FORMATS: dict[str, Callable[[_Job], str]] = {
    "hf": partial(_write_layout, "hf"),
    "mistral": partial(_write_layout, "mistral"),
    "bnb-4bit": _write_nf4,
    "gguf-f16": partial(_write_gguf, "F16"),
    "gguf-q8_0": partial(_write_gguf, "Q8_0"),
}


def _write_beside(job: _Job, layout: Layout | None, folder: Path) -> None:
    """The small files: tokenizer, card, provenance, once all weights are known to be of one source.

    layout: None: the weights' file has the tokenizer itself
    """
    job.source.check_unchanged()
    tokenizer, name = job.tokenizer, job.out.resolve().name
    template = tokenizer.template if tokenizer else None
    write_card(folder, name, job.to, job.source.config, job.origin, tokenizer=template, notes=_notes(job))
    if tokenizer and layout == "mistral":  # mistral-common takes the version from the name, and wants one such file
        copy_file(tokenizer.path, folder / f"tokenizer.model.{tokenizer.version}")
    elif layout:
        for file in job.own_files:
            copy_file(file, folder / file.name)
        if tokenizer and not (folder / "tokenizer_config.json").exists():
            write_tokenizer(tokenizer, folder)


def _notes(job: _Job) -> list[str]:
    """What a user of the export should know."""
    window, notes = min(filter(None, job.source.config.windows), default=None), list[str]()
    if window and job.to.startswith("gguf"):
        agree = f"its answers agree with the model's up to {window:,} tokens only; that is the file's context length"
        notes.append(f"llama.cpp knows no sliding window for the llama architecture, so {agree}")
    if job.source.nf4:
        notes.append("The weights were in NF4: these are their dequantized values.")
    if job.to == "bnb-4bit" and any(s.is_projection and s.shape[1] % BLOCK_SIZE for s in job.source.tensors()):
        notes.append(f"With AVX512 bitsandbytes 0.50 decodes rows wrongly that are no multiple of {BLOCK_SIZE}.")
    if job.to == "mistral" and job.tokenizer and job.tokenizer.template == OLD_HF:
        notes.append("mistral-common puts a space before each earlier answer, which this model (v1-hf) has never seen.")
    keeps_own = job.to in ("hf", "bnb-4bit") and any(f.name == "tokenizer_config.json" for f in job.own_files)
    if job.tokenizer and not keeps_own:
        notes += [f"{text}." for text in template_warnings(job.source.folder, job.tokenizer.template, job.origin)]
    return notes
