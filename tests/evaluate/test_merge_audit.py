"""A merge is read back and compared before it stays: transformers reads it too, and a spoilt one leaves nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TOKENIZER, tiny_model
from transformers import MistralForCausalLM
from transformers.utils import logging as transformers_logging

from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import LoraConfig
from minilora.data.encode import Sample, encode_records
from minilora.data.records import read_records
from minilora.errors import UserError
from minilora.evaluate.merge_audit import merge_with_audit
from minilora.lora import LoRALinear, add_lora, lora_layers
from minilora.model import Mistral
from minilora.tokenizer import load_tokenizer

transformers_logging.disable_progress_bar()


@pytest.fixture
def samples(data_folder: Path) -> list[Sample]:
    records = read_records(data_folder / "validation.jsonl")
    return encode_records(records, load_tokenizer(TOKENIZER), 64)[0]


def trained(base: Path, quantize: Any) -> Mistral:
    """As if it were trained: adapters that change the logits by far more than bf16 rounds away."""
    model = load_model(base, quantize=quantize, dtype=torch.float32)
    torch.manual_seed(0)
    add_lora(model, LoraConfig(rank=4, alpha=8))
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_merged_files_are_the_trained_model(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], quantize: Any
) -> None:
    model = trained(tiny_base, quantize)
    audit = merge_with_audit(model, tmp_path / "merged", samples, 64, TOKENIZER)
    assert audit.passed
    assert 0 < audit.merged.mean_kl < 0.01 * audit.base.mean_kl
    assert f"on {sum(s.n_targets for s in samples)} held-out tokens" in audit.text()
    assert any(True for _ in lora_layers(model)), "the model is as it was"

    tokens = torch.tensor(samples[0].tokens[None], dtype=torch.int64)
    with torch.no_grad():
        expected = model(tokens)
        theirs = MistralForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
        ours = load_model(tmp_path / "merged", dtype=torch.float32)(tokens)
        far = load_model(tiny_base, dtype=torch.float32)(tokens)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    scale = float(expected.abs().max())
    assert float((theirs - expected).abs().max()) < 0.05 * scale
    assert float((far - expected).abs().max()) > 0.2 * scale
    assert (tmp_path / "merged" / TOKENIZER.name).exists()


def double_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = LoRALinear.delta
    monkeypatch.setattr(LoRALinear, "delta", lambda self: 2 * delta(self))


def no_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRALinear, "delta", lambda _: torch.zeros(()))


@pytest.mark.parametrize("damage", [double_the_delta, no_delta])
def test_a_damaged_merge_is_refused_and_nothing_is_left(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    damage(monkeypatch)
    with pytest.raises(UserError, match=r"merged: not written, the merge lost too much: .* KL"):
        merge_with_audit(trained(tiny_base, "nf4"), tmp_path / "merged", samples, 64, TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_an_older_merge_survives_a_damaged_one(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_base, "nf4")
    merge_with_audit(model, tmp_path / "merged", samples, 64)
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        merge_with_audit(model, tmp_path / "merged", samples, 64)
    no_delta(monkeypatch)
    with pytest.raises(UserError, match="lost too much"):
        merge_with_audit(model, tmp_path / "merged", samples, 64, overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before


def test_adapters_that_learnt_nothing_merge_too(tmp_path: Path, samples: list[Sample]) -> None:
    """Base and trained are one model: a tenth of no distance is none, and a merge without rounding has none."""
    rounded = tiny_model()
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16())
    save_hf(rounded, tmp_path / "base", dtype=torch.float32)
    model = add_lora(load_model(tmp_path / "base", dtype=torch.float32), LoraConfig(rank=2)).eval()
    assert merge_with_audit(model, tmp_path / "merged", samples, 64).passed
