"""A model to a folder, in Hugging Face's layout or Mistral's own, one tensor at a time.

The weights are an iterator of (name, tensor) in the order of `names.tensor_specs`, the model's own by default. A merge
passes another one that adds its deltas on the way, so writing needs no second model in memory.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.checkpoint.config_files import config_to_hf, config_to_params
from minilora.checkpoint.layout import CONFIG_NAMES, WEIGHTS_NAMES, Layout
from minilora.checkpoint.merge import plain_weight
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.checkpoint.safetensors_file import write_safetensors
from minilora.checkpoint.write import atomic_folder
from minilora.errors import UserError
from minilora.lora import LoRALinear
from minilora.model import Mistral

Weights = Iterable[tuple[str, Tensor]]
_SPARE_BYTES = 50_000_000  # for headers, the small files and a tokenizer


def save_hf(
    model: Mistral,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
    weights: Weights | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` as transformers reads it: config.json and model.safetensors, or shards and their index.

    dtype: of the files; NF4 weights are dequantized to it
    max_shard_bytes: largest file, unless one tensor is larger
    weights: (name, tensor) of every tensor in the order of `tensor_specs`; None is `model_weights(model)`
    tokenizer: a file to copy beside the weights
    overwrite: replace what stands in `folder`

    Raises UserError if the model has adapters, a weight is not finite in `dtype`, or the folder cannot be written; the
    folder is then as it was.
    """
    shards = _shards(list(tensor_specs(model.config)), dtype, max_shard_bytes)
    single = WEIGHTS_NAMES["hf"]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [single], shards, strict=True))
    small: dict[str, Any] = {
        CONFIG_NAMES["hf"]: config_to_hf(model.config, str(dtype).removeprefix("torch.")),
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
    }
    if len(shards) > 1:
        total = sum(_n_bytes(spec, dtype) for spec in tensor_specs(model.config))
        weight_map = {spec.key("hf"): name for name, shard in files.items() for spec in shard}
        small[f"{single}.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write(_Plan("hf", small, files, dtype), folder, weights or model_weights(model), tokenizer, overwrite)


def save_mistral(
    model: Mistral,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: Weights | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` as mistral-inference reads it: params.json, consolidated.safetensors. Arguments as in `save_hf`."""
    files = {WEIGHTS_NAMES["mistral"]: list(tensor_specs(model.config))}
    small = {CONFIG_NAMES["mistral"]: config_to_params(model.config)}
    _write(_Plan("mistral", small, files, dtype), folder, weights or model_weights(model), tokenizer, overwrite)


def model_weights(model: Mistral) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `model` by our name, in the order of `tensor_specs`; NF4 weights dequantized one by one.

    Raises UserError if the model has adapters, which a file of weights would silently lack.
    """
    for spec in tensor_specs(model.config):
        layer = model.get_submodule(spec.module)
        if isinstance(layer, LoRALinear):
            raise UserError(f"{spec.module} has an adapter: merge it first, or save the adapter by itself")
        yield spec.name, plain_weight(layer)


@dataclass(frozen=True)
class _Plan:
    """What goes into a folder: JSON files by name, and the tensors of each safetensors file."""

    layout: Layout
    small: dict[str, dict[str, Any]]
    files: dict[str, list[TensorSpec]]
    dtype: torch.dtype


def _write(plan: _Plan, folder: str | Path, weights: Weights, tokenizer: str | Path | None, overwrite: bool) -> None:
    if tokenizer and not Path(tokenizer).is_file():
        raise UserError(f"{tokenizer}: no such file; the tokenizer is copied beside the weights")
    n_bytes = sum(_n_bytes(spec, plan.dtype) for specs in plan.files.values() for spec in specs)
    with atomic_folder(folder, overwrite=overwrite, manifest={}, needed_bytes=n_bytes + _SPARE_BYTES) as temp:
        for name, values in plan.small.items():
            (temp / name).write_text(json.dumps(values, indent=2) + "\n")
        if tokenizer:
            shutil.copyfile(tokenizer, temp / Path(tokenizer).name)
        stream = iter(weights)
        for name, specs in plan.files.items():
            lines = [(spec.key(plan.layout), plan.dtype, spec.shape) for spec in specs]
            write_safetensors(temp / name, _prepared(specs, stream, plan), lines, {"format": "pt"})
        if next(stream, None) is not None:
            raise ValueError("there are more weights than the model has tensors")


def _prepared(specs: list[TensorSpec], stream: Iterator[tuple[str, Tensor]], plan: _Plan) -> Iterator[Tensor]:
    """The next tensors of `stream`, which must be those of `specs`, as the files of the layout have them."""
    for spec, (name, weight) in zip(specs, stream, strict=False):
        if name != spec.name:
            raise ValueError(f"{spec.name} was expected next, not {name}")
        cast = weight.detach().to(plan.dtype)
        if not cast.isfinite().all():
            raise UserError(f"{name}: holds a number that is not finite in {plan.dtype}; save it in another dtype")
        yield spec.to_layout(cast, plan.layout)


def _shards(specs: list[TensorSpec], dtype: torch.dtype, max_bytes: int) -> list[list[TensorSpec]]:
    """`specs` cut into runs of at most `max_bytes`, but of one tensor at least."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        n_bytes = _n_bytes(spec, dtype)
        if shards[-1] and filled + n_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += n_bytes
    return shards


def _n_bytes(spec: TensorSpec, dtype: torch.dtype) -> int:
    return prod(spec.shape) * dtype.itemsize
