"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, and our provenance beside them.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  (rank, in)      ....lora_B.weight  (out, rank)
                                                    .lora_magnitude_vector  (out,)  with DoRA
    base_model.model.lm_head.weight  (V, D)                                         of modules_to_save
    prompt_embeddings  (P, 2 * L * Hkv * Dh)                                        of a prefix, alone

PEFT forgives a lot when it loads: it drops tensors that it does not know and guesses targets. Here an adapter either is
exactly what its config says, for exactly this base, or it is refused by name; and the model is touched only after that.
mistral-finetune's adapters (mistral_adapter.py) are read by the same functions.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.checkpoint import mistral_adapter
from minilora.checkpoint.adapter_parts import Adapter, added_tensors, expected_shapes, read_exactly, refuse_other
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.json_file import read_json, short, write_json
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.provenance import base_of, check_origin, read_provenance, versions, write_provenance
from minilora.checkpoint.safetensors_file import write_tensors
from minilora.checkpoint.write import atomic_folder
from minilora.config import PROJECTIONS, LoraConfig, ModelConfig, PrefixConfig
from minilora.errors import UserError
from minilora.hub import hub_name
from minilora.lora import refuse_added, refuse_unknown
from minilora.model import Mistral
from minilora.patterns import hf_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys that change nothing about what is computed. Any other key must be empty, false or null: it is a feature that we
# do not have, such as layers_to_transform or trainable_token_indices.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "loftq_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
_BEGINNINGS = (True, False, "gaussian", "eva", "mica", "orthogonal")  # of A and B, which leave the base as it is
_NAMES: dict[str, tuple[str, tuple[type, ...], tuple[type, ...]]] = {  # ours: PEFT's, what it is, and what it holds
    "rank": ("r", (int,), ()),
    "alpha": ("lora_alpha", (int, float), ()),
    "dropout": ("lora_dropout", (int, float), ()),
    "targets": ("target_modules", (list, str), (str,)),
    "rslora": ("use_rslora", (bool,), ()),
    "dora": ("use_dora", (bool,), ()),
    "rank_pattern": ("rank_pattern", (dict,), (int,)),
    "alpha_pattern": ("alpha_pattern", (dict,), (int, float)),
    "modules_to_save": ("modules_to_save", (list,), (str,)),
}
_READ = {"peft_type", "bias", "init_lora_weights", *(key for key, _, _ in _NAMES.values())}


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter, which its run and the file of its tensors stand for; another file lies alone."""
    path = Path(path)
    if not os.path.isfile(path / CONFIG) and os.path.isdir(path / "adapter"):
        return path / "adapter"
    name = WEIGHTS if os.path.isfile(path.parent / CONFIG) else mistral_adapter.WEIGHTS
    return path.parent if path.name == name and os.path.isfile(path) else path


def save_adapter(
    model: Mistral, folder: str | Path, *, provenance: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write the model's adapters or its prefix, float32, as PEFT loads them.

    provenance: what else minilora.json shall tell, see provenance.py; "base_path" also goes into PEFT's config. The
        fingerprint of the base, if the model was loaded from files, and how it is stored are added.

    Raises UserError if the model has no adapters, one of their numbers is not finite, or `folder` cannot be written.
    """
    tensors = added_tensors(model)
    config = model.lora_config if model.prefix is None else PrefixConfig(model.prefix.n_tokens)
    if config is None or not tensors:
        raise UserError("the model has no adapters to save")
    provenance = {"versions": versions(), **(provenance or {}), **base_of(model)}
    save_peft_adapter(Adapter(config, tensors, provenance), model.config, folder, overwrite=overwrite)


def save_peft_adapter(adapter: Adapter, sizes: ModelConfig, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write an adapter of a base of these sizes, as `save_adapter` does."""
    for name, tensor in adapter.tensors.items():
        refuse_not_finite(tensor, _key(name), "the training has failed")
    path = adapter.provenance.get("base_path")
    base = dict(zip(("base_model_name_or_path", "revision"), hub_name(path) or (path, None), strict=True))
    with atomic_folder(folder, overwrite=overwrite) as temp:
        write_json(temp / CONFIG, _peft_config(adapter.config, sizes) | base)
        write_provenance(temp, adapter.provenance)
        write_tensors(temp / WEIGHTS, {_key(name): tensor for name, tensor in adapter.tensors.items()})
        refuse_other(read_adapter(temp, sizes).tensors, adapter.tensors, folder)


def load_adapter(model: Mistral, folder: str | Path, *, force: bool = False, scaling: float | None = None) -> Mistral:
    """Add the adapters or the prefix in `folder` to `model`, in place; returns it. They become float32 and trainable.

    folder: or the file of its tensors
    force: warn where the adapter belongs to another base or was altered, instead of refusing it
    scaling: see `read_adapter`

    Raises UserError, before the model is changed, if it has adapters already, and for what `read_adapter` and
    `provenance.check_origin` refuse. Warns if the base is stored otherwise than the one it was trained on.
    """
    refuse_added(model)
    adapter = read_adapter(folder, model.config, scaling=scaling)
    for text in check_origin(adapter_folder(folder), adapter.provenance, base_of(model), force):
        warnings.warn(text, stacklevel=2)
    return adapter.attach(model)


def read_adapter(folder: str | Path, sizes: ModelConfig, *, scaling: float | None = None) -> Adapter:
    """The adapter in `folder`, PEFT's or mistral-finetune's, for a base of these sizes; no model is needed.

    folder: or the file of its tensors
    scaling: what B A is multiplied by, where the files of mistral-finetune do not say it, or instead of what they say

    Raises UserError if a file is missing or corrupt, if the config asks for what we do not have, or if a tensor is
    missing, unknown, misshapen, no float or not finite.
    """
    folder = adapter_folder(folder)
    config = read_adapter_config(folder, sizes, scaling=scaling)
    if mistral_adapter.is_mistral(folder):
        return Adapter(config, mistral_adapter.read_tensors(folder, config, sizes), read_provenance(folder))
    file, shapes = folder / WEIGHTS, expected_shapes(config, sizes)
    pickle = file.with_suffix(".bin")
    if os.path.exists(pickle) and not os.path.exists(file):
        raise UserError(f"{pickle}: pickle files can run code and are not read; convert it to safetensors")
    tensors = read_exactly(file, {name: _key(name) for name in shapes}, shapes, CONFIG)
    return Adapter(config, tensors, read_provenance(folder))


def read_adapter_config(
    folder: str | Path, sizes: ModelConfig, *, scaling: float | None = None
) -> LoraConfig | PrefixConfig:
    """What the files in `folder` configure, on a base of these sizes. Raises UserError that names the key."""
    folder = adapter_folder(folder)
    if mistral_adapter.is_mistral(folder):
        return mistral_adapter.read_config(folder, scaling)
    file = folder / CONFIG
    values = read_json(file)
    if scaling is not None:
        raise UserError(f"{file}: says the scale itself, by lora_alpha; leave out --adapter_scaling")
    kind = values.get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise UserError(f"{file}: peft_type is {short(kind)}; only LORA and PREFIX_TUNING are supported")
    # What PEFT saves of a prefix is the prefix itself, whatever network made it and however it began.
    read = _READ if kind == "LORA" else {*_prefix_values(1, sizes), "init_weights"}
    for key in sorted(values.keys() - _HARMLESS - read):
        if values[key] not in (None, False, [], {}):
            raise UserError(f"{file}: {key} is {short(values[key])}, which is not supported")
    if kind == "PREFIX_TUNING":
        return _prefix_config(file, values, sizes)
    specs = list(tensor_specs(sizes))
    linears = [spec.module for spec in specs if spec.is_projection]
    others = {spec.module for spec in specs if not spec.is_projection} | {"lm_head"}
    try:
        config = LoraConfig(**_lora_values(values))
        refuse_unknown(config, linears, others, sizes.tied_embeddings)
    except UserError as error:
        in_peft = re.sub(rf"\blora\.({'|'.join(_NAMES)})\b", lambda found: _NAMES[found[1]][0], str(error))
        raise UserError(f"{file}: {in_peft}") from None
    return config


def _prefix_config(file: Path, values: Mapping[str, Any], sizes: ModelConfig) -> PrefixConfig:
    n_tokens = values.get("num_virtual_tokens")
    if type(n_tokens) is not int or not 0 < n_tokens < 2**31:
        raise UserError(f"{file}: num_virtual_tokens is {short(n_tokens)}, but must be a whole number above 0")
    for key, expected in _prefix_values(n_tokens, sizes).items():
        if key not in ("encoder_hidden_size", "prefix_projection") and values.get(key) != expected:
            raise UserError(f"{file}: {key} is {short(values.get(key))}; a prefix of this base has {expected}")
    return PrefixConfig(n_tokens)


def _lora_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """LoraConfig's arguments; of the right types, but not yet checked. Raises UserError."""
    if values.get("bias", "none") != "none":
        raise UserError(f"bias is {short(values['bias'])}; Mistral has no biases to adapt")
    if values.get("init_lora_weights", True) not in _BEGINNINGS:
        # PiSSA and its like change the base too: their A and B belong to what is left of it.
        raise UserError(f"init_lora_weights {short(values['init_lora_weights'])} changes the base; not supported")
    ours = dict[str, Any]()
    for name, (key, kinds, inner) in _NAMES.items():
        value = values.get(key)
        if value is None and name in ("rank", "alpha", "targets"):  # PEFT would take 8, or guess
            raise UserError(f"{key} is missing")
        if value is None:
            continue
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) not in kinds or not all(type(part) in inner for part in parts):
            raise UserError(f"{key} is {short(value)}; {' or '.join(kind.__name__ for kind in kinds)} was expected")
        ours[name] = tuple(value) if isinstance(value, list) else value
    if isinstance(ours["targets"], tuple):  # PEFT writes them in a set's order
        place = {name: i for i, name in enumerate(PROJECTIONS)}
        ours["targets"] = tuple(sorted(ours["targets"], key=lambda name: (place.get(name, len(place)), name)))
    return ours


def _peft_config(config: LoraConfig | PrefixConfig, sizes: ModelConfig) -> dict[str, Any]:
    """What PEFT is told of an adapter."""
    always = {"task_type": "CAUSAL_LM", "inference_mode": True}
    if isinstance(config, PrefixConfig):
        return always | _prefix_values(config.n_tokens, sizes)
    values = {key: getattr(config, name) for name, (key, _, _) in _NAMES.items()}
    fixed = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}
    return always | fixed | values | {"modules_to_save": values["modules_to_save"] or None}


def _prefix_values(n_tokens: int, sizes: ModelConfig) -> dict[str, Any]:
    width = sizes.n_kv_heads * sizes.head_dim
    return {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": n_tokens, "token_dim": width, "num_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_kv_heads, "num_transformer_submodules": 1, "prefix_projection": False,
        "encoder_hidden_size": width,
    }  # fmt: skip


def _key(name: str) -> str:
    """PEFT's name of one of our tensors."""
    if name == "prompt_embeddings":
        return name
    return f"base_model.model.{hf_name(name)}" + (".weight" if name.endswith(("lora_A", "lora_B")) else "")
