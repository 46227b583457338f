"""A model to a folder, in Hugging Face's layout or Mistral's own, one tensor at a time.

The weights are an iterator of (name, tensor) in the order of `names.tensor_specs`, the model's own by default. One that
makes them on the way writes a model that is nowhere in memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.backend import dtype_name
from minilora.checkpoint.config_files import EndIds, config_to_hf, config_to_params
from minilora.checkpoint.files import copy_file
from minilora.checkpoint.finite import cast_finite
from minilora.checkpoint.json_file import write_json
from minilora.checkpoint.layout import CONFIG_NAMES, WEIGHTS_NAMES, Layout
from minilora.checkpoint.merge import plain_weight, refuse_prefix
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.checkpoint.nf4_file import nf4_lines
from minilora.checkpoint.safetensors_file import Line, write_safetensors
from minilora.checkpoint.write import atomic_folder
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.lora import Added
from minilora.model import Mistral

PlannedWeight = tuple[str, list[Line]]  # our name of a weight, and the lines that it takes in a file
# What goes into a folder: JSON files by name, and the weights of each safetensors file.
Plan = tuple[dict[str, dict[str, Any]], dict[str, list[PlannedWeight]]]
Finish = Callable[[Path], None]  # writes more into a folder, or looks at what was written, before it has its name
SPARE_BYTES = 50_000_000  # for headers, the small files and a tokenizer
MAX_SHARD_BYTES = 5_000_000_000  # but a shard has one weight at least


def save_hf(
    model: Mistral,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
    layout: Layout = "hf",
) -> None:
    """Write `model` as transformers reads it: config.json and model.safetensors, or shards and their index.

    dtype: of the files; NF4 weights are dequantized to it
    weights: (name, tensor) of every tensor in the order of `tensor_specs`; None is `model_weights(model)`
    tokenizer: a file to copy beside the weights
    overwrite: replace what stands in `folder`
    finish: as in `write_plan`
    layout: "mistral" is `save_mistral`

    Raises UserError if the model has adapters, a weight is not finite in `dtype`, or the folder cannot be written; the
    folder is then as it was.
    """
    specs = {spec.name: spec for spec in tensor_specs(model.config)}
    dtypes = dict.fromkeys(specs, dtype)
    plan = plan_hf(model.config, dtypes, layout=layout)
    named = ((specs[name], weight) for name, weight in weights or model_weights(model))
    write_plan(plan, folder, as_stored(named, dtypes, layout), [tokenizer] if tokenizer else [], overwrite, finish)


# As mistral-inference reads it: params.json and consolidated.safetensors, one file whatever its size.
save_mistral = partial(save_hf, layout="mistral")


def model_weights(model: Mistral) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `model` by our name, in the order of `tensor_specs`; NF4 weights dequantized one by one.

    Raises UserError if the model has adapters, which a file of weights would silently lack.
    """
    refuse_prefix(model.prefix)
    for spec in tensor_specs(model.config):
        layer = model.get_submodule(spec.module)
        if isinstance(layer, Added):
            raise UserError(f"{spec.module} has an adapter: merge it first, or save the adapter by itself")
        yield spec.name, plain_weight(layer)


def as_stored(
    weights: Iterable[tuple[TensorSpec, Tensor]], dtypes: Mapping[str, torch.dtype], layout: Layout
) -> Iterator[tuple[str, list[Tensor]]]:
    """Plain weights as `layout` has them, for `write_plan`. Raises UserError for numbers that a dtype cannot hold."""
    for spec, weight in weights:
        yield spec.name, [spec.to_layout(cast_finite(weight.detach(), dtypes[spec.name], spec.name), layout)]


def plan_hf(
    config: ModelConfig, dtypes: Mapping[str, torch.dtype], double_quant: bool | None = None, layout: Layout = "hf",
    eos: EndIds = 2,
) -> Plan:  # fmt: skip
    """The files of Hugging Face's layout: config.json, and the weights in one file, or in shards and their index.

    dtypes: of the plain weights, by our names
    double_quant: store the blocks' matrices in NF4, their absmax in 8 bits or not; None stores all weights plain
    layout: "mistral" is params.json, and all weights, plain, in one file
    eos: as `config_files.read_eos` has it
    """
    weights: list[PlannedWeight] = [
        (spec.name, nf4_lines(spec.key(layout), spec.shape, double_quant))
        if spec.is_projection and double_quant is not None
        else (spec.name, [(spec.key(layout), dtypes[spec.name], spec.shape)])
        for spec in tensor_specs(config)
    ]
    single = WEIGHTS_NAMES[layout]
    if layout == "mistral":
        return {CONFIG_NAMES[layout]: config_to_params(config)}, {single: weights}
    shards = list[list[PlannedWeight]]([[]])
    for weight in weights:
        if shards[-1] and _n_bytes([*shards[-1], weight]) > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [single], shards, strict=True))
    small: dict[str, Any] = {
        CONFIG_NAMES[layout]: config_to_hf(config, dtype_name(dtypes["embed_tokens.weight"]), double_quant, eos),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": eos},
    }
    if len(shards) > 1:
        weight_map = {key: name for name, shard in files.items() for _, lines in shard for key, _, _ in lines}
        small[f"{single}.index.json"] = {"metadata": {"total_size": _n_bytes(weights)}, "weight_map": weight_map}
    return small, files


def write_plan(
    plan: Plan,
    folder: str | Path,
    parts: Iterable[tuple[str, list[Tensor]]],
    beside: Sequence[str | Path] = (),
    overwrite: bool = False,
    finish: Finish | None = None,
) -> None:
    """Write what is planned into `folder`, at once and crash-safe, with a manifest.

    parts: each weight's name and the tensors of its lines, in the plan's order; ValueError if they differ from it
    beside: files to copy
    finish: called last of all; where it raises, nothing is left

    Raises UserError if a file to copy is missing, the space is short, or the folder stands or cannot be written.
    """
    small, files = plan
    for file in beside:
        if not os.path.isfile(file):
            what = "no regular file" if os.path.exists(file) else "no such file"
            raise UserError(f"{file}: {what}; the tokenizer is copied beside the weights")
    needed_bytes = sum(map(_n_bytes, files.values())) + SPARE_BYTES
    with atomic_folder(folder, overwrite=overwrite, needed_bytes=needed_bytes) as temp:
        for name, values in small.items():
            write_json(temp / name, values)
        for file in beside:
            copy_file(file, temp / Path(file).name)
        stream = iter(parts)
        for name, weights in files.items():
            lines = [line for _, lines in weights for line in lines]
            write_safetensors(temp / name, _in_order(weights, stream), lines)
        if next(stream, None) is not None:
            raise ValueError("there are more weights than the model has tensors")
        if finish:
            finish(temp)


def _in_order(weights: list[PlannedWeight], stream: Iterator[tuple[str, list[Tensor]]]) -> Iterator[Tensor]:
    """The tensors of the next weights of `stream`, which must be `weights`."""
    for (expected, _), (name, tensors) in zip(weights, stream, strict=False):
        if name != expected:
            raise ValueError(f"{expected} was expected next, not {name}")
        yield from tensors


def _n_bytes(weights: Sequence[PlannedWeight]) -> int:
    return sum(prod(shape) * dtype.itemsize for _, lines in weights for _, dtype, shape in lines)
