"""What a model takes at rest: what is predicted from a configuration is what it takes, byte for byte."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, TOKENIZER, tiny_model

from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import MISTRAL_7B, PROJECTIONS, LoraConfig, ModelConfig
from minilora.lora import add_lora
from minilora.memory import measure
from minilora.memory_at_rest import predict
from minilora.model import Mistral

ODD = dataclasses.replace(TINY, dim=36, hidden_dim=52)  # blocks that end in the middle
KINDS: list[tuple[bool | None, dict[str, Any]]] = [
    (False, {"quantize": "nf4", "double_quant": False}),
    (True, {"quantize": "nf4", "double_quant": True}),
    (None, {}),
]
FEATURES: list[dict[str, Any]] = [
    {"targets": PROJECTIONS}, {"targets": ("k_proj", "down_proj")}, {"targets": r".*\.1\.mlp\.up_proj|.*v_proj"},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 5, "up_proj": 2}, "dora": True},
    {"modules_to_save": ("lm_head", "embed_tokens", "norm")}, {"modules_to_save": ("model.norm",), "dora": True},
]  # fmt: skip


def load(folder: Path, config: ModelConfig, **options: Any) -> Mistral:
    save_hf(tiny_model(config=config), folder, dtype=torch.float32, tokenizer=TOKENIZER)
    return load_model(folder, **options)


@pytest.mark.parametrize(("double_quant", "options"), KINDS)
@pytest.mark.parametrize("config", [TINY, ODD, dataclasses.replace(TINY, tied_embeddings=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_takes_what_was_predicted(
    tmp_path: Path, double_quant: bool | None, options: dict[str, Any], config: ModelConfig, dtype: torch.dtype
) -> None:
    model = load(tmp_path / "m", config, dtype=dtype, **options)
    assert measure(model) == predict(config, dtype, double_quant, None)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("double_quant", "options"), KINDS)
def test_adapters_and_their_gradients(
    tmp_path: Path, double_quant: bool | None, options: dict[str, Any], features: dict[str, Any]
) -> None:
    lora = LoraConfig(rank=3, **features)
    model = add_lora(load(tmp_path / "m", ODD, dtype=torch.float32, **options), lora)
    expected = predict(ODD, torch.float32, double_quant, lora)
    optimizer_bytes = expected.pop("optimizer")
    assert measure(model) == {owner: n for owner, n in expected.items() if owner != "gradients"}
    model(torch.tensor([[5, 6, 7]])).sum().backward()
    assert measure(model) == expected

    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    adam.step()
    assert optimizer_bytes == sum(s[m].nbytes for s in adam.state.values() for m in ("exp_avg", "exp_avg_sq"))


def test_nothing_else_takes_memory(tmp_path: Path) -> None:
    """Every parameter and buffer of a QLoRA model has an owner."""
    model = add_lora(load(tmp_path / "m", TINY, quantize="nf4", dtype=torch.bfloat16), LoraConfig(rank=2))
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert sum(measure(model).values()) == sum(tensors.values())


def test_a_7b_by_hand() -> None:
    """Mistral 7B v0.3: 6.98e9 weights in blocks, NF4 with double quantization 0.5 + 1/64 + 4/(64 * 256) bytes each."""
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert weights == 6_979_321_856
    nf4 = predict(MISTRAL_7B, torch.bfloat16, True, LoraConfig(rank=16))
    assert nf4["packed weights"] == weights // 2
    assert nf4["absmax"] == weights // 64 + weights // (64 * 256) * 4 + 32 * 7 * 4
    assert nf4["embeddings, head, norms"] == 2 * (2 * 32768 * 4096 + 65 * 4096)
    assert nf4["adapters"] == 4 * 41_943_040  # the 42 M that PEFT prints
    assert (nf4["gradients"], nf4["optimizer"]) == (nf4["adapters"], 2 * nf4["adapters"])
    assert predict(MISTRAL_7B, torch.bfloat16, None, None)["linear weights"] == 2 * weights
