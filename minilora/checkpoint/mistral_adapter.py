"""LoRA adapters in the layout of mistral-finetune: lora.safetensors, and params.json beside it.

    layers.0.attention.wq.lora_A.weight  (rank, in)      .lora_B.weight  (out, rank)      all seven layers of a block
    params.json: the base's sizes, and "lora": {"enable": true, "rank", "dropout", "scaling"}

What B A is multiplied by stands in params.json alone; mistral-inference, which reads the tensors alone, is told it by
its caller and else takes 2. As in all of Mistral's files, the rows of wq and wk interleave a head's pairs, and with
them those of their B (rope.py). There is one rank, one scale and no word for DoRA, for whole modules or for a prefix.

Source: finetune/checkpointing.py and model/lora.py of github.com/mistralai/mistral-finetune; lora.py of
mistral-inference, which looks for all seven layers: one without an adapter is written as a new one, whose B is zero.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from minilora.checkpoint.adapter_parts import Adapter, expected_shapes, read_exactly, refuse_other
from minilora.checkpoint.config_files import config_to_params
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.json_file import read_json, short, write_json
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.checkpoint.provenance import write_provenance
from minilora.checkpoint.safetensors_file import read_header, write_tensors
from minilora.checkpoint.write import atomic_folder
from minilora.config import LoraConfig, ModelConfig, PrefixConfig
from minilora.errors import UserError
from minilora.lora import init_a

WEIGHTS, PARAMS = "lora.safetensors", "params.json"


def is_mistral(path: Path) -> bool:
    """Whether it is a file of tensors alone, or a folder with one and without PEFT's config."""
    has_weights, has_config = (os.path.isfile(path / name) for name in (WEIGHTS, "adapter_config.json"))
    return path.suffix == ".safetensors" or (has_weights and not has_config)


def read_config(path: Path, scaling: float | None) -> LoraConfig:
    """The adapter's config: its rank from the tensors, its scale from params.json, unless `scaling` is given.

    path: a folder, or its file of tensors

    Raises UserError if neither says the scale, or params.json says what the tensors are not.
    """
    file = _weights(path)
    params = file.with_name(PARAMS)
    lora = read_json(params).get("lora") or {} if os.path.isfile(params) else {}
    shapes = (entry.shape for key, entry in read_header(file).items() if key.endswith(".lora_A.weight"))
    rank = next((shape[0] for shape in shapes if shape), 0)
    if not isinstance(lora, dict) or lora.get("enable", True) is not True or lora.get("rank", rank) != rank:
        raise UserError(f"{params}: lora is {short(lora)}, but {WEIGHTS} has an adapter of rank {rank}")
    scale, dropout = lora.get("scaling") if scaling is None else scaling, lora.get("dropout", 0.0)
    if scale is None:
        how = 'give it with --adapter_scaling or, as {"lora": {"scaling": 2.0}}, in such a file'  # train has no option
        raise UserError(f"{file}: no {PARAMS} beside it says its scale; {how}")
    # A number may have thousands of digits, which cannot be printed; NaN is refused by the config.
    if not all(isinstance(x, int | float) and type(x) is not bool and not abs(x) > 1e30 for x in (scale, dropout)):
        found = short((scale, dropout))
        raise UserError(f"{params}: scaling and dropout of lora are {found}, but must be numbers up to 1e30")
    try:
        return LoraConfig(rank, scale * max(rank, 1), dropout)
    except UserError as error:
        raise UserError(f"{file}: with the scale {scale}, {error}") from None


def read_tensors(path: Path, config: LoraConfig | PrefixConfig, sizes: ModelConfig) -> dict[str, Tensor]:
    """The tensors by our names, B's rows in our order. Raises UserError if they are not all, or others too."""
    tensors = read_exactly(_weights(path), _keys(sizes), expected_shapes(config, sizes), "a lora of this rank")
    for spec in _projections(sizes):
        b = f"{spec.module}.lora_B"
        tensors[b] = spec.from_layout(tensors[b], "mistral")
    return tensors


def save_mistral_adapter(adapter: Adapter, sizes: ModelConfig, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write an adapter of a base of these sizes as mistral-finetune does, in bfloat16, with its minilora.json.

    Raises UserError for what the layout has no word for, a number that bfloat16 cannot hold, or a folder that stands.
    """
    config = adapter.config
    if isinstance(config, PrefixConfig):
        raise UserError("mistral-finetune has no prefixes; keep PEFT's layout")
    adapted = [spec.module for spec in _projections(sizes) if config.adapts(spec.module)]
    ranks, scales = sorted({*map(config.rank_of, adapted)}), sorted({*map(config.scale_of, adapted)})
    more = {"lora.dora": config.dora, "lora.modules_to_save": config.modules_to_save}
    more |= {"lora.rank_pattern": len(ranks) > 1, "lora.alpha_pattern": len(scales) > 1}
    for key, used in more.items():
        if used:
            raise UserError(f"mistral-finetune's layout has no word for {key}; keep PEFT's, or merge the adapter")
    tensors, generator = dict[str, Tensor](), torch.Generator().manual_seed(0)
    for name, shape in expected_shapes(LoraConfig(ranks[0]), sizes).items():  # of all seven layers
        new = torch.zeros(shape)
        if name.endswith("lora_A"):  # were it zero as B is, neither would ever learn
            init_a(new, generator)
        tensors[name] = adapter.tensors.get(name, new).bfloat16()
        refuse_not_finite(tensors[name], name, "bfloat16 cannot hold it; keep PEFT's layout")
    lora = {"enable": True, "rank": ranks[0], "dropout": config.dropout, "scaling": scales[0]}
    with atomic_folder(folder, overwrite=overwrite) as temp:
        write_json(temp / PARAMS, config_to_params(sizes) | {"lora": lora})
        if adapter.provenance:
            write_provenance(temp, adapter.provenance)
        keys, specs = _keys(sizes), {f"{spec.module}.lora_B": spec for spec in _projections(sizes)}
        rows = tensors | {name: spec.to_layout(tensors[name], "mistral") for name, spec in specs.items()}
        write_tensors(temp / WEIGHTS, {keys[name]: tensor for name, tensor in rows.items()})
        refuse_other(read_tensors(temp, read_config(temp, None), sizes), tensors, folder)


def _weights(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / WEIGHTS


def _projections(sizes: ModelConfig) -> list[TensorSpec]:
    return [spec for spec in tensor_specs(sizes) if spec.is_projection]


def _keys(sizes: ModelConfig) -> dict[str, str]:
    """Our names of the tensors, and the file's."""
    return {
        f"{spec.module}.{part}": f"{spec.mistral_module}.{part}.weight"
        for spec in _projections(sizes)
        for part in ("lora_A", "lora_B")
    }
