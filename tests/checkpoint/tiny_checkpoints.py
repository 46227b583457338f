"""Tiny Mistrals on the disk, written by transformers or byte by byte, for the tests of minilora.checkpoint."""

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM
from transformers import logging as transformers_logging

from minilora.checkpoint.config_files import read_config
from minilora.checkpoint.layout import find_layout
from minilora.config import ModelConfig
from minilora.model import Mistral

transformers_logging.disable_progress_bar()

# Every size differs from every other one, and n_heads * head_dim (256) from dim (128), so that a mix-up shows.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 7,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
THETA = 5e4


def config_in(folder: Path) -> ModelConfig:
    """What the config file of the folder's layout says."""
    config, _ = read_config(folder, find_layout(folder))
    return config


def _published(vocab: int, theta: float, window: int | None, **larger: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as transformers 4 wrote it, and params.json, of a model with 8 key-value heads of 128."""
    sizes = {"dim": 4096, "n_layers": 32, "hidden_dim": 14336, "n_heads": 32, **larger}
    in_hf = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    config = dict(zip(in_hf, sizes.values(), strict=True)) | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 8, "vocab_size": vocab,
        "rms_norm_eps": 1e-5, "rope_theta": theta, "sliding_window": window, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu", "use_cache": True,
    }  # fmt: skip
    params = {**sizes, "head_dim": 128, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": vocab}
    return config, params | ({"sliding_window": window} if window else {"rope_theta": theta})


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # both configs, and the number of weights
    "7B v0.1": (*_published(32000, 1e4, 4096), 7_241_732_096),
    "7B v0.2": (*_published(32000, 1e6, None), 7_241_732_096),
    "7B v0.3": (*_published(32768, 1e6, None), 7_248_023_552),
    "Codestral 22B": (
        *_published(32768, 1e6, None, dim=6144, n_layers=56, hidden_dim=16384, n_heads=48),
        22_247_282_688,
    ),
}


def hf_model(seed: int = 0, attention: str = "eager", **changes: Any) -> MistralForCausalLM:
    """A random float32 Mistral in eval mode; its norms and logits are far from trivial."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": THETA}
    config = MistralConfig(**{**SIZES, **changes}, rope_parameters=rope, attn_implementation=attention)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 0.1)
    return model


def tokens(seed: int = 1) -> Tensor:
    """(2, 20): longer than the window."""
    return torch.randint(0, SIZES["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(seed))


def randomize(model: torch.nn.Module) -> None:
    """Adapters as after training: B is not zero any more."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "trained" in name or ("modules_to_save" in name and "default" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def assert_same_logits(ours: Mistral, theirs: torch.nn.Module, base: Mistral) -> None:
    with torch.no_grad():
        logits = ours(tokens())
        torch.testing.assert_close(logits, theirs(tokens()).logits, atol=1e-5, rtol=0)
        assert (logits - base(tokens())).abs().max() > 0.1  # the adapter does something


def params_json() -> dict[str, Any]:
    return {
        "dim": 128,
        "n_layers": 2,
        "head_dim": 64,
        "hidden_dim": 192,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": THETA,
        "sliding_window": 7,
        "max_seq_len": 64,
    }


def in_mistral(name: str) -> str:
    """What Mistral's files call a tensor of Hugging Face's."""
    parts = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    name = name.removeprefix("model.")
    for ours, mistral in parts.items():
        name = name.replace(ours, mistral)
    return name


def write_mistral(model: MistralForCausalLM, folder: Path, **changes: Any) -> Path:
    """The weights of `model` in Mistral's layout. Names and rows by this file's own code, not by the package's."""
    made = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if match := re.search(r"[qk]_proj", name):
            heads = SIZES["num_attention_heads" if match[0] == "q_proj" else "num_key_value_heads"]
            half = SIZES["head_dim"] // 2
            weight = torch.stack(
                [weight[h * 2 * half + p + b * half] for h in range(heads) for p in range(half) for b in (0, 1)]
            )
        made[in_mistral(name)] = weight.contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "consolidated.safetensors")
    write_json(folder / "params.json", {**params_json(), **changes})
    return folder


def write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object; a value of ... deletes the key."""
    values = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in values.items() if value is not ...})


def edit_tensors(file: Path, **changes: Tensor | None) -> None:
    """Set or (None) delete tensors of a safetensors file; the names' dots are written as __."""
    held: dict[str, Any] = load_file(file)
    for name, tensor in changes.items():
        held[name.replace("__", ".")] = tensor
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file, {"format": "pt"})


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bfloat16 file of these tensors, all zeros, that takes no space on the disk beyond its header."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    file.write_bytes(raw_safetensors(header))
    os.truncate(file, file.stat().st_size + end)


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of the format made by hand, so that everything in it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
