"""A checkpoint to a checkpoint in NF4, which transformers and bitsandbytes load as it is: a weight at a time.

    read the next weight | quantize this one | write the one before

Each of the three goes on in a thread of its own, so the slowest alone sets the pace; a weight or two of each stage is
all that memory holds.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from minilora.checkpoint.config_files import read_eos
from minilora.checkpoint.finite import cast_finite
from minilora.checkpoint.layout import inside
from minilora.checkpoint.load import Progress, quantize_weight, unheard
from minilora.checkpoint.names import TensorSpec
from minilora.checkpoint.nf4_file import nf4_tensors
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import read_provenance, versions, write_provenance
from minilora.checkpoint.save import Finish, plan_hf, write_plan
from minilora.checkpoint.write import check_target
from minilora.config import TOKENIZER_FILES
from minilora.errors import UserError

T = TypeVar("T")


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = unheard,
    finish: Finish | None = None,
) -> None:
    """Write the checkpoint `source`, of either layout or "demo", to the folder `out` with its blocks' matrices in NF4.

    double_quant: also store the absmax in 8 bits
    dtype: of all else, and what the matrices are dequantized to; None is each tensor's own
    overwrite: as in `save_hf`
    progress: called after each tensor with the weights written and the weights in all
    finish: as in `write_plan`, in place of writing where the checkpoint comes from

    Raises UserError if the source is wrong, quantized already or changes meanwhile, by name and index for a number that
    is not finite, and if `out` stands, holds the source, or cannot be written; it is then as it was.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.nf4:
        raise UserError(f"{checkpoint.folder}: is in NF4 already; name the checkpoint that it was made from")
    check_target(out, overwrite, [checkpoint.folder])
    checkpoint.check_tied_head()
    specs = list(checkpoint.tensors())
    dtypes = {spec.name: dtype or checkpoint.dtype_of(spec) for spec in specs}
    plan = plan_hf(checkpoint.config, dtypes, double_quant, eos=read_eos(checkpoint.folder, checkpoint.config))
    tokenizers = [] if finish else tokenizer_files(checkpoint.folder)
    told = {"versions": versions(), **read_provenance(checkpoint.folder), "export": checkpoint.made_of("bnb-4bit")}
    finish = finish or partial(write_provenance, told=told)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as quantizer:
        read = _ahead(reader, ((spec, checkpoint.read(spec)) for spec in specs))
        stored = _ahead(quantizer, ((s, _stored(checkpoint, s, w, dtypes[s.name], double_quant)) for s, w in read))
        write_plan(plan, out, _told(checkpoint, stored, progress), tokenizers, overwrite, finish)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of all tokenizers in `folder`. Raises UserError for what is no file, and for a link out of it."""
    found = sorted(f for f in folder.iterdir() if any(map(f.match, TOKENIZER_FILES)))
    for file in found:
        if not os.path.isfile(file):
            raise UserError(f"{file}: a broken link or no file; put the tokenizer's own file there, or remove it")
        inside(folder, file.name)
    return found


def _stored(source: Checkpoint, spec: TensorSpec, weight: Tensor, dtype: torch.dtype, nested: bool) -> list[Tensor]:
    """What the weight becomes in the file. Raises UserError for numbers that `dtype` cannot hold."""
    name = f"{source.entries[spec.name].file}: {spec.name}"
    if not spec.is_projection:
        return [cast_finite(weight, dtype, name)]
    nf4 = quantize_weight(weight, name, nested)
    # Each block's largest number is dequantized to its absmax.
    cast_finite(nf4.block_absmax(), dtype, f"{name}: absmax of its blocks")
    return nf4_tensors(replace(nf4, dtype=dtype))


def _told(
    checkpoint: Checkpoint, stored: Iterator[tuple[TensorSpec, list[Tensor]]], progress: Progress
) -> Iterator[tuple[str, list[Tensor]]]:
    """`stored` by name; after each weight progress is told, and at the end the source must be as it was."""
    done = 0
    for spec, tensors in stored:
        yield spec.name, tensors
        done += prod(spec.shape)
        progress(done, checkpoint.config.n_parameters)
    checkpoint.check_unchanged()


def _ahead(thread: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    """`items`; while the caller works on one, the thread makes the next."""
    coming = thread.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = thread.submit(next, items, None)
        yield item
