"""Adapters against PEFT, both ways, and everything that makes one be refused."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import lora_layers, merged_weights
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_checkpoints import assert_same_logits, edit_json, edit_tensors, hf_model, randomize, tokens

from minilora.checkpoint.adapter import load_adapter, read_adapter, read_adapter_config, save_adapter, save_peft_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.checkpoint.provenance import read_provenance
from minilora.checkpoint.safetensors_file import TensorEntry
from minilora.checkpoint.save import save_hf
from minilora.config import PROJECTIONS, LoraConfig, PrefixConfig
from minilora.errors import UserError
from minilora.lora import add_lora
from minilora.model import Mistral
from minilora.prefix import add_prefix

F32 = torch.float32
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5.23 for the old name of a flag.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def adapted(originals: Path, **settings: Any) -> Mistral:
    model = add_lora(load_model(originals / "hf", dtype=F32), LoraConfig(**{"rank": 4, "alpha": 6.0, **settings}))
    randomize(model)
    return model


@pytest.fixture
def adapter(originals: Path, tmp_path: Path) -> Path:
    """Our adapter without manifest and provenance, to spoil."""
    save_adapter(adapted(originals, targets=("q_proj", "down_proj")), tmp_path / "adapter")
    (tmp_path / "adapter" / "manifest.json").unlink()
    (tmp_path / "adapter" / "minilora.json").unlink()
    return tmp_path / "adapter"


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
@pytest.mark.parametrize("targets", [PROJECTIONS, ("v_proj", "q_proj")])
def test_peft_loads_ours(originals: Path, tmp_path: Path, options: dict[str, bool], targets: tuple[str, ...]) -> None:
    model = adapted(originals, targets=targets, **options)
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(hf_model(), tmp_path / "a").eval()
    assert_same_logits(model, theirs, load_model(originals / "hf", dtype=F32))


@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("targets", [list(PROJECTIONS), ["q_proj", "v_proj"]])
def test_we_load_pefts(originals: Path, tmp_path: Path, rslora: bool, dora: bool, targets: list[str]) -> None:
    settings = PeftLoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, use_dora=dora, lora_dropout=0.5,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(hf_model(), settings).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    base = load_model(originals / "hf", dtype=F32)
    ours = load_adapter(load_model(originals / "hf", dtype=F32), tmp_path)
    assert_same_logits(ours, theirs, base)  # in eval mode, so without the dropout
    assert ours.lora_config == LoraConfig(4, 6.0, 0.5, tuple(n for n in PROJECTIONS if n in targets), rslora, dora)
    trainable = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in ours.named_parameters() if "lora_" in name}


def test_one_that_began_otherwise_on_the_same_base(originals: Path, tmp_path: Path) -> None:
    """From A and B whose product is zero, so the base is as it was."""
    settings = PeftLoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal", task_type="CAUSAL_LM")
    theirs = get_peft_model(hf_model(), settings).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    base = load_model(originals / "hf", dtype=F32)
    for beginning in ("orthogonal", "mica", "eva"):
        edit_json(tmp_path / "adapter_config.json", init_lora_weights=beginning, eva_config={"rho": 2.0})
        assert_same_logits(load_adapter(load_model(originals / "hf", dtype=F32), tmp_path), theirs, base)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_nf4_equals_pefts_on_the_dequantized_base(originals: Path, tmp_path: Path, dora: bool) -> None:
    base = load_model(originals / "hf", quantize="nf4", dtype=F32)
    save_hf(base, tmp_path / "dense", dtype=F32)
    settings = LoraConfig(rank=4, alpha=6.0, dora=dora)
    model = add_lora(load_model(originals / "hf", quantize="nf4", dtype=F32), settings)
    randomize(model)
    save_adapter(model, tmp_path / "a")
    dense = type(hf_model()).from_pretrained(tmp_path / "dense", dtype=F32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(dense, tmp_path / "a").eval()
    assert_same_logits(model, theirs, base)


def test_round_trip_is_exact_and_float32(originals: Path, tmp_path: Path) -> None:
    model = adapted(originals, targets=("k_proj",), dropout=0.25)
    save_adapter(model, tmp_path / "a", provenance={"base_path": "somewhere", "step": 3})
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {F32}
    again = load_adapter(load_model(originals / "hf"), tmp_path / "a")
    assert again.lora_config == model.lora_config
    for (name, ours), (_, theirs) in zip(lora_layers(again), lora_layers(model), strict=True):
        assert torch.equal(ours.lora_A, theirs.lora_A), name
        assert torch.equal(ours.lora_B, theirs.lora_B), name
    told = read_provenance(tmp_path / "a")
    assert (told["step"], told["base_fingerprint"]) == (3, model.base_fingerprint)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_merge_has_doras_rows(originals: Path, tmp_path: Path, quantize: Any) -> None:
    model = add_lora(load_model(originals / "hf", quantize=quantize, dtype=F32), LoraConfig(rank=4, dora=True))
    randomize(model)
    save_hf(model, tmp_path / "merged", dtype=F32, weights=merged_weights(model, F32))
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", dtype=F32)(tokens())
        torch.testing.assert_close(merged, model(tokens()), atol=1e-4, rtol=0)


# --- Prefixes -------------------------------------------------------------------------------------------------------


def with_prefix(originals: Path, n_tokens: int, **options: Any) -> Mistral:
    torch.manual_seed(5)
    return add_prefix(load_model(originals / "hf", dtype=F32, **options), PrefixConfig(n_tokens))


@pytest.mark.parametrize("window", [7, None])  # of 7: smaller than prefix and tokens
@pytest.mark.parametrize("n_tokens", [1, 4, 11])
def test_peft_loads_our_prefix(tmp_path: Path, n_tokens: int, window: int | None) -> None:
    hf_model(sliding_window=window).save_pretrained(tmp_path / "hf")
    model = with_prefix(tmp_path, n_tokens)
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(hf_model(sliding_window=window), tmp_path / "a").eval()
    assert_same_logits(model, theirs, load_model(tmp_path / "hf", dtype=F32))


@pytest.mark.parametrize("projection", [False, True])
def test_we_load_pefts_prefix(originals: Path, tmp_path: Path, projection: bool) -> None:
    """Also one that a network made: what is saved is the prefix itself."""
    settings = PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=16, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(hf_model(), settings).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(load_model(originals / "hf", dtype=F32), tmp_path)
    assert_same_logits(ours, theirs, load_model(originals / "hf", dtype=F32))
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["prefix.prompt_embeddings"]


def test_a_prefix_comes_back_exactly_on_nf4_too(originals: Path, tmp_path: Path) -> None:
    model = with_prefix(originals, 3, quantize="nf4")
    save_adapter(model, tmp_path / "a")
    again = load_adapter(load_model(originals / "hf", quantize="nf4", dtype=F32), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))
    assert read_adapter_config(tmp_path / "a", model.config) == PrefixConfig(3)
    with pytest.raises(UserError, match="has adapters already"):
        load_adapter(again, tmp_path / "a")


PREFIXES: list[tuple[dict[str, Any], str]] = [
    ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0, but must be a whole number above 0"),
    ({"num_virtual_tokens": ...}, "num_virtual_tokens is None"),
    (
        {"num_virtual_tokens": 4},
        r"prompt_embeddings has shape \(3, 512\); .* and base want \(4, 512\)",
    ),
    ({"token_dim": 256}, "token_dim is 256; a prefix of this base has 128"),
    ({"num_layers": 3}, "num_layers is 3; a prefix of this base has 2"),
    ({"num_attention_heads": 4}, "num_attention_heads is 4; a prefix of this base has 2"),
    ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported"),
    ({"r": 4}, "r is 4, which is not supported"),
]


@pytest.mark.parametrize(("changes", "message"), PREFIXES)
def test_prefixes_that_are_refused(originals: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_adapter(with_prefix(originals, 3), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    edit_json(tmp_path / "a" / "adapter_config.json", **changes)
    assert_refused(originals, tmp_path / "a", message)


def test_a_prefix_has_no_place_in_weights(originals: Path, tmp_path: Path) -> None:
    model = with_prefix(originals, 3)
    with pytest.raises(UserError, match="a prefix has no place in the weights, so it cannot be merged"):
        save_hf(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def assert_refused(originals: Path, folder: Path, message: str) -> None:
    """Refused with `message`, and the model is as it was."""
    model = load_model(originals / "hf", dtype=F32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == layers
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lora_config is None
    assert model.prefix is None


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; only LORA and PREFIX_TUNING"),
    ({"peft_type": ...}, "peft_type is None"),
    ({"r": 0}, "r is 0, but must be above 0"),
    ({"r": "4"}, "r is '4'"),
    ({"r": True}, "r is True"),
    ({"r": ...}, "r is missing"),
    ({"r": 2**30}, r"q_proj\.lora_A\.weight has shape \(4, 128\)"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"lora_alpha": ...}, "lora_alpha is missing"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"use_dora": "yes"}, "use_dora is 'yes'"),
    ({"use_dora": True}, r"lacks .*lora_magnitude_vector, which adapter_config\.json asks for"),
    ({"modules_to_save": ["lm_head"]}, r"lacks base_model\.model\.lm_head\.weight"),
    ({"modules_to_save": ["q_proj"]}, "modules_to_save names 'q_proj'; it may name embed_tokens, lm_head, norm"),
    ({"modules_to_save": ["mlp"]}, "modules_to_save names 'mlp'"),
    ({"modules_to_save": ["score"]}, "modules_to_save names 'score'"),
    ({"modules_to_save": ["j", ""]}, "modules_to_save names 'j'"),
    ({"modules_to_save": [""]}, "modules_to_save names ''"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; list was expected"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"rank_pattern": {"q_proj": 8}}, r"q_proj\.lora_A\.weight has shape \(4, 128\).*want \(8, 128\)"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj is 0, but must be above 0"),
    ({"rank_pattern": {"q_proj": 4.0}}, "rank_pattern is {'q_proj': 4.0}"),
    ({"rank_pattern": {"q_proj": True}}, "rank_pattern is {'q_proj': True}"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*; dict was expected"),
    ({"rank_pattern": {"k_proj": 4}}, "rank_pattern names 'k_proj', which no layer with an adapter is called"),
    ({"alpha_pattern": {"layers.2.self_attn.q_proj": 4}}, "alpha_pattern names 'layers.2"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern q_proj is nan"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern q_proj is -1"),
    ({"alpha_pattern": {"(q_proj": 4}}, r"alpha_pattern is .*\(q_proj.*no regular expression"),
    ({"alpha_pattern": {"(.*)*q_proj": 4}}, "alpha_pattern is .*may take too long to match"),
    ({"exclude_modules": ["down_proj"]}, r"exclude_modules is \['down_proj'\], which is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
    ({"a_feature_of_tomorrow": {"x": 1}}, "a_feature_of_tomorrow is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
    ({"target_modules": "all-linear"}, r"lacks .*layers\.0\.mlp\.gate_proj\.lora_A"),
    ({"target_modules": r".*\.q_proj"}, r"holds .*down_proj.*does not ask for"),
    ({"target_modules": "q_proj"}, "target_modules names 'q_proj', which no layer is called as a regular expression"),
    ({"target_modules": r".*(lm_head|\.q_proj)"}, "target_modules is .*, which matches lm_head, too"),
    ({"target_modules": r"(.+)+\.q_proj"}, "target_modules is .*may take too long to match"),
    ({"target_modules": "["}, "target_modules is '\\[', which is no regular expression"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": 3}, "target_modules is 3; list or str was expected"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": [f"x{i}" for i in range(100_000)]}, "target_modules"),  # in a moment, not in minutes
    ({"target_modules": ["q_proj", "c_attn"]}, "target_modules names 'c_attn'"),
    ({"target_modules": ["lm_head"]}, "target_modules names 'lm_head'"),
    ({"target_modules": ["model.layers.2.self_attn.q_proj"]}, "target_modules names 'model.layers.2"),
    ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, r"holds .*layers\.0\.mlp\.down_proj"),
    ({"target_modules": [["q_proj"]]}, "target_modules is .*; list or str was expected"),
    ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"lacks .*layers\.0\.self_attn\.v_proj\.lora_A\.weight"),
    ({"target_modules": ["q_proj"]}, r"holds .*layers\.0\.mlp\.down_proj\.lora_[AB]\.weight"),
    ({"r": 8}, r"q_proj\.lora_A\.weight has shape \(4, 128\); adapter_config.json and base want \(8, 128\)"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_configs_that_are_refused(originals: Path, adapter: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(adapter / "adapter_config.json", **changes)
    assert_refused(originals, adapter, message)


TENSORS: list[tuple[str, torch.Tensor | None, str]] = [
    (f"{Q0}.lora_A.weight", None, r"lacks .*layers\.0\.self_attn\.q_proj\.lora_A\.weight"),
    (f"{Q0}.lora_B.weight", None, r"lacks .*q_proj\.lora_B\.weight"),
    (f"{Q0}.lora_magnitude_vector", torch.ones(256), r"holds '.*lora_magnitude_vector'"),
    ("base_model.model.lm_head.weight", torch.ones(320, 128), r"holds 'base_model\.model\.lm_head\.weight'"),
    (Q0.replace("s.0", "s.2") + ".lora_A.weight", torch.ones(4, 128), r"holds '.*layers\.2\."),
    (f"{Q0}.lora_A.weight", torch.ones(4, 64), r"lora_A\.weight has shape \(4, 64\).*want \(4, 128\)"),
    (f"{Q0}.lora_A.weight", torch.ones(128, 4), r"lora_A\.weight has shape \(128, 4\)"),
    (f"{Q0}.lora_A.weight", torch.ones(4, 128, dtype=torch.int8), r"lora_A\.weight is stored as I8"),
    (f"{Q0}.lora_A.weight", torch.ones(4, 128, dtype=torch.float64), r"lora_A\.weight is stored as F64"),
    (f"{Q0}.lora_B.weight", torch.full((256, 4), float("nan")), r"lora_B\.weight: holds a number that is not finite"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), TENSORS)
def test_tensors_that_are_refused(
    originals: Path, adapter: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    edit_tensors(adapter / "adapter_model.safetensors", **{name.replace(".", "__"): tensor})
    assert_refused(originals, adapter, rf"adapter_model\.safetensors: .*{message}")


def test_damaged_and_missing_files_are_refused(originals: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert_refused(originals, adapter, "corrupt safetensors: .*truncated")
    weights.unlink()
    assert_refused(originals, adapter, r"adapter_model\.safetensors: no such file")
    (adapter / "adapter_model.bin").write_bytes(content)
    assert_refused(originals, adapter, r"adapter_model\.bin: pickle files can run code")
    (adapter / "adapter_config.json").write_text("{")
    assert_refused(originals, adapter, r"adapter_config\.json: not a readable JSON file")
    shutil.rmtree(adapter)
    assert_refused(originals, adapter, r"adapter_config\.json: no such file")


def test_an_adapter_for_another_base_is_refused(originals: Path, tmp_path: Path) -> None:
    save_adapter(adapted(originals), tmp_path / "a")
    hf_model(99).save_pretrained(tmp_path / "other")
    os.symlink(tmp_path / "other", tmp_path / "hf")
    assert_refused(tmp_path, tmp_path / "a", "trained on another base: fingerprint")


def test_a_newer_provenance_is_refused(originals: Path, adapter: Path) -> None:
    (adapter / "minilora.json").write_text('{"format_version": 3}')
    assert_refused(originals, adapter, r"minilora\.json: format_version is 3; this minilora knows 2")


def test_a_flipped_bit_in_our_own_adapter_is_found(originals: Path, tmp_path: Path) -> None:
    save_adapter(adapted(originals), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert_refused(originals, tmp_path / "a", r"adapter_model\.safetensors: altered since it was written")


def test_a_second_adapter_is_refused(originals: Path, adapter: Path) -> None:
    model = load_adapter(load_model(originals / "hf"), adapter)
    with pytest.raises(UserError, match="has adapters already"):
        load_adapter(model, adapter)


def test_saving_needs_adapters_that_are_finite(originals: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has no adapters to save"):
        save_adapter(load_model(originals / "hf"), tmp_path / "a")
    model = adapted(originals)
    next(layer for _, layer in lora_layers(model)).lora_B.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=rf"{Q0}\.lora_B\.weight: holds a number that is not finite"):
        save_adapter(model, tmp_path / "a")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("to", ["peft", "mistral-finetune"])
def test_what_the_disk_did_not_keep_is_noticed(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """One bit of one tensor, turned in the written file before it is read back."""
    save_adapter(adapted(originals), tmp_path / "a")
    read, sizes = TensorEntry.read, load_model(originals / "hf").config
    adapter = read_adapter(tmp_path / "a", sizes)

    def turned(entry: TensorEntry) -> torch.Tensor:
        tensor = read(entry)
        if ".out.minilora-tmp" in str(entry.file) and re.search(r"layers\.1\..*(v_proj|wv)\.lora_B", entry.key):
            tensor.view(torch.uint8)[3, 5] ^= 1
        return tensor

    monkeypatch.setattr(TensorEntry, "read", turned)
    save = save_peft_adapter if to == "peft" else save_mistral_adapter
    with pytest.raises(UserError, match=r"out: not written: read back, layers\.1\.self_attn\.v_proj\.lora_B differs"):
        save(adapter, sizes, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
