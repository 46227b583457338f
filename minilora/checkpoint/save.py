"""A model to a folder, in Hugging Face's layout or Mistral's own, one tensor at a time.

The weights are an iterator of (name, tensor) in the order of `names.tensor_specs`, the model's own by default. One that
makes them on the way writes a model that is nowhere in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.checkpoint.config_files import config_to_hf, config_to_params
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.layout import CONFIG_NAMES, WEIGHTS_NAMES, Layout
from minilora.checkpoint.merge import plain_weight, refuse_prefix
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.safetensors_file import Line, write_safetensors
from minilora.checkpoint.write import atomic_folder
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.lora import Added
from minilora.model import Mistral

Weights = Iterable[tuple[str, Tensor]]
PlannedWeight = tuple[str, list[Line]]  # our name of a weight, and the lines that it takes in a file
SPARE_BYTES = 50_000_000  # for headers, the small files and a tokenizer
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Plan:
    """What goes into a folder: JSON files by name, and the weights of each safetensors file."""

    small: dict[str, dict[str, Any]]
    files: dict[str, list[PlannedWeight]]


def save_hf(
    model: Mistral,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: Weights | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    layout: Layout = "hf",
) -> None:
    """Write `model` as transformers reads it: config.json and model.safetensors, or shards and their index.

    dtype: of the files; NF4 weights are dequantized to it
    max_shard_bytes: largest file, unless one tensor is larger
    weights: (name, tensor) of every tensor in the order of `tensor_specs`; None is `model_weights(model)`
    tokenizer: a file to copy beside the weights
    overwrite: replace what stands in `folder`
    layout: "mistral" is `save_mistral`

    Raises UserError if the model has adapters, a weight is not finite in `dtype`, or the folder cannot be written; the
    folder is then as it was.
    """
    options = {"beside": [tokenizer] if tokenizer else [], "overwrite": overwrite}
    write_layout(layout, model.config, dtype, weights or model_weights(model), folder, options, max_shard_bytes)


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


def write_layout(
    layout: Layout,
    config: ModelConfig,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    weights: Weights,
    folder: str | Path,
    options: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write plain weights in either layout; Mistral's has one file of them.

    dtype: of the files, one or each tensor's own by its name
    options: of `write_plan`
    """
    specs = list(tensor_specs(config))
    dtypes = dtype if isinstance(dtype, Mapping) else {spec.name: dtype for spec in specs}
    planned = [(spec.name, [(spec.key(layout), dtypes[spec.name], spec.shape)]) for spec in specs]
    if layout == "hf":
        main = str(dtypes["embed_tokens.weight"]).removeprefix("torch.")
        plan = plan_hf(config_to_hf(config, main), planned, max_shard_bytes)
    else:
        plan = Plan({CONFIG_NAMES[layout]: config_to_params(config)}, {WEIGHTS_NAMES[layout]: planned})

    def prepared() -> Iterator[tuple[str, list[Tensor]]]:
        for spec, (name, weight) in zip(specs, weights, strict=True):
            cast = weight.detach().to(dtypes[name])
            refuse_not_finite(cast, name, f"save it in another dtype than {cast.dtype}")
            yield name, [spec.to_layout(cast, layout)]

    write_plan(plan, folder, prepared(), **options)


def plan_hf(config: dict[str, Any], weights: Sequence[PlannedWeight], max_shard_bytes: int) -> Plan:
    """The files of Hugging Face's layout: `config` as config.json, `weights` in one file or in shards and their index.

    A shard has at most `max_shard_bytes`, but one weight at least.
    """
    shards: list[list[PlannedWeight]] = [[]]
    for weight in weights:
        if shards[-1] and _n_bytes([*shards[-1], weight]) > max_shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    single = WEIGHTS_NAMES["hf"]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [single], shards, strict=True))
    small: dict[str, Any] = {
        CONFIG_NAMES["hf"]: config,
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
    }
    if len(shards) > 1:
        weight_map = {key: name for name, shard in files.items() for _, lines in shard for key, _, _ in lines}
        small[f"{single}.index.json"] = {"metadata": {"total_size": _n_bytes(weights)}, "weight_map": weight_map}
    return Plan(small, files)


def write_plan(
    plan: Plan,
    folder: str | Path,
    parts: Iterable[tuple[str, list[Tensor]]],
    beside: Sequence[str | Path] = (),
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write what is planned into `folder`, at once and crash-safe, with a manifest.

    parts: each weight's name and the tensors of its lines, in the plan's order; ValueError if they differ from it
    beside: files to copy
    finish: writes more into the folder, or looks at what was written, before it has its name; where it raises, nothing
        is left

    Raises UserError if a file to copy is missing, the space is short, or the folder stands or cannot be written.
    """
    for file in beside:
        if not Path(file).is_file():
            what = "no regular file" if Path(file).exists() else "no such file"
            raise UserError(f"{file}: {what}; the tokenizer is copied beside the weights")
    n_bytes = sum(map(_n_bytes, plan.files.values())) + sum(Path(file).stat().st_size for file in beside)
    with atomic_folder(folder, overwrite=overwrite, manifest={}, needed_bytes=n_bytes + SPARE_BYTES) as temp:
        for name, values in plan.small.items():
            (temp / name).write_text(json.dumps(values, indent=2) + "\n")
        for file in beside:
            shutil.copyfile(file, temp / Path(file).name)
        stream = iter(parts)
        for name, weights in plan.files.items():
            lines = [line for _, lines in weights for line in lines]
            write_safetensors(temp / name, _in_order(weights, stream), lines, {"format": "pt"})
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
