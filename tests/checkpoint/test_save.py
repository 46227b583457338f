"""Our files in the eyes of transformers, and back again."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import SIZES, THETA, hf_model, tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralForCausalLM,
)

from minilora.checkpoint import save
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import model_weights, save_hf, save_mistral
from minilora.checkpoint.write import verify_manifest
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.lora import add_lora
from minilora.model import Mistral

F32 = torch.float32


def load_hf(folder: Path, **options: Any) -> MistralForCausalLM:
    model, report = MistralForCausalLM.from_pretrained(
        folder, dtype=F32, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def assert_same_logits(ours: Mistral, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200_000])
def test_transformers_loads_what_we_save(
    tmp_path: Path, tied: bool, max_shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", max_shard_bytes)
    hf_model(6, tie_word_embeddings=tied).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", dtype=F32)
    save_hf(model, tmp_path / "ours", dtype=F32)
    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    if max_shard_bytes == 200_000:
        assert len(shards) > 3
        assert all(shard.stat().st_size < 205_000 for shard in shards)
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * model.config.n_parameters
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]
    assert_same_logits(model, load_hf(tmp_path / "ours"))
    assert load_model(tmp_path / "ours").base_fingerprint == model.base_fingerprint


def test_windows_by_layer_and_llama_come_and_go(tmp_path: Path) -> None:
    """Ministral's layers differ, Llama's have no window: the same decoder, and transformers' own classes say so."""
    rope = {"rope_type": "default", "rope_theta": THETA}
    sizes: dict[str, Any] = {**SIZES, "rope_parameters": rope}
    del sizes["sliding_window"]
    kinds = ["full_attention", "sliding_attention"]
    ministral = MinistralConfig(**sizes, sliding_window=7, layer_types=kinds, attn_implementation="eager")
    torch.manual_seed(0)
    for theirs in (MinistralForCausalLM(ministral), LlamaForCausalLM(LlamaConfig(**sizes))):
        for weight in theirs.parameters():
            weight.data.normal_(0, 0.1)
        theirs.eval().save_pretrained(tmp_path / "theirs" / theirs.config.model_type)
        model = load_model(tmp_path / "theirs" / theirs.config.model_type, dtype=F32)
        assert_same_logits(model, theirs)
        save_hf(model, tmp_path / "ours" / theirs.config.model_type, dtype=F32)
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / theirs.config.model_type, dtype=F32)
        assert_same_logits(model, ours)
        save_mistral(model, tmp_path / "mistral" / theirs.config.model_type, dtype=F32)
        assert_same_logits(load_model(tmp_path / "mistral" / theirs.config.model_type, dtype=F32), theirs)


def test_mistral_layout_comes_back_byte_for_byte(originals: Path, tmp_path: Path) -> None:
    save_mistral(load_model(originals / "hf", dtype=F32), tmp_path / "m", dtype=F32)
    ours, theirs = (load_file(f / "consolidated.safetensors") for f in (tmp_path / "m", originals / "mistral"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((tmp_path / "m" / "params.json").read_text()) == json.loads(
        (originals / "mistral" / "params.json").read_text()
    )


def test_nf4_is_saved_dequantized(originals: Path, tmp_path: Path) -> None:
    model = load_model(originals / "hf", quantize="nf4", dtype=F32)
    save_hf(model, tmp_path / "dense", dtype=F32)
    theirs = load_hf(tmp_path / "dense")
    layer = model.get_submodule("layers.1.mlp.down_proj")
    assert isinstance(layer, NF4Linear)
    assert torch.equal(theirs.model.layers[1].mlp.down_proj.weight, layer.weight.dequantize(F32))
    assert_same_logits(model, theirs)


def test_default_dtype_is_bf16(originals: Path, tmp_path: Path) -> None:
    save_hf(load_model(originals / "hf"), tmp_path / "x")
    assert {tensor.dtype for tensor in load_file(tmp_path / "x" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "x" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_weights_may_be_streamed_from_elsewhere(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(originals / "hf", dtype=F32)

    def doubled() -> Iterator[tuple[str, Tensor]]:
        for name, weight in model_weights(model):
            yield name, weight * 2

    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 200_000)
    save_hf(model, tmp_path / "x", weights=doubled())
    assert torch.equal(load_model(tmp_path / "x").norm.weight, (model.norm.weight * 2).bfloat16())


@pytest.mark.parametrize("spoil", ["order", "short", "long", "shape"])
def test_a_wrong_stream_of_weights_is_an_error(originals: Path, tmp_path: Path, spoil: str) -> None:
    model = load_model(originals / "hf")
    weights = list(model_weights(model))
    wrong = {
        "order": weights[::-1],
        "short": weights[:-1],
        "long": [*weights, weights[0]],
        "shape": [(weights[0][0], weights[0][1][:-1]), *weights[1:]],
    }[spoil]
    with pytest.raises(ValueError, match=r"expected next|argument|more weights|announced"):
        save_hf(model, tmp_path / "x", weights=wrong)
    assert not os.listdir(tmp_path)


def test_a_model_with_adapters_is_not_saved_without_them(originals: Path, tmp_path: Path) -> None:
    model = add_lora(load_model(originals / "hf"), LoraConfig(targets=("v_proj",)))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.v_proj has an adapter: merge it first"):
        save_hf(model, tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_numbers_that_the_dtype_cannot_hold_are_refused(originals: Path, tmp_path: Path) -> None:
    model = load_model(originals / "hf", dtype=F32)
    model.norm.weight.data[3] = 1e6
    save_hf(model, tmp_path / "bf16")
    with pytest.raises(
        UserError, match=r"norm\.weight: .* not finite, inf at element 3 .* too large for torch\.float16, choose"
    ):
        save_hf(model, tmp_path / "fp16", dtype=torch.float16)
    assert os.listdir(tmp_path) == ["bf16"]


def test_tokenizer_and_manifest_lie_beside_the_weights(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sp")
    model = load_model(originals / "hf")
    save_hf(model, tmp_path / "x", tokenizer=tmp_path / "tokenizer.model")
    assert (tmp_path / "x" / "tokenizer.model").read_bytes() == b"sp"
    assert set(verify_manifest(tmp_path / "x")["files"]) == set(os.listdir(tmp_path / "x")) - {"manifest.json"}
    with pytest.raises(UserError, match="nowhere: no such file; the tokenizer"):
        save_mistral(model, tmp_path / "y", tokenizer=tmp_path / "nowhere")
    with pytest.raises(UserError, match="x: no regular file; the tokenizer"):
        save_mistral(model, tmp_path / "y", tokenizer=tmp_path / "x")
    with pytest.raises(UserError, match="x: exists already"):
        save_mistral(model, tmp_path / "x")
    save_mistral(model, tmp_path / "x", overwrite=True)
    assert set(os.listdir(tmp_path / "x")) == {"params.json", "consolidated.safetensors", "manifest.json"}
