"""A merge goes through the base block by block: its files equal the definition's, its figures those of whole models."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import as_trained, base_predictor, distance, merged_weights, predictor
from safetensors.torch import load_file
from tiny_runs import TINY, TOKENIZER, tiny_model
from transformers import MistralForCausalLM
from transformers.utils import logging as transformers_logging

from minilora.base import Base
from minilora.checkpoint.adapter import load_adapter, read_adapter, save_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.merge import requantized_weight
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.safetensors_file import TensorEntry
from minilora.checkpoint.save import save_hf
from minilora.checkpoint.write import verify_manifest
from minilora.config import BaseConfig, LoraConfig, Route, base_folder
from minilora.data.encode import Sample, read_samples
from minilora.errors import UserError
from minilora.evaluate import merge_pass
from minilora.evaluate.merge_audit import MergeAudit, audit_routes, merge_with_audit
from minilora.evaluate.merge_pass import MergePass
from minilora.linear import NF4Linear
from minilora.lora import LoRALinear, add_lora
from minilora.nf4 import quantize_nf4
from minilora.tokenizer import load_tokenizer
from minilora.train.signals import Stopped

transformers_logging.disable_progress_bar()
F32 = torch.float32


@pytest.fixture
def samples(data_folder: Path) -> list[Sample]:
    return read_samples(data_folder / "validation.jsonl", load_tokenizer(TOKENIZER), 64)


def adapter_for(base: Path, folder: Path, quantize: Any = "nf4", strength: float = 0.1, **settings: Any) -> Path:
    """As if it were trained: its adapters change the logits by far more than bf16 rounds away."""
    model = load_model(base, quantize=quantize, dtype=F32)
    torch.manual_seed(0)
    as_trained(add_lora(model, LoraConfig(**{"rank": 4, "alpha": 8.0, **settings})), strength)
    save_adapter(model, folder, provenance={"tokenizer_path": str(TOKENIZER)})
    return folder


def found(base: Path, adapter: Path, **settings: Any) -> Base:
    given = {"path": str(base), "quantize": "nf4", "tokenizer": str(TOKENIZER), "device": "cpu", "dtype": "float32"}
    return Base.find(BaseConfig(**{**given, **settings}), str(adapter))


def merge(
    base: Path, adapter: Path, out: Path, samples: list[Sample], storage: Any = None, **options: Any
) -> MergeAudit:
    there = found(base, adapter, **(storage or {}))
    return merge_with_audit(there, read_adapter(adapter, there.checkpoint.config), out, samples, 64, **options)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "some layers, whole embedding and head": {
        "targets": ("q_proj", "down_proj"), "rslora": True, "modules_to_save": ("embed_tokens", "lm_head", "norm"),
    },
}  # fmt: skip


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_and_figures_are_those_of_whole_models(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], kind: str, quantize: str
) -> None:
    """What goes block by block is held against models that are loaded whole: the definition."""
    nf4 = "nf4" if quantize == "nf4" else None
    adapter = adapter_for(tiny_base, tmp_path / "adapter", nf4, **KINDS[kind])
    audit = merge(tiny_base, adapter, tmp_path / "merged", samples, {"quantize": quantize})
    model = load_adapter(load_model(tiny_base, quantize=nf4, dtype=F32), adapter).eval()
    written = open_checkpoint(tmp_path / "merged")
    for name, weight in merged_weights(model):
        assert torch.equal(written.read(spec_of(written, name)), weight), name

    merged = load_model(tmp_path / "merged", dtype=F32)
    for got, p in ((audit.routes["trained"], predictor(merged)), (audit.base, base_predictor(model))):
        expected = distance(p, predictor(model), samples, 64)
        for figure, value in vars(expected).items():
            assert getattr(got, figure) == pytest.approx(value, rel=1e-3, abs=1e-6), figure
    assert audit.passed("trained")
    assert 0 < audit.routes["trained"].mean_kl < 0.01 * audit.base.mean_kl
    assert audit.n_bytes["trained"] == 2 * TINY.n_parameters

    tokens = torch.tensor(samples[0].tokens[None], dtype=torch.int64)
    with torch.no_grad():
        theirs = MistralForCausalLM.from_pretrained(tmp_path / "merged", dtype=F32)(tokens).logits
        torch.testing.assert_close(theirs, merged(tokens), atol=1e-5, rtol=1e-5)


def spec_of(checkpoint: Any, name: str) -> Any:
    return next(spec for spec in checkpoint.tensors() if spec.name == name)


def test_a_tied_head_is_merged_once(tmp_path: Path, samples: list[Sample]) -> None:
    save_hf(tiny_model(config=replace(TINY, tied_embeddings=True)), tmp_path / "base", dtype=F32)
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter")
    audit = merge(tmp_path / "base", adapter, tmp_path / "merged", samples)
    model = load_adapter(load_model(tmp_path / "base", quantize="nf4", dtype=F32), adapter).eval()
    expected = distance(base_predictor(model), predictor(model), samples, 64)
    assert audit.base.mean_kl == pytest.approx(expected.mean_kl, rel=1e-3)
    assert audit.passed("trained")


def test_onto_the_original_base(tmp_path: Path, tiny_base: Path, samples: list[Sample]) -> None:
    """W + s B A, not W' + s B A: NF4's error comes back with the sign it was trained against."""
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    audit = merge(tiny_base, adapter, tmp_path / "merged", samples, route="original", force=True)
    with pytest.warns(UserWarning, match="trained on a base stored with type nf4, here it is none"):
        plain = load_adapter(load_model(tiny_base, dtype=F32), adapter).eval()
    written = open_checkpoint(tmp_path / "merged")
    for name, weight in merged_weights(plain):
        assert torch.equal(written.read(spec_of(written, name)), weight), name
    trained = load_adapter(load_model(tiny_base, quantize="nf4", dtype=F32), adapter).eval()
    expected = distance(predictor(load_model(tmp_path / "merged", dtype=F32)), predictor(trained), samples, 64)
    assert audit.routes["original"].mean_kl == pytest.approx(expected.mean_kl, rel=1e-3)


@pytest.mark.parametrize("double_quant", [True, False])
def test_requantized_is_what_quantize_makes_of_the_merged(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], double_quant: bool
) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    storage = {"double_quant": double_quant}
    merge(tiny_base, adapter, tmp_path / "merged", samples, storage)
    audit = merge(tiny_base, adapter, tmp_path / "again", samples, storage, route="requantized", force=True)
    quantize_checkpoint(tmp_path / "merged", tmp_path / "expected", double_quant=double_quant)
    again, expected = open_checkpoint(tmp_path / "again"), open_checkpoint(tmp_path / "expected")
    assert again.fingerprint() == expected.fingerprint()
    assert again.nf4.keys() == expected.nf4.keys()
    for name, entry in again.nf4.items():
        assert torch.equal(entry.read().packed, expected.nf4[name].read().packed), name
    held = load_file(tmp_path / "again" / "model.safetensors").values()
    assert audit.n_bytes["requantized"] == sum(tensor.nbytes for tensor in held)


def test_the_table_of_all_ways(tmp_path: Path, tiny_base: Path, samples: list[Sample]) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    there = found(tiny_base, adapter)
    audit = audit_routes(there, read_adapter(adapter, there.checkpoint.config), samples, 64)
    assert list(audit.routes) == ["trained", "original", "requantized"]
    one: Route
    for one in ("trained", "original", "requantized"):
        alone = merge(tiny_base, adapter, tmp_path / one, samples, route=one, force=True)
        assert alone.routes[one] == audit.routes[one]
        assert alone.base == audit.base
        assert alone.n_bytes[one] == audit.n_bytes[one]
    assert audit.routes["trained"].mean_kl < audit.routes["requantized"].mean_kl
    assert [row[0] for row in audit.rows()] == ["trained", "original", "requantized", "(base)"]


def test_an_nf4_folder_is_a_base_too(tmp_path: Path, tiny_base: Path, samples: list[Sample]) -> None:
    quantize_checkpoint(tiny_base, tmp_path / "nf4")
    adapter = adapter_for(tmp_path / "nf4", tmp_path / "adapter", None)
    assert merge(tmp_path / "nf4", adapter, tmp_path / "merged", samples, {"quantize": "auto"}).passed("trained")
    with pytest.raises(UserError, match="the original base is in NF4 here"):
        merge(tmp_path / "nf4", adapter, tmp_path / "m2", samples, {"quantize": "auto"}, route="original")


def test_no_more_than_two_parts_are_ever_in_memory(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that weights go into, and its copy for those that are merged; of a base of seven parts."""
    save_hf(tiny_model(config=replace(TINY, n_layers=4)), tmp_path / "base", dtype=F32)
    adapter, take = adapter_for(tmp_path / "base", tmp_path / "adapter"), MergePass._take
    taken, alive = list[weakref.ref[Any]](), list[int]()

    def noted(run: MergePass, name: str) -> Any:
        part = take(run, name)
        taken.append(weakref.ref(part.get_submodule(name)))
        alive.append(sum(part() is not None for part in taken))
        return part

    monkeypatch.setattr(MergePass, "_take", noted)
    merge(tmp_path / "base", adapter, tmp_path / "merged", samples)
    assert alive == [1, 2] * 7


def double_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = LoRALinear.delta
    monkeypatch.setattr(LoRALinear, "delta", lambda self: 2 * delta(self))


def no_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRALinear, "delta", lambda _: torch.zeros(()))


@pytest.mark.parametrize("damage", [double_the_delta, no_delta])
def test_a_damaged_merge_is_refused_and_nothing_is_left(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    damage(monkeypatch)
    with pytest.raises(UserError, match=r"not written, the merge lost too much \(--force overrides this\): .* KL"):
        merge(tiny_base, adapter, tmp_path / "merged", samples)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]
    assert not merge(tiny_base, adapter, tmp_path / "merged", samples, force=True).passed("trained")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_older_merge_survives_a_damaged_one(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    merge(tiny_base, adapter, tmp_path / "merged", samples)
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        merge(tiny_base, adapter, tmp_path / "merged", samples)
    no_delta(monkeypatch)
    with pytest.raises(UserError, match="lost too much"):
        merge(tiny_base, adapter, tmp_path / "merged", samples, overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before


def test_what_the_disk_did_not_keep_is_noticed(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one weight, turned in the written file before it is read back."""
    adapter, read = adapter_for(tiny_base, tmp_path / "adapter"), TensorEntry.read

    def turned(entry: TensorEntry) -> torch.Tensor:
        tensor = read(entry)
        if entry.key == "model.layers.1.mlp.up_proj.weight" and "merged" in str(entry.file):
            tensor.view(torch.int16)[3, 5] ^= 1
        return tensor

    monkeypatch.setattr(TensorEntry, "read", turned)
    with pytest.raises(UserError, match=rf"^{tmp_path}/merged: read back, layers\.1\.mlp\.up_proj\.weight differs"):
        merge(tiny_base, adapter, tmp_path / "merged", samples)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("after", [1, 3])
def test_it_may_be_stopped_while_it_is_measured_and_read_back(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], after: int
) -> None:
    adapter, asked = adapter_for(tiny_base, tmp_path / "adapter"), list[int]()

    def progress(done: int, of: int) -> None:
        asked.append(done)
        if asked.count(of) > after:  # the first of them says that all weights are done
            raise Stopped("stopped", 2)

    with pytest.raises(Stopped):
        merge(tiny_base, adapter, tmp_path / "merged", samples, progress=progress)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


def test_text_whose_states_do_not_fit_is_refused_before_a_block_is_read(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every token, prompts included, each model that goes along has a state; the rows are filled up."""
    adapter, n_tokens = adapter_for(tiny_base, tmp_path / "adapter"), sum(sample.length for sample in samples)
    least = 4 * n_tokens * TINY.dim * 3  # the base's, the trained model's, the merged one's
    monkeypatch.setattr(merge_pass, "free_bytes", lambda _: least - 1)
    with pytest.raises(UserError, match=r"prompts included, take .* are free; compare on fewer, with --audit_tokens"):
        merge(tiny_base, adapter, tmp_path / "merged", samples)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("path", ["demo", "."])
def test_the_base_has_a_name(
    tmp_path: Path, tiny_base: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tiny_base)
    adapter = adapter_for(base_folder(path), tmp_path / "adapter")
    merge(Path(path), adapter, tmp_path / "m", samples, force=True)
    made = json.loads((tmp_path / "m" / "minilora.json").read_text())["export"]
    assert made["from"] == ("demo" if path == "demo" else tiny_base.name)


def test_beside_the_weights_lies_where_they_come_from(tmp_path: Path, tiny_base: Path, samples: list[Sample]) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    audit = merge(tiny_base, adapter, tmp_path / "merged", samples)
    facts = json.loads((tmp_path / "merged" / "minilora.json").read_text())
    assert facts["base_fingerprint"] == open_checkpoint(tiny_base).fingerprint()
    assert facts["audit"]["route"] == "trained"
    assert facts["audit"]["merged"]["mean_kl"] == audit.routes["trained"].mean_kl
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# merged" in card
    assert '"onto": "trained"' in card
    assert (tmp_path / "merged" / TOKENIZER.name).read_bytes() == TOKENIZER.read_bytes()
    assert {"README.md", "minilora.json", "model.safetensors"} <= verify_manifest(tmp_path / "merged")["files"].keys()


def test_adapters_that_learnt_nothing_merge_too(tmp_path: Path, tiny_base: Path, samples: list[Sample]) -> None:
    """Base and trained are one model, a tenth of no distance is none; but rounding to bfloat16 makes one."""
    adapter = adapter_for(tiny_base, tmp_path / "adapter", strength=0.0)
    audit = merge(tiny_base, adapter, tmp_path / "merged", samples)
    assert audit.base.mean_kl == 0 < audit.routes["trained"].mean_kl
    assert audit.passed("trained")
    assert not replace(audit, routes={"trained": replace(audit.base, mean_kl=1e-3)}).passed("trained")
    little = replace(audit.base, mean_kl=1e-5)  # of an adapter that learnt little all may be lost, below any rounding
    assert not replace(audit, base=little, routes={"trained": little}).passed("trained")


@pytest.mark.parametrize("double_quant", [True, False])
def test_requantized_a_layer_without_an_adapter_keeps_its_bytes(double_quant: bool) -> None:
    """Unless it is to be stored otherwise."""
    weight = quantize_nf4(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)))
    made = requantized_weight(NF4Linear(weight), double_quant, torch.bfloat16)
    assert (made.nested_absmax is not None, made.dtype) == (double_quant, torch.bfloat16)
    if double_quant:
        assert all(torch.equal(a, b) for a, b in zip(made.parts, weight.parts, strict=True))
