"""What minilora.json tells is checked: refused, overridden by force aloud, or said."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import lora_layers
from tiny_checkpoints import edit_json, hf_model, tokens

from minilora.checkpoint.adapter import load_adapter, read_adapter, save_adapter
from minilora.checkpoint.export import export_checkpoint
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.checkpoint.provenance import base_of, check_origin, quantization, read_provenance
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.lora import add_lora

F32 = torch.float32
OPTIONS: list[dict[str, Any]] = [{}, {"quantize": "nf4"}, {"quantize": "nf4", "double_quant": False}]


def trained_on(originals: Path, folder: Path, **options: Any) -> Path:
    save_adapter(add_lora(load_model(originals / "hf", **options), LoraConfig(rank=2)), folder)
    return folder


def test_a_quantization_is_the_models(originals: Path) -> None:
    found = [base_of(load_model(originals / "hf", dtype=F32, **options))["quantization"] for options in OPTIONS]
    assert found == [quantization(None, F32), quantization(True, F32), quantization(False, F32)]
    assert found[2] == {"type": "nf4", "double_quant": False, "block_size": 64, "compute_dtype": "float32"}
    assert found[0] == {"type": "none", "compute_dtype": "float32"}


def test_a_base_that_was_converted_is_the_same_base(originals: Path, tmp_path: Path) -> None:
    """Trained on the original stored in NF4, or on its NF4 checkpoint: each serves the other, another NF4 neither.

    Nor does it matter through how many other forms the one came from the other.
    """
    original, converted, another = originals / "hf", tmp_path / "nf4", tmp_path / "another"
    export_checkpoint(original, tmp_path / "between", "mistral", dtype=torch.float16)
    quantize_checkpoint(tmp_path / "between", converted, dtype=F32)
    hf_model(99).save_pretrained(tmp_path / "hf")
    quantize_checkpoint(tmp_path / "hf", another)
    on = {"of original": trained_on(originals, tmp_path / "a", quantize="nf4"), "of converted": tmp_path / "b"}
    save_adapter(add_lora(load_model(converted), LoraConfig(rank=2)), on["of converted"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for adapter in on.values():
            load_adapter(load_model(original, quantize="nf4"), adapter)
            load_adapter(load_model(converted), adapter)
    for adapter in on.values():
        with pytest.raises(UserError, match="trained on another base: fingerprint"):
            load_adapter(load_model(another), adapter)


SAID = [  # places in OPTIONS: what it was trained on, what it is put on
    (0, 0, None), (1, 1, None), (2, 2, None), (0, 1, "type none, here it is nf4"),
    (1, 0, "type nf4, here it is none"), (2, 0, "type nf4, here it is none"),
    (1, 2, "double_quant True, here it is False"),
    (2, 1, "double_quant False, here it is True"),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours", "said"), SAID)
def test_another_storage_of_the_base_is_said(
    originals: Path, tmp_path: Path, theirs: int, ours: int, said: str | None
) -> None:
    folder, model = (
        trained_on(originals, tmp_path / "a", **OPTIONS[theirs]),
        load_model(originals / "hf", **OPTIONS[ours]),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapter(model, folder)
    texts = [str(warning.message) for warning in caught]
    assert texts == ([f"{folder}: trained on a base stored with {said}; expect slightly other answers"] if said else [])
    assert len(list(lora_layers(model))) == 14


def test_force_overrides_another_base_and_an_altered_file_aloud(originals: Path, tmp_path: Path) -> None:
    folder = trained_on(originals, tmp_path / "a", dtype=F32)
    hf_model(99).save_pretrained(tmp_path / "other")
    other = load_model(tmp_path / "other", dtype=F32)
    edit_json(folder / "adapter_config.json", lora_alpha=1)
    with pytest.raises(UserError, match=r"adapter_config.json: altered since .*\(--force overrides this\)"):
        load_adapter(other, folder)
    assert other.lora_config is None
    with pytest.warns(UserWarning, match="overridden by force") as said:
        load_adapter(other, folder, force=True)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2
    assert "overridden by force: " in texts[0]
    assert "adapter_config.json: altered since it was written" in texts[0]
    assert "overridden by force: " in texts[1]
    assert "trained on another base: fingerprint " in texts[1]
    assert len(list(lora_layers(other))) == 14


def test_what_is_wrong_with_the_tensors_force_does_not_override(originals: Path, tmp_path: Path) -> None:
    folder = trained_on(originals, tmp_path / "a")
    edit_json(folder / "adapter_config.json", r=3)
    with pytest.raises(UserError, match=r"lora_A\.weight has shape \(2, 128\)"):
        load_adapter(load_model(originals / "hf"), folder, force=True)


def test_tokenizer_and_template_are_compared(tmp_path: Path) -> None:
    trained = {"tokenizer": {"sha256": "a", "template": "v3"}}
    assert check_origin(tmp_path, trained, trained, False) == []
    for key in ("sha256", "template"):
        here = {"tokenizer": {"sha256": "a", "template": "v3", key: "b"}}
        with pytest.raises(UserError, match=f"a tokenizer whose {key} is .*, but here it is 'b'"):
            check_origin(tmp_path, trained, here, False)
        (said,) = check_origin(tmp_path, trained, here, True)
        assert "overridden by force" in said
    assert check_origin(tmp_path, {}, {**trained, "base_fingerprint": "f"}, False) == []


def test_a_figure_that_is_not_finite_is_null(originals: Path, tmp_path: Path) -> None:
    """JSON has no NaN: other programs could not read the file."""
    told = {"metrics": {"after": {"loss": float("nan"), "bleu": (1.0, float("inf"))}}, "base_path": "\ud800"}
    model = add_lora(load_model(originals / "hf", dtype=F32), LoraConfig(rank=2))
    save_adapter(model, tmp_path / "a", provenance=told)
    save_mistral_adapter(read_adapter(tmp_path / "a", model.config), model.config, tmp_path / "ft")
    for folder in (tmp_path / "a", tmp_path / "ft"):
        text = (folder / "minilora.json").read_text()
        written = json.loads(text, parse_constant=pytest.fail)
        assert (written["metrics"]["after"], written["base_path"]) == ({"loss": None, "bleu": [1.0, None]}, "\ud800")


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"base_path": 3}, "base_path is 3, but must be a str"),
    ({"base_fingerprint": ["x"]}, r"base_fingerprint is \['x'\], but must be a str"),
    ({"tokenizer": "v3"}, "tokenizer is 'v3', but must be a dict"),
    ({"quantization": "nf4"}, "quantization is 'nf4', but must be a dict"),
    ({"quantization": {"type": "fp4"}}, "its type must be nf4 or none"),
    ({"quantization": {"type": "nf4", "double_quant": "yes"}}, "quantization is "),
    ({"format_version": "2"}, "format_version is '2'"),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_provenance_that_is_refused(originals: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = trained_on(originals, tmp_path / "a")
    edit_json(folder / "minilora.json", **changes)
    with pytest.raises(UserError, match=rf"minilora\.json: .*{message}"):
        read_provenance(folder)


def test_an_adapter_of_another_program_passes(originals: Path, tmp_path: Path) -> None:
    folder = trained_on(originals, tmp_path / "a", quantize="nf4")
    for name in ("minilora.json", "manifest.json"):
        (folder / name).unlink()
    assert read_provenance(folder) == {}
    model = load_adapter(load_model(originals / "hf"), folder)
    assert model(tokens()).shape == (2, 20, 320)
    shutil.rmtree(folder)
