"""What vLLM asks of our files: its rules of names and shapes, written out here, since it runs on a GPU alone.

Source: `load_weights`, `mistral_mapping` and `maybe_remap_mistral` of vllm/model_executor/models/llama.py,
vllm/model_executor/model_loader/bitsandbytes_loader.py, vllm/lora/peft_helper.py, vllm/lora/utils.py.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from tiny_runs import TINY, TOKENIZER, tiny_model
from torch import Tensor

from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.export import export_checkpoint
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import LoraConfig, PrefixConfig
from minilora.lora import add_lora
from minilora.prefix import add_prefix
from minilora.report.facts import gather

SIZES = replace(TINY, dim=64, hidden_dim=128)
FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
FUSED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
MISTRAL = {
    "layers": "model.layers", "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "attention_norm": "input_layernorm", "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "ffn_norm": "post_attention_layernorm", "tok_embeddings": "model.embed_tokens", "output": "lm_head",
    "norm": "model.norm",
}  # fmt: skip


def parameters(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """vLLM's own, by its names, from config.json; not filled yet."""
    d, f, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv, vocab = config["num_attention_heads"] * head, config["num_key_value_heads"] * head, config["vocab_size"]
    shapes = {"model.embed_tokens": (vocab, d), "model.norm": (d,), "lm_head": (vocab, d)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.qkv_proj": (q + 2 * kv, d), "self_attn.o_proj": (d, q), "mlp.gate_up_proj": (2 * f, d),
                "mlp.down_proj": (d, f), "input_layernorm": (d,), "post_attention_layernorm": (d,),
            }.items()
        }  # fmt: skip
    return {f"{name}.weight": torch.full(shape, torch.nan) for name, shape in shapes.items()}


def loaded(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its parameters once all tensors have gone in. A KeyError is a name that it does not know."""
    params, head = parameters(config), config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    starts = {"qkv_proj": (0, q, q + kv, q + 2 * kv), "gate_up_proj": (0, config["intermediate_size"])}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if part in FUSED:
            fused, place = FUSED[part]
            param = params[name.replace(part, fused)]
            start = starts[fused][place]
            into = param[start : start + tensor.shape[0]]
        else:
            into = params[name]
        assert into.shape == tensor.shape, name
        assert into.isnan().all(), f"{name} comes twice"
        into.copy_(tensor)
    assert not any(param.isnan().any() for param in params.values())
    return params


def remapped(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mistral's layout by the names of Hugging Face's, the rows of wq and wk in its order."""
    made = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        if words[-2] in ("wq", "wk"):
            n_heads = params["n_heads" if words[-2] == "wq" else "n_kv_heads"]
            tensor = tensor.view(n_heads, params["head_dim"] // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
        made[".".join(MISTRAL.get(word, word) for word in words)] = tensor
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "base"
    save_hf(tiny_model(config=SIZES), folder, dtype=torch.float32, tokenizer=TOKENIZER)
    return folder


def test_both_layouts_fill_its_parameters_alike(base: Path, tmp_path: Path) -> None:
    for to in ("hf", "mistral"):
        export_checkpoint(base, tmp_path / to, to)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    params = json.loads((tmp_path / "mistral" / "params.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    from_hf = loaded(config, load_file(tmp_path / "hf" / "model.safetensors"))
    theirs = remapped(params, load_file(tmp_path / "mistral" / "consolidated.safetensors"))
    for name, param in loaded(config, theirs).items():
        assert torch.equal(param, from_hf[name]), name


def test_its_bitsandbytes_loader_finds_every_state(base: Path, tmp_path: Path) -> None:
    """First the states, by the names beside a weight; then every other tensor as a weight."""
    export_checkpoint(base, tmp_path / "out", "bnb-4bit")
    held = load_file(tmp_path / "out" / "model.safetensors")
    beside = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4"}
    weights, plain = {name: t for name, t in held.items() if name.split(".")[-1] not in beside}, {}
    for name, tensor in weights.items():
        plain[name] = tensor
        if f"{name}.quant_state.bitsandbytes__nf4" in held:
            state = {key: value for key, value in held.items() if f"{name}." in key}
            plain[name] = dequantize_4bit(tensor, QuantState.from_dict(state, torch.device("cpu")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    ours = load_model(base, quantize="nf4", dtype=torch.float32)
    for name, param in loaded(config, plain).items():
        if "o_proj" in name:
            layer = ours.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
            assert torch.equal(param, layer.weight.dequantize())  # type: ignore[operator, union-attr]


TAKEN: list[dict[str, Any]] = [{}, {"rslora": True}, {"targets": ("q_proj", "down_proj")}]
LEFT: list[dict[str, Any]] = [
    {"dora": True}, {"modules_to_save": ("lm_head",)}, {"rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"o_proj": 3.0}},
]  # fmt: skip


def helper(config: Mapping[str, Any]) -> float:
    """`PEFTHelper`: what it needs, what it refuses, and the one scale that it takes. It sees no patterns."""
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    if config["use_dora"] or config["modules_to_save"]:
        raise ValueError("vLLM does not support it")
    return float(config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"]))


@pytest.mark.parametrize("settings", [*TAKEN, *LEFT], ids=str)
def test_adapters(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Those that it would serve as they are, and those of which `minilora inspect` says that it would not."""
    model = add_lora(load_model(base), LoraConfig(**{"rank": 4, "alpha": 6.0, **settings}))
    origin = {"base_path": str(base), "tokenizer_path": str(TOKENIZER)}
    save_adapter(model, tmp_path / "adapter", provenance=origin)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    said, lora = gather(tmp_path / "adapter")["vllm"], model.lora_config
    scales = {lora.scale_of(name.removesuffix(".lora_A")) for name, _ in model.named_parameters() if "lora_A" in name}
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    if settings in TAKEN:
        assert said == "serves it with --enable-lora --max-lora-rank 4 or more"
        assert scales == {helper(config)}
        modules = "|".join(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
        key = rf"base_model\.model\.model\.layers\.\d\.(self_attn|mlp)\.({modules})\.lora_[AB]\.weight"
        assert all(re.fullmatch(key, name) for name in names)
        return
    assert said == f"does not serve {next(iter(settings))} right; merge it"
    if settings.keys() & {"dora", "modules_to_save"}:
        with pytest.raises(ValueError, match="does not support"):
            helper(config)
    else:  # served, and wrongly
        assert scales != {helper(config)}


def test_a_prefix(base: Path, tmp_path: Path) -> None:
    model, origin = add_prefix(load_model(base), PrefixConfig(3)), {"base_path": str(base)}
    save_adapter(model, tmp_path / "adapter", provenance=origin)
    assert gather(tmp_path / "adapter")["vllm"] == "does not serve prefixes"
