"""Loading against transformers, and everything that stops a load."""

import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import THETA, edit_json, edit_tensors, hf_model, tokens, write_mistral

from minilora.checkpoint import load
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.safetensors_file import TensorEntry
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.nf4 import quantize_nf4

F32 = torch.float32


def assert_same_logits(folder: Path, reference: torch.nn.Module) -> None:
    with torch.no_grad():
        ours, theirs = load_model(folder, dtype=F32)(tokens()), reference(tokens()).logits
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "300KB"])
def test_hf_layout_equals_transformers(tmp_path: Path, attention: str, tied: bool, shard: str) -> None:
    model = hf_model(2, attention, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "300KB")
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("changes", [{"head_dim": 32}, {"num_key_value_heads": 4}, {"sliding_window": None}])
def test_null_keys_mean_what_transformers_means(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = hf_model(3, **changes)
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **dict.fromkeys(changes))
    assert_same_logits(tmp_path, model)


def test_keys_of_transformers_4(hf_folder: Path) -> None:
    edit_json(hf_folder / "config.json", rope_parameters=..., dtype=..., rope_theta=THETA, torch_dtype="float32")
    assert_same_logits(hf_folder, hf_model())


@pytest.mark.parametrize("tied", [False, True])
def test_mistral_layout_equals_transformers(tmp_path: Path, tied: bool) -> None:
    model = hf_model(4, tie_word_embeddings=tied)
    assert_same_logits(write_mistral(model, tmp_path, tied_embeddings=tied), model)


def test_both_layouts_in_one_folder_reads_hf(mistral_folder: Path) -> None:
    other = hf_model(5)
    other.save_pretrained(mistral_folder, max_shard_size="300KB")
    assert_same_logits(mistral_folder, other)


def test_mistral_weights_beside_an_hf_config(mistral_folder: Path, originals: Path) -> None:
    shutil.copy(originals / "hf" / "config.json", mistral_folder)
    assert_same_logits(mistral_folder, hf_model())


def test_the_result_is_frozen_in_eval_mode_and_fully_there(hf_folder: Path) -> None:
    model = load_model(hf_folder, quantize="nf4")
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad or p.is_meta or p.dtype != torch.bfloat16 for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


def test_building_the_model_draws_nothing_and_imports_no_compiler(hf_folder: Path) -> None:
    before = torch.get_rng_state()
    load_model(hf_folder)
    assert torch.equal(torch.get_rng_state(), before)
    code = f"import sys, minilora; minilora.load_model({str(hf_folder)!r}); assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tied_head_stays_one_parameter(tmp_path: Path) -> None:
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_tied_head_may_be_stored_but_must_equal_the_embedding(tmp_path: Path) -> None:
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    embedding = hf_model(tie_word_embeddings=True).model.embed_tokens.weight.detach()
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=embedding.clone())
    load_model(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=embedding + 1)
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding, though config\.json ties them"):
        load_model(tmp_path)


def test_a_loaded_model_does_not_change_with_its_file(hf_folder: Path) -> None:
    model = load_model(hf_folder, dtype=F32)
    before = model.norm.weight.clone()
    with (hf_folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert torch.equal(model.norm.weight, before)
    assert model.lm_head.weight.isfinite().all()


@pytest.mark.parametrize("layout", ["hf", "sharded", "mistral"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_quantized_from_the_files_own_precision(originals: Path, layout: str, double_quant: bool) -> None:
    model = load_model(originals / layout, quantize="nf4", double_quant=double_quant, dtype=torch.bfloat16)
    reference = hf_model().model
    n_quantized = 0
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            n_quantized += 1
            expected = quantize_nf4(reference.get_submodule(name).weight, double_quant=double_quant)
            assert torch.equal(layer.packed, expected.packed), name
            assert torch.equal(layer.weight.dequantize(), expected.dequantize()), name
    assert n_quantized == 14
    assert model.lm_head.weight.dtype == torch.bfloat16


WATCHED_LOAD = """
import ctypes, gc, sys
from minilora.checkpoint import load
from minilora.memory import private_bytes
load.load_model(sys.argv[1], quantize="nf4")  # the libraries are warm after this
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # free memory that is kept for later would hide what the load takes
before, peaks, fill = private_bytes(), [], load.fill
load.fill = lambda *args: (fill(*args), peaks.append(private_bytes() - before))
model = load.load_model(sys.argv[2], quantize="nf4")
print(max(peaks), sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
def test_a_quantized_load_never_holds_the_file(originals: Path, tmp_path: Path) -> None:
    """In a process of its own: what other tests left in the heap is no part of it."""
    hf_model(intermediate_size=512, num_hidden_layers=48).save_pretrained(tmp_path)
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", WATCHED_LOAD, str(originals / "hf"), str(tmp_path)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once: only what lives counts
    peak, result = map(int, subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split())
    assert result < file_bytes / 6
    # The result, a tensor's temporaries and the allocator's slack; a loader that held the file would take all of it.
    assert peak < file_bytes / 2, f"{peak:,} of {file_bytes:,}"


def test_non_finite_weight_is_refused_by_name_and_index(hf_folder: Path) -> None:
    weight = hf_model().model.layers[1].mlp.up_proj.weight.detach().clone()
    weight[3, 5] = float("nan")
    edit_tensors(hf_folder / "model.safetensors", model__layers__1__mlp__up_proj__weight=weight)
    with pytest.raises(UserError, match=rf"layers\.1\.mlp\.up_proj\.weight: element {3 * 128 + 5} .* nan"):
        load_model(hf_folder, quantize="nf4")


def test_a_file_that_changes_during_the_load(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, done = load.fill, count(1)

    def and_touch(*args: Any) -> None:
        fill(*args)
        if next(done) == 3:
            os.utime(hf_folder / "model.safetensors", ns=(0, 0))

    monkeypatch.setattr(load, "fill", and_touch)
    with pytest.raises(UserError, match=r"model\.safetensors: changed while it was read"):
        load_model(hf_folder)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_dense_weight_that_is_not_finite(hf_folder: Path, quantize: Any) -> None:
    edit_tensors(hf_folder / "model.safetensors", model__norm__weight=torch.full((128,), float("-inf")))
    with pytest.raises(UserError, match=r"norm\.weight: holds a number that is not finite, -inf at element 0"):
        load_model(hf_folder, quantize=quantize)


def test_a_dense_weight_that_the_dtype_cannot_hold(hf_folder: Path) -> None:
    edit_tensors(hf_folder / "model.safetensors", model__norm__weight=torch.full((128,), 1e6))
    load_model(hf_folder, dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"norm\.weight: .* inf at element 0 .*if it is too large for torch\.float16, ch"
    ):
        load_model(hf_folder, dtype=torch.float16)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model__norm__weight": None}, r"missing tensor: model\.norm\.weight"),
    (
        {"model__norm__weight": None, "lm_head__weight": None},
        r"missing tensor \(and 1 more\): model\.norm\.weight",
    ),
    ({"model__extra__weight": torch.ones(3)}, r"unknown tensor: 'model\.extra\.weight'"),
    ({"model__layers__2__input_layernorm__weight": torch.ones(128)}, r"unknown tensor: 'model\.layers\.2\."),
    ({"model__norm__weight": torch.ones(127)}, r"model\.norm\.weight .*\(127,\).*config wants \(128,\)"),
    (
        {"model__layers__0__self_attn__q_proj__weight": torch.ones(128, 256)},
        r"q_proj\.weight .*\(128, 256\).*\(256, 128\)",
    ),
    ({"model__norm__weight": torch.ones(128, dtype=torch.int8)}, r"model\.norm\.weight .*I8.*F32, BF16, F16"),
    ({"model__norm__weight": torch.ones(128, dtype=torch.float64)}, r"model\.norm\.weight .*F64"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_tensors_must_be_those_of_the_config(hf_folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_tensors(hf_folder / "model.safetensors", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(hf_folder)
    assert str(hf_folder) in str(caught.value)


def test_nothing_is_read_before_all_headers_are_right(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_tensors(hf_folder / "model.safetensors", lm_head__weight=None)
    monkeypatch.setattr(TensorEntry, "read_bytes", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match="lm_head"):
        load_model(hf_folder)


def test_old_rotary_frequencies_are_skipped(hf_folder: Path) -> None:
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    edit_tensors(hf_folder / "model.safetensors", **{name: torch.ones(32)})
    assert_same_logits(hf_folder, hf_model())


def test_an_absurd_number_of_layers_is_refused_at_once(hf_folder: Path) -> None:
    edit_json(hf_folder / "config.json", num_hidden_layers=2_000_000_000)
    with pytest.raises(UserError, match=r"the files hold 21 tensors, but config\.json says 2,000,000,000 layers"):
        load_model(hf_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_unopened(hf_folder: Path, name: str) -> None:
    (hf_folder / "model.safetensors").unlink()
    trap = hf_folder / "trap"
    (hf_folder / name).write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    with pytest.raises(UserError, match=rf"{name}: pickle files can run code"):
        load_model(hf_folder)
    assert not trap.exists()


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    for name, file in (("a", "adapter_config.json"), ("g", "model.gguf")):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / file).write_text("{}")
        (tmp_path / "others" / name / "training_args.bin").touch()  # which does not say what the folder is
    for path, message in [
        (tmp_path / "others" / "a", "is an adapter; name its base, or what minilora merge makes of both"),
        (tmp_path / "others" / "g", r"is for llama\.cpp; name what it was made from"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / ("x" * 300), "no such folder"),
        (tmp_path, "no checkpoint here"),
        (Path(__file__), "not a folder"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_weights_without_their_config(hf_folder: Path) -> None:
    (hf_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds model\.safetensors but no config\.json"):
        load_model(hf_folder)


def test_wrong_arguments_are_the_programmers(hf_folder: Path) -> None:
    with pytest.raises(ValueError, match="quantize"):
        load_model(hf_folder, quantize="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype"):
        load_model(hf_folder, dtype=torch.int8)


def test_fingerprint_is_of_the_weights_not_of_the_files(originals: Path) -> None:
    prints = {open_checkpoint(originals / layout).fingerprint() for layout in ("hf", "sharded", "mistral")}
    assert len(prints) == 1
    assert load_model(originals / "hf", quantize="nf4").base_fingerprint == prints.pop()


@pytest.mark.parametrize("name", ["norm", "layers.1.mlp.up_proj", "lm_head"])
def test_fingerprint_sees_another_fine_tune(hf_folder: Path, name: str) -> None:
    before = open_checkpoint(hf_folder).fingerprint()
    key = f"{'' if name == 'lm_head' else 'model.'}{name}.weight"
    weight = open_checkpoint(hf_folder).entries[f"{name}.weight"].read()
    edit_tensors(hf_folder / "model.safetensors", **{key.replace(".", "__"): weight * 1.001})
    assert open_checkpoint(hf_folder).fingerprint() != before


def test_index_total_is_not_needed(sharded_folder: Path) -> None:
    index = sharded_folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": values["weight_map"]}))
    assert_same_logits(sharded_folder, hf_model())
