"""config.json and params.json <-> ModelConfig.

What the decoder cannot do is refused by name, never skipped: a model read wrongly still prints fluent nonsense. What a
file leaves out means what its owner's class takes it to mean (transformers' MistralConfig, mistral-inference's
ModelArgs), and a choice made for the reader is logged.
"""

import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minilora.checkpoint.json_file import read_json, short
from minilora.checkpoint.layout import CONFIG_NAMES, Layout
from minilora.config import ModelConfig
from minilora.errors import UserError

log = logging.getLogger(__name__)
MAX_LAYERS = 10_000  # with an entry each
Values = dict[str, Any]  # of a config file; what reads one raises UserError that names the key
EndIds = int | list[int]  # where an answer ends
Window = int | tuple[int | None, ...] | None  # as in ModelConfig

# The classes of transformers that are this decoder: Ministral's windows differ by layer, Llama's have none.
_HF_KINDS = {"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM", "llama": "LlamaForCausalLM"}
_SIZES = {  # ModelConfig's name, which is that of params.json: Hugging Face's
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
}
_HF_MAX_SEQ_LEN = {"mistral": 131_072, "ministral": 131_072, "llama": 2048}  # where the file leaves it out
_HF_KV_HEADS = {"mistral": 8, "ministral": 8}  # likewise; Llama's class takes the number of heads, and so does null
# What these keys may say, in either layout's file; absent and null always pass. An empty tuple: the feature is not
# supported at all.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "causal": (True,),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_biases"), (False,)),
    **dict.fromkeys(("moe", "num_local_experts", "yarn", "llama_4_scaling", "quantization"), ()),
    **dict.fromkeys(("multimodal", "text_config", "vision_config", "vision_encoder"), ()),
}
_NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def read_config(folder: Path, layout: Layout) -> tuple[ModelConfig, bool]:
    """The sizes of the checkpoint in `folder`, from the config file of its layout, and whether that says that weights
    are in NF4.

    Raises UserError that names file and key for a missing file, a bad value, or a model that is no plain Mistral.
    """
    file = folder / CONFIG_NAMES[layout]
    values, read = read_json(file), _from_hf if layout == "hf" else _from_params
    try:
        return ModelConfig(**read(values, file)), layout == "hf" and values.get("quantization_config") is not None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_eos(folder: Path, config: ModelConfig) -> EndIds:
    """Where answers of the model in `folder` end, by generation_config.json, else config.json, else Mistral's 2. What
    is not of the vocabulary is not taken."""
    for name in ("generation_config.json", "config.json"):
        with suppress(UserError):
            said: Any = read_json(folder / name).get("eos_token_id")
            ids: list[int] = said if isinstance(said, list) else [said]
            if ids and all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
                return ids if len(ids) > 1 else ids[0]
    return 2


def config_to_hf(config: ModelConfig, dtype: str, double_quant: bool | None = None, eos: EndIds = 2) -> dict[str, Any]:
    """config.json for `config`, in the keys that every version of transformers reads.

    dtype: of the weights, or what those in NF4 are computed with in, such as "bfloat16"
    double_quant: of weights in NF4, whether their absmax are in 8 bits; None of plain ones
    eos: as `read_eos` has it

    Raises UserError for windows of several sizes, which it cannot say.
    """
    sizes = sorted({window for window in config.windows if window})
    if len(sizes) > 1:
        raise UserError(f"Hugging Face's layout has one size of window, and this model {sizes}; write Mistral's layout")
    kind, by_layer = "mistral", dict[str, Any]()
    if len(config.windows) > 1:
        kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
        kind, by_layer = "ministral", {"layer_types": kinds * (config.n_layers // len(kinds))}
    values = by_layer | {
        "architectures": [_HF_KINDS[kind]],
        "model_type": kind,
        **{key: getattr(config, name) for name, key in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": sizes[0] if sizes else None,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }
    if double_quant is not None:  # as transformers and vLLM read it
        values["quantization_config"] = {
            **_NF4_CONFIG,
            "load_in_8bit": False,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": None,
        }
    return values


def config_to_params(config: ModelConfig) -> dict[str, Any]:
    """params.json for `config`."""
    params = {name: getattr(config, name) for name in (*_SIZES, "norm_eps", "rope_theta")}
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if config.tied_embeddings:
        params["tied_embeddings"] = True
    return params


def _value(values: Values, key: str, default: Any, fits: Callable[[Any], bool], must: str) -> Any:
    """What a key says, which must fit; `default` where it is absent or null."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise UserError(f"{key} is missing")
    if not fits(value):
        raise UserError(f"{key} is {short(value)}, but must be {must}")
    return value


def _whole(values: Values, key: str, default: int | None = None) -> int:
    return int(_value(values, key, default, lambda n: type(n) is int and n > 0, "a whole number above 0"))


def _real(values: Values, key: str, default: float | None = None) -> float:
    def fits(x: Any) -> bool:
        return type(x) in (int, float) and 0 < x < 1e30  # false for NaN, too

    return float(_value(values, key, default, fits, "a positive finite number"))


def _flag(values: Values, key: str) -> bool:
    return bool(_value(values, key, False, lambda x: type(x) is bool, "true or false"))


def _refuse_other_than(values: Values, fixed: dict[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            supported = " or ".join(map(short, allowed)) if allowed else "only null"
            raise UserError(f"{key} is {short(value)}; supported is {supported}")


def _from_hf(values: Values, file: Path) -> dict[str, Any]:
    """ModelConfig's arguments from config.json, as transformers 4 and 5 write it."""
    _refuse_other_than(values, {"model_type": tuple(_HF_KINDS), **_FIXED})
    _refuse_other_quantization(values)
    kind = values.get("model_type")
    if kind is None:
        raise UserError("model_type is missing; mistral was expected")
    _refuse_other_than(values, {"architectures": ([_HF_KINDS[kind]],)})
    dim, n_heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    if values.get("head_dim") is None and dim % n_heads:
        raise UserError(f"head_dim is not given, and {n_heads} heads do not divide hidden_size {dim}")
    n_kv_heads = n_heads if "num_key_value_heads" in values else _HF_KV_HEADS.get(kind, n_heads)
    defaults = {"head_dim": dim // n_heads, "n_kv_heads": n_kv_heads, "max_seq_len": _HF_MAX_SEQ_LEN[kind]}
    sizes = {name: _whole(values, key, defaults.get(name)) for name, key in _SIZES.items()}
    window = None if kind == "llama" else _hf_window(values, file, sizes["n_layers"], by_layer=kind == "ministral")
    return sizes | {
        "norm_eps": _real(values, "rms_norm_eps", 1e-6),
        "rope_theta": _hf_rope_theta(values),
        "sliding_window": window,
        "tied_embeddings": _flag(values, "tie_word_embeddings"),
    }


def _refuse_other_quantization(values: Values) -> None:
    found = values.get("quantization_config")
    if found is None:
        return
    for key, expected in _NF4_CONFIG.items():
        value = found.get(key) if isinstance(found, dict) else found
        if type(value) is not type(expected) or value != expected:
            problem = f"is of {key} {short(value)}; only bitsandbytes' 4-bit NF4 can be read"
            raise UserError(f"quantization_config {problem}: {json.dumps(_NF4_CONFIG)}")


def _hf_rope_theta(values: Values) -> float:
    """transformers 5 writes rope_parameters, 4 wrote rope_theta and, for stretched positions, rope_scaling."""
    theta = _real(values, "rope_theta", 10_000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default" or not isinstance(rope, dict):
            raise UserError(f"{key} is of type {short(kind)}, but only the default rotary embedding is supported")
        if other := sorted(set(rope) - {"rope_theta", "rope_type", "type"}):
            raise UserError(f"{key} holds {short(other[0])}, which is not supported")
        theta = _real(rope, "rope_theta", theta)
    return theta


def _hf_window(values: Values, file: Path, n_layers: int, by_layer: bool) -> Window:
    """sliding_window; transformers 4 left out what equals its class default, so absence means 4096, null means none.

    by_layer: layer_types may say which layers have it
    """
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention"]
    elif not isinstance(kinds, list) or len(kinds) != n_layers or n_layers > MAX_LAYERS:
        raise UserError(f"layer_types is {short(kinds)}, but must be a list with an entry for each layer")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"layer_types names {short(kind)}; supported are full_attention, sliding_attention")
    if not by_layer and "full_attention" in kinds and values.get("sliding_window", 4096) is not None:
        only = "only model_type ministral may have beside a sliding_window"  # transformers and vLLM disagree
        raise UserError(f"layer_types has layers of full_attention, which {only}; set that to null if no layer has one")
    if "sliding_attention" not in kinds:
        return None
    if "sliding_window" not in values:
        log.warning("%s: no sliding_window; 4096 is taken, the default of its class", file)
    window = _window(values, "sliding_window", n_layers) if "sliding_window" in values else 4096
    if "full_attention" not in kinds:
        return window
    if isinstance(window, tuple):
        raise UserError("sliding_window and layer_types both say which layers have a window")
    return _shortest(tuple(window if kind == "sliding_attention" else None for kind in kinds))


def _from_params(values: Values, file: Path) -> dict[str, Any]:
    """ModelConfig's arguments from params.json."""
    _refuse_other_than(values, {"model_type": ("transformer",), "rope_scaling": (), **_FIXED})
    n_heads, max_seq_len = _whole(values, "n_heads"), _whole(values, "max_position_embeddings", 32_768)
    defaults = {"n_kv_heads": n_heads, "max_seq_len": max_seq_len}
    sizes = {name: _whole(values, name, defaults.get(name)) for name in _SIZES}
    keys = [key for key in ("sliding_window", "_sliding_window") if key in values]
    windows = {_window(values, key, sizes["n_layers"]) for key in keys}
    if len(windows) > 1:
        raise UserError("sliding_window and _sliding_window differ")
    window = windows.pop() if windows else None
    # The original code took 10000 for models with a window, which are the ones from before the key existed.
    theta = _real(values, "rope_theta", 1e6 if window is None else 1e4)
    if values.get("rope_theta") is None:
        log.warning("%s: no rope_theta; %g is taken, since sliding_window is %s", file, theta, window)
    return sizes | {
        "norm_eps": _real(values, "norm_eps"),
        "rope_theta": theta,
        "sliding_window": window,
        "tied_embeddings": _flag(values, "tied_embeddings"),
    }


def _window(values: Values, key: str, n_layers: int) -> Window:
    """W, which files hold as a number, as a string of digits, or as a pattern that is repeated over the layers."""
    value = values[key]
    windows = [
        int(window) if isinstance(window, str) and re.fullmatch("[0-9]{1,10}", window) else window
        for window in (value if isinstance(value, list) else [value])
    ]
    for window in windows:
        if window is not None and (type(window) is not int or window < 1):
            raise UserError(f"{key} is {short(value)}, but must be a whole number above 0, or null")
    if not windows or n_layers % len(windows) or len(windows) > MAX_LAYERS:
        raise UserError(f"{key} has {len(windows)} entries, which cannot be repeated over {n_layers} layers")
    return _shortest(tuple(windows))


def _shortest(windows: tuple[int | None, ...]) -> Window:
    """A pattern without its own repetitions; one window for all layers is a number."""
    n = len(windows)
    period = next(p for p in range(1, n + 1) if n % p == 0 and windows[:p] * (n // p) == windows)
    return windows[0] if period == 1 else windows[:period]
