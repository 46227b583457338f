"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, and our provenance beside them.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  (rank, in)      ....lora_B.weight  (out, rank)
                                                    .lora_magnitude_vector  (out,)  with DoRA
    prompt_embeddings  (P, 2 * L * Hkv * Dh)                                        of a prefix, alone

PEFT forgives a lot when it loads: it drops tensors that it does not know and guesses targets. Here an adapter either is
exactly what its config says, for exactly this base, or it is refused by name; and the model is touched only after that.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.json_file import read_json, short
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.safetensors_file import FLOATS, TensorEntry, read_header, write_safetensors
from minilora.checkpoint.write import MANIFEST, atomic_folder, verify_manifest
from minilora.config import PROJECTIONS, LoraConfig, ModelConfig, PrefixConfig
from minilora.errors import UserError
from minilora.lora import add_lora, lora_layers, refuse_added
from minilora.model import Mistral
from minilora.prefix import add_prefix, prefix_width

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "minilora.json"
PROVENANCE_VERSION = 1

# Keys that change nothing about what is computed. Any other key must be empty, false or null: it is a feature that we
# do not have, such as modules_to_save or rank_pattern.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias",
    "init_lora_weights",
}  # fmt: skip
# What PEFT saves of a prefix is the prefix itself, whatever network made it and however it began.
_READ_OF_PREFIX = {
    "peft_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "prefix_projection", "encoder_hidden_size", "init_weights",
}  # fmt: skip


def save_adapter(
    model: Mistral, folder: str | Path, *, provenance: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write the model's adapters or its prefix, float32, as PEFT loads them.

    provenance: what else minilora.json shall tell, such as the run's config; "base_path" also goes into PEFT's config.
        The fingerprint of the base is added, if the model was loaded from files.

    Raises UserError if the model has no adapters, one of their numbers is not finite, or `folder` cannot be written.
    """
    config, tensors = _peft_config(model), _adapter_tensors(model)
    if not tensors:
        raise UserError("the model has no adapters to save")
    for key, tensor in tensors.items():
        refuse_not_finite(tensor, key, "the training has failed")
    ours = {"format_version": PROVENANCE_VERSION, "base_fingerprint": model.base_fingerprint}
    provenance = {**(provenance or {}), **ours}
    with atomic_folder(folder, overwrite=overwrite, manifest={}) as temp:
        _write_json(temp / CONFIG, config | {"base_model_name_or_path": provenance.get("base_path")})
        _write_json(temp / PROVENANCE, provenance)
        lines = [(key, torch.float32, tuple(tensor.shape)) for key, tensor in tensors.items()]
        write_safetensors(temp / WEIGHTS, tensors.values(), lines, {"format": "pt"})


def load_adapter(model: Mistral, folder: str | Path) -> Mistral:
    """Add the adapters or the prefix in `folder` to `model`, in place; returns it. They become float32 and trainable.

    Raises UserError, before the model is changed, if it has adapters already, if a file is missing or corrupt, if the
    config asks for what we do not have, if the adapter belongs to another base, or if a tensor is missing, unknown,
    misshapen, no float or not finite.
    """
    folder = Path(folder)
    refuse_added(model)
    config = read_adapter_config(folder, model.config)
    _check_origin(folder, model)
    tensors = {key: entry.read().float() for key, entry in _checked_entries(folder, config, model.config).items()}
    for key, tensor in tensors.items():
        refuse_not_finite(tensor, f"{folder / WEIGHTS}: {key}", "the file is damaged, or its training has failed")
    add_lora(model, config) if isinstance(config, LoraConfig) else add_prefix(model, config)
    with torch.no_grad():
        for key, parameter in _adapter_tensors(model).items():
            parameter.copy_(tensors[key])
    return model


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What minilora.json tells of where an adapter comes from; empty if another program wrote the adapter."""
    file = Path(folder) / PROVENANCE
    if not file.exists():
        return {}
    provenance = read_json(file)
    if (version := provenance.get("format_version")) != PROVENANCE_VERSION:
        raise UserError(f"{file}: format_version is {short(version)}; this minilora knows {PROVENANCE_VERSION}")
    paths = dict.fromkeys(("base_path", "tokenizer_path", "validation_path", "quantize"), str)
    for key, kind in {**paths, "double_quant": bool, "tokenizer": dict}.items():
        if not isinstance(provenance.get(key), kind | None):
            raise UserError(f"{file}: {key} is {short(provenance[key])}, but must be a {kind.__name__}")
    return provenance


def read_adapter_config(folder: Path, sizes: ModelConfig | None = None) -> LoraConfig | PrefixConfig:
    """adapter_config.json as what it configures. Raises UserError that names the key for what we do not have, and
    where a prefix was made for other `sizes`."""
    file = folder / CONFIG
    values = read_json(file)
    kind = values.get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise UserError(f"{file}: peft_type is {short(kind)}; only LORA and PREFIX_TUNING are supported")
    for key in sorted(values.keys() - _HARMLESS - (_READ if kind == "LORA" else _READ_OF_PREFIX)):
        if values[key] not in (None, False, [], {}):
            raise UserError(f"{file}: {key} is {short(values[key])}, which is not supported")
    return _lora_config(file, values) if kind == "LORA" else _prefix_config(file, values, sizes)


def _prefix_config(file: Path, values: dict[str, Any], sizes: ModelConfig | None) -> PrefixConfig:
    n_tokens = values.get("num_virtual_tokens")
    if type(n_tokens) is not int or not 0 < n_tokens < 2**31:
        raise UserError(f"{file}: num_virtual_tokens is {short(n_tokens)}, but must be a whole number above 0")
    for key, expected in _prefix_values(n_tokens, sizes).items() if sizes else ():
        if key not in ("encoder_hidden_size", "prefix_projection") and values.get(key) != expected:
            raise UserError(f"{file}: {key} is {short(values.get(key))}; a prefix of this base has {expected}")
    return PrefixConfig(n_tokens)


def _lora_config(file: Path, values: dict[str, Any]) -> LoraConfig:
    if values.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {short(values['bias'])}; Mistral has no biases to adapt")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian"):
        # PiSSA and its like change the base too: their A and B belong to what is left of it.
        raise UserError(
            f"{file}: init_lora_weights {short(values['init_lora_weights'])} changes the base; not supported"
        )
    for key in ("r", "lora_alpha"):  # PEFT would take 8 for either
        if values.get(key) is None:
            raise UserError(f"{file}: {key} is missing")
    rank, alpha, dropout = values["r"], values["lora_alpha"], values.get("lora_dropout") or 0.0
    if type(rank) is not int or rank < 1:
        raise UserError(f"{file}: r is {short(rank)}, but must be a whole number above 0")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e30:  # false for NaN, too
        raise UserError(f"{file}: lora_alpha is {short(alpha)}, but must be a positive finite number")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: lora_dropout is {short(dropout)}, but must be at least 0 and below 1")
    for key in ("use_rslora", "use_dora"):
        if values.get(key) not in (None, True, False):
            raise UserError(f"{file}: {key} is {short(values[key])}, but must be true or false")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{file}: target_modules is {short(targets)}; only a list of layer names is supported")
    for target in targets:
        if target not in PROJECTIONS:
            raise UserError(f"{file}: target_modules names {short(target)}; supported are {', '.join(PROJECTIONS)}")
    ordered = tuple(name for name in PROJECTIONS if name in targets)
    rslora, dora = bool(values.get("use_rslora")), bool(values.get("use_dora"))
    return LoraConfig(rank, float(alpha), float(dropout), ordered, rslora, dora)


def _peft_config(model: Mistral) -> dict[str, Any]:
    """What PEFT is told of what was added to the model; nothing if nothing was."""
    always = {"task_type": "CAUSAL_LM", "inference_mode": True}
    if model.prefix is not None:
        return always | _prefix_values(model.prefix.n_tokens, model.config)
    lora = model.lora_config
    if lora is None:
        return {}
    return always | {
        "peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets), "use_rslora": lora.rslora, "use_dora": lora.dora, "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True,
    }  # fmt: skip


def _prefix_values(n_tokens: int, sizes: ModelConfig) -> dict[str, Any]:
    width = sizes.n_kv_heads * sizes.head_dim
    return {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": n_tokens, "token_dim": width, "num_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_kv_heads, "num_transformer_submodules": 1, "prefix_projection": False,
        "encoder_hidden_size": width,
    }  # fmt: skip


def _check_origin(folder: Path, model: Mistral) -> None:
    """Raise UserError if the files were altered, or the adapter was trained on another base. Other writers' adapters
    carry neither a manifest nor provenance and pass."""
    if (folder / MANIFEST).exists():
        verify_manifest(folder)
    theirs, ours = read_provenance(folder).get("base_fingerprint"), model.base_fingerprint
    if theirs and ours and theirs != ours:
        raise UserError(f"{folder}: trained on another base: fingerprint {short(theirs)}, but this model's is {ours}")


def _checked_entries(folder: Path, config: LoraConfig | PrefixConfig, model: ModelConfig) -> dict[str, TensorEntry]:
    """The tensors of the adapter by key: all that the config implies, and no others. Raises UserError."""
    file = folder / WEIGHTS
    pickle = file.with_suffix(".bin")
    if pickle.exists() and not file.exists():
        raise UserError(f"{pickle}: pickle files can run code and are not read; convert it to safetensors")
    held, expected = read_header(file), _expected_shapes(config, model)
    for key in sorted(expected.keys() - held.keys()):
        raise UserError(f"{file}: lacks {key}, which {CONFIG} asks for")
    for key, entry in held.items():
        if key not in expected:
            raise UserError(f"{file}: holds {short(key)}, which {CONFIG} does not ask for on this model")
        if entry.dtype not in FLOATS:
            raise UserError(f"{file}: {key} is stored as {entry.dtype}; only {', '.join(FLOATS)} can be read")
        if entry.shape != expected[key]:
            raise UserError(f"{file}: {key} has shape {short(entry.shape)}; {CONFIG} and base want {expected[key]}")
    return held


def _expected_shapes(config: LoraConfig | PrefixConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    if isinstance(config, PrefixConfig):
        return {"prompt_embeddings": (config.n_tokens, prefix_width(model))}
    shapes = dict[str, tuple[int, ...]]()
    for spec in tensor_specs(model):
        if spec.module.rpartition(".")[2] in config.targets:
            shapes[_key(spec.module, "A")] = (config.rank, spec.shape[1])
            shapes[_key(spec.module, "B")] = (spec.shape[0], config.rank)
            if config.dora:
                shapes[_key(spec.module, "magnitude_vector")] = spec.shape[:1]
    return shapes


def _adapter_tensors(model: Mistral) -> dict[str, Tensor]:
    """All that was added to `model`, by PEFT's key and in the model's order; the tensors are the model's own."""
    if model.prefix is not None:
        return {"prompt_embeddings": model.prefix.prompt_embeddings.detach()}
    return {
        _key(name, part): getattr(layer, f"lora_{part}").detach()
        for name, layer in lora_layers(model)
        for part in ("A", "B", "magnitude_vector")
        if getattr(layer, f"lora_{part}") is not None
    }


def _key(module: str, part: str) -> str:
    return f"base_model.model.model.{module}.lora_{part}" + ("" if part == "magnitude_vector" else ".weight")


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
