"""Adapters from the command line: the keys of [lora], either layout of files, and what --force overrides, aloud."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from tiny_runs import TOKENIZER, MakeConfig, Quiet, Run, tiny_model

from minilora.checkpoint.adapter import read_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.checkpoint.save import save_hf
from minilora.config import LoraConfig
from minilora.evaluate.perplexity import mean_loss
from minilora.lora import TrainedCopy
from minilora.toml import config_toml
from minilora.train.loop import fine_tune

FEATURES: dict[str, Any] = {
    "targets": r"model\.layers\.\d\.(self_attn|mlp)\.(q|v|up)_proj", "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 5},
    "alpha_pattern": {"up_proj": 3.0}, "modules_to_save": ("lm_head", "model.norm", "embed_tokens"),
}  # fmt: skip


def test_the_keys_are_flags_and_toml(run: Run, tmp_path: Path, make_config: MakeConfig) -> None:
    lora = replace(make_config().lora, **FEATURES)
    file = tmp_path / "run.toml"
    file.write_text(config_toml(replace(make_config(), lora=lora)))
    status, out, err = run("train", file, "--print-config")
    assert (status, tomllib.loads(out)) == (0, tomllib.loads(file.read_text())), err
    flags = [
        "--lora.targets", FEATURES["targets"], "--lora.rank_pattern", json.dumps(FEATURES["rank_pattern"]),
        "--lora.alpha_pattern.up_proj", 3.0, "--lora.modules_to_save", "[lm_head,model.norm,embed_tokens]",
    ]  # fmt: skip
    file.write_text(config_toml(make_config()))
    status, printed, err = run("train", file, *flags, "--print-config")
    assert (status, printed) == (0, out), err
    whole = ["--lora.targets", "[layers.0.self_attn.q_proj,up_proj]"]
    printed = run("train", file, *whole, "--print-config")[1]
    assert tomllib.loads(printed)["lora"]["targets"] == ["layers.0.self_attn.q_proj", "up_proj"]


def test_a_run_with_all_of_it_is_resumed_exactly(make_config: MakeConfig, tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(
        train__checkpoint_every=2, eval__answers=0, eval__samples=0, **{f"lora__{k}": v for k, v in FEATURES.items()}
    )
    done = fine_tune(config, Quiet())
    summary = done.folder.read_json("summary.json")
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.05
    assert [name for name, m in done.model.named_modules() if isinstance(m, TrainedCopy)] == [
        "embed_tokens", "norm", "lm_head"
    ]  # fmt: skip
    adapter = tmp_path / "run" / "adapter"
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    loaded = read_adapter(adapter, done.model.config).attach(load_model(tiny_base, quantize="nf4", dtype=torch.float32))
    assert mean_loss(loaded, done.validation, 64) == summary["after"]["loss"]
    shutil.rmtree(adapter)
    (tmp_path / "run" / "summary.json").unlink()
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("*0004"):
        shutil.rmtree(checkpoint)
    quiet = Quiet()
    fine_tune(config, quiet, resume=True)
    assert "going on after step 2" in quiet.said
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("made")}


@pytest.fixture
def finished(made: dict[str, Path], make_config: MakeConfig) -> Path:
    """A finished run of qlora. Do not change it."""
    if "run" not in made:
        made["run"] = made["root"] / "run"
        fine_tune(make_config(train__output=str(made["run"])), Quiet())
    return made["run"]


def test_what_mistral_finetune_reads_is_used_by_every_verb(
    run: Run, finished: Path, tiny_base: Path, data_folder: Path, tmp_path: Path
) -> None:
    sizes = load_model(tiny_base).config
    adapter = read_adapter(finished / "adapter", sizes)
    save_mistral_adapter(adapter, sizes, tmp_path / "ft")
    validation, flags = data_folder / "validation.jsonl", ["--eval.answers", 0]
    wanted = json.loads(run("evaluate", validation, "--adapter", finished / "adapter", *flags)[1])["loss"]
    status, out, err = run("evaluate", validation, "--adapter", tmp_path / "ft", *flags)  # by its minilora.json
    assert (status, err.count("\n")) == (0, 3), err  # device, memory, what is scored
    assert json.loads(out)["loss"] == pytest.approx(wanted, abs=0.02)  # A and B in bfloat16
    bare = shutil.copy(tmp_path / "ft" / "lora.safetensors", tmp_path / "alone.safetensors")
    named = ["--adapter", bare, "--model.path", tiny_base, "--model.quantize", "nf4", *flags]
    status, _, err = run("evaluate", validation, *named)
    assert (status, err.count("\n")) == (1, 1)
    assert "no params.json beside it says its scale; give it with --adapter_scaling" in err
    status, again, err = run("evaluate", validation, *named, "--adapter_scaling", 2.0)
    assert (status, again) == (0, out), err
    assert run("generate", "a", "--adapter", tmp_path / "ft", "--max_new_tokens", 2)[0] == 0
    status, _, err = run("merge", tmp_path / "ft", tmp_path / "merged")
    assert (status, err) == (0, "")
    assert "--model.path" in run("generate", "a", "--adapter", bare, "--adapter_scaling", 2)[2]


def test_an_adapter_is_exported_both_ways(run: Run, finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Through mistral-finetune's layout and back only bfloat16 is lost; where it comes from goes along."""
    adapter = finished / "adapter"
    for source, to in ((adapter, "mistral-finetune"), (tmp_path / "mistral-finetune", "peft")):
        status, out, err = run("export", source, tmp_path / to, "--to", to)
        assert (status, err) == (0, "")
        assert out == f"28 tensors reopened and compared: all equal\nwritten to {tmp_path / to}\n"
    sizes = load_model(tiny_base).config
    before, after = (read_adapter(folder, sizes) for folder in (adapter, tmp_path / "peft"))
    assert (after.config, after.provenance) == (before.config, before.provenance)
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name], tensor.bfloat16().float()), name
    theirs = PeftConfig.from_pretrained(tmp_path / "peft")
    assert (theirs.r, theirs.base_model_name_or_path) == (4, str(tiny_base))

    (tmp_path / "mistral-finetune" / "params.json").unlink()
    (tmp_path / "mistral-finetune" / "manifest.json").unlink()
    again = ["export", tmp_path / "mistral-finetune", tmp_path / "again", "--to", "peft"]
    status, _, err = run(*again)
    assert (status, err.count("\n")) == (1, 1)
    assert "give it with --adapter_scaling" in err
    assert run(*again, "--adapter_scaling", before.config.alpha / before.config.rank)[0] == 0
    assert "exists already" in run(*again, "--adapter_scaling", 2)[2]
    assert "holds no adapter_config.json" in run("export", tiny_base, tmp_path / "x", "--to", "peft")[2]


def test_force_overrides_aloud(run: Run, finished: Path, data_folder: Path, tmp_path: Path, tiny_base: Path) -> None:
    save_hf(tiny_model(seed=5), tmp_path / "other", dtype=torch.float32, tokenizer=TOKENIZER)
    adapter = Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))
    other = ["--model.path", tmp_path / "other"]
    verbs = (
        ["generate", "a", "--max_new_tokens", 2, "--adapter", adapter],
        ["evaluate", data_folder / "validation.jsonl", "--eval.answers", 0, "--adapter", adapter],
        ["merge", adapter, tmp_path / "merged"],
    )
    for verb in verbs:
        status, _, err = run(*verb, *other)
        assert (status, err.count("\n")) == (1, 1)
        assert "trained on another base" in err
        assert "(--force overrides this)" in err
        status, _, err = run(*verb, *other, "--force")
        assert status == 0, err
        assert err.startswith("warning: overridden by force: ")
        assert "trained on another base: fingerprint" in err.splitlines()[0]
    another = tmp_path / "tokenizer.model.v1"  # whose name says another template
    another.write_bytes(TOKENIZER.read_bytes() + b"\xc0\x0c\x01")  # a field of its file that nobody knows
    (adapter / "README.md").write_text("not listed, so not looked at")
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    tuned = ["--model.path", tiny_base, "--model.tokenizer", another]
    status, _, err = run(*verbs[0], *tuned)
    assert status == 1
    assert "adapter_config.json: altered since it was written" in err
    status, _, err = run(*verbs[0], "--raw", *tuned, "--force")
    words = ("altered since it was written", "a tokenizer whose sha256 is", "a tokenizer whose template is")
    said = zip((*words, "device: ", "memory: "), err.splitlines(), strict=True)
    assert all(word in line for word, line in said), err


def test_another_storage_is_said(run: Run, finished: Path) -> None:
    status, _, err = run("generate", "a", "--adapter", finished / "adapter", "--model.quantize", "none")
    assert status == 0
    assert err.startswith(f"warning: {finished / 'adapter'}: trained on a base stored with type nf4, here it is none")


def test_only_lora_has_modules_to_save(run: Run, tmp_path: Path, make_config: MakeConfig) -> None:
    assert LoraConfig(modules_to_save=["lm_head"]).modules_to_save == ("lm_head",)  # type: ignore[arg-type]
    file = tmp_path / "run.toml"
    file.write_text(config_toml(make_config()))
    status, _, err = run("train", file, "--train.strategy", "full", "--lora.modules_to_save", "[lm_head]")
    assert status != 0
    assert "lora.modules_to_save is for lora and qlora" in err
