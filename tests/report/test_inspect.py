"""`minilora inspect`: of every kind of folder what it is, and of every damage the reason that its reader gives."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from tiny_runs import TINY, TOKENIZER, MakeConfig, Quiet, Run, refused, tiny_model

from minilora.checkpoint import save
from minilora.checkpoint.adapter import read_adapter, save_adapter
from minilora.checkpoint.export import export_checkpoint
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.save import save_hf, save_mistral
from minilora.config import BaseConfig, LoraConfig, PrefixConfig
from minilora.errors import UserError
from minilora.lora import add_lora
from minilora.memory_at_rest import predict
from minilora.prefix import add_prefix
from minilora.report.console import Console
from minilora.report.facts import fold, gather
from minilora.report.inspect import show_facts
from minilora.train.loop import fine_tune

BF16, F32 = torch.bfloat16, torch.float32
OTHER_TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_model_in_either_layout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mistral(load_model(tiny_base), tmp_path / "mistral", tokenizer=TOKENIZER)
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 60_000)
    save_hf(load_model(tiny_base), tmp_path / "shards")
    found = {name: gather(tmp_path / name) for name in ("mistral", "shards")}
    for name, layout in (("mistral", "mistral"), ("shards", "hf")):
        facts = found[name]
        assert (facts["kind"], facts["layout"], facts["reason"]) == ("model", layout, None)
        assert facts["architecture"]["parameters"] == TINY.n_parameters
        assert (facts["architecture"]["n_kv_heads"], facts["architecture"]["sliding_window"]) == (2, 12)
        assert facts["dtypes"] == {"BF16": {"tensors": 21, "bytes": 2 * TINY.n_parameters}}
        assert "layers.0-1.mlp.up_proj.weight (48, 32) BF16" in facts["tensors"]
        assert facts["bytes"] == sum(f.stat().st_size for f in (tmp_path / name).iterdir())
        assert facts["memory_at_load"] == predict(TINY, torch.bfloat16, None, None)
        assert "quantization" not in facts
    assert found["mistral"]["fingerprint"] == found["shards"]["fingerprint"]
    assert found["mistral"]["tokenizer"].items() >= {"file": "tokenizer.model", "version": "v3"}.items()
    assert "tokenizer" not in found["shards"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_model_in_nf4(tmp_path: Path, tiny_base: Path, double_quant: bool) -> None:
    quantize_checkpoint(tiny_base, tmp_path / "nf4", double_quant=double_quant, dtype=BF16)
    facts = gather(tmp_path / "nf4")
    kind = "nf4 double-quantized" if double_quant else "nf4"
    assert facts["quantization"] == {"type": kind, "block_size": 64, "of": "bfloat16", "stored_as": "U8"}
    data = sum(entry.nbytes for entry in open_checkpoint(tmp_path / "nf4").entries.values())
    beside = sum(e.nbytes for nf4 in open_checkpoint(tmp_path / "nf4").nf4.values() for e in nf4.parts.values())
    assert sum(kind["bytes"] for kind in facts["dtypes"].values()) == data + beside
    assert (facts["dtypes"]["NF4"]["tensors"], facts["dtypes"]["BF16"]["tensors"]) == (14, 7)
    assert facts["reason"] is None


def test_an_export_says_where_it_is_from(tmp_path: Path, tiny_base: Path) -> None:
    export_checkpoint(tiny_base, tmp_path / "out", "hf")
    provenance = gather(tmp_path / "out")["provenance"]
    assert provenance["export"]["fingerprint"] == open_checkpoint(tiny_base).fingerprint()


def spoil_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(values))

    return spoil


def cut(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-9])


def drop(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut("model.safetensors"), r"^corrupt safetensors: .*truncated"),
        (drop("config.json"), "holds model.safetensors but no config.json"),
        (drop("model.safetensors"), "no checkpoint here"),
        (spoil_json("config.json", n_layers=7, num_hidden_layers=7), "missing tensor"),
        (spoil_json("config.json", vocab_size=459), r"shape \(458, 32\): the config wants \(459, 32\)"),
        (spoil_json("config.json", model_type="gpt2"), "model_type is 'gpt2'"),
        (cut("tokenizer.model"), "not a sentencepiece model"),
        (lambda folder: shutil.copyfile(OTHER_TOKENIZER, folder / "tokenizer.model"), "vocabulary has 458"),
        (lambda folder: (folder / "minilora.json").write_text("{"), "not a readable JSON file"),
    ],
)
def test_why_a_model_would_not_load(
    tmp_path: Path, tiny_base: Path, spoil: Callable[[Path], None], reason: str, run: Run
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    spoil(folder)
    status, out, err = run("inspect", folder)
    assert (status, err.count("\n")) == (1, 1)
    assert re.search(reason, err.removeprefix(f"minilora inspect: {folder}: would not load: ")), err
    assert out.startswith(f"model  {folder}\n")
    assert "would load" not in out


def test_a_tied_head_that_is_none(tmp_path: Path) -> None:
    save_hf(tiny_model(), tmp_path / "model", dtype=F32)
    spoil_json("config.json", tie_word_embeddings=True)(tmp_path / "model")
    assert "is not the embedding, though config.json ties them" in gather(tmp_path / "model")["reason"]


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapter_of(base: Path, folder: Path, dora: bool = False, **provenance: Any) -> Path:
    model = add_lora(load_model(base, quantize="nf4", dtype=F32), LoraConfig(rank=4, alpha=8.0, dora=dora))
    save_adapter(model, folder, provenance={"base_path": str(base), **provenance})
    return folder


def test_a_lora(tmp_path: Path, tiny_base: Path) -> None:
    facts = gather(adapter_of(tiny_base, tmp_path / "adapter", dora=True))
    assert (facts["kind"], facts["layout"], facts["reason"]) == ("adapter", "PEFT", None)
    assert facts["adapter"].items() >= {"type": "LoRA", "rank": 4, "alpha": 8.0, "dora": True}.items()
    assert facts["dtypes"]["F32"]["tensors"] == 42
    assert facts["base"] == str(tiny_base)
    assert gather(tmp_path / "adapter" / "adapter_model.safetensors") == facts
    assert facts["provenance"]["quantization"]["double_quant"] is True
    name = "base_model.model.model.layers.0-1.mlp.up_proj.lora_magnitude_vector (48,) F32"
    assert name in facts["tensors"]


def test_a_prefix(tmp_path: Path, tiny_base: Path) -> None:
    model = add_prefix(load_model(tiny_base, dtype=F32), PrefixConfig(5))
    save_adapter(model, tmp_path / "adapter", provenance={"base_path": str(tiny_base)})
    facts = gather(tmp_path / "adapter")
    assert (facts["adapter"], facts["reason"]) == ({"type": "prefix", "n_tokens": 5}, None)
    assert facts["tensors"] == ["prompt_embeddings (5, 128) F32"]


def test_an_adapter_of_mistral_finetune(tmp_path: Path, tiny_base: Path) -> None:
    peft = adapter_of(tiny_base, tmp_path / "peft")
    save_mistral_adapter(read_adapter(peft, TINY), TINY, tmp_path / "ft")
    facts = gather(tmp_path / "ft")
    assert (facts["kind"], facts["layout"], facts["reason"]) == ("adapter", "mistral-finetune", None)
    assert (facts["adapter"]["rank"], facts["adapter"]["alpha"]) == (4, 8.0)
    assert "layers.0-1.attention.wq.lora_A.weight (4, 32) BF16" in facts["tensors"]
    (tmp_path / "ft" / "minilora.json").unlink()
    (tmp_path / "ft" / "manifest.json").unlink()
    assert "does not say where its base lies; give it with --model.path" in gather(tmp_path / "ft")["reason"]
    assert gather(tmp_path / "ft", base=BaseConfig(path=str(tiny_base)))["reason"] is None
    (tmp_path / "ft" / "params.json").unlink()
    base = BaseConfig(path=str(tiny_base))
    assert "no params.json beside it says its scale" in gather(tmp_path / "ft", base=base)["reason"]
    shutil.copy(tmp_path / "ft" / "lora.safetensors", tmp_path / "mine.safetensors")
    for path in ("ft", "ft/lora.safetensors", "mine.safetensors"):  # as `--adapter` takes each
        facts = gather(tmp_path / path, base=base, scaling=2.0)
        assert (facts["kind"], facts["layout"], facts["reason"]) == ("adapter", "mistral-finetune", None)
        assert facts["adapter"]["alpha"] == 8.0


def flip_a_number(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def another_base(folder: Path) -> None:
    save_hf(tiny_model(seed=3), folder.parent / "other", dtype=F32, tokenizer=TOKENIZER)
    (folder / "manifest.json").unlink()
    spoil_json("minilora.json", base_path=str(folder.parent / "other"))(folder)


def no_manifest(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        spoil(folder)

    return both


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_a_number, "adapter_model.safetensors: altered since it was written"),
        (another_base, "trained on another base: fingerprint"),
        (no_manifest(spoil_json("adapter_config.json", r=5)), r"lora_A.*\(4, 32\)"),
        (no_manifest(spoil_json("adapter_config.json", peft_type="IA3")), "peft_type is 'IA3'"),
        (no_manifest(spoil_json("minilora.json", base_path="/nowhere/at/all")), "/nowhere/at/all: no such folder"),
        (no_manifest(spoil_json("minilora.json", tokenizer={"sha256": "0" * 64})), "a tokenizer whose sha256 is"),
        (drop("adapter_model.safetensors"), "adapter_model.safetensors: no such file"),
    ],
)
def test_why_an_adapter_would_not_load(
    tmp_path: Path, tiny_base: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = adapter_of(tiny_base, tmp_path / "adapter")
    spoil(folder)
    found = gather(folder)["reason"]
    assert re.search(reason, found), found
    assert "\n" not in found


# -- runs, GGUF, tokenizers --------------------------------------------------------------------------------------------


def test_a_run_and_its_parts(make_config: MakeConfig, tmp_path: Path, run: Run) -> None:
    fine_tune(make_config(train__checkpoint_every=2), Quiet())
    facts = gather(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (facts["kind"], facts["steps"], facts["finished"], facts["reason"]) == ("run", 4, True, None)
    assert (facts["latest_checkpoint"], facts["after"]) == ("step-00000004", summary["after"])
    assert facts["config"]["lora"]["rank"] == 4
    assert facts["result"]["adapter"]["rank"] == 4
    state = gather(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert (state["kind"], state["counters"]["step"], state["reason"]) == ("checkpoint of a run", 4, None)
    assert any(line.startswith("optimizer.layers.0-1.mlp.up_proj.lora_A.exp_avg ") for line in state["tensors"])
    assert state["read_by"] == "minilora train --resume"
    [best] = (tmp_path / "run" / "checkpoints").glob("best-*")
    assert "--resume" not in gather(best)["read_by"], "it is no optimizer's state"
    shown = StringIO()
    show_facts(gather(tmp_path / "run"), Console(file=shown, width=80, force_terminal=True, color_system=None))
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines if len(line.split()) > 3), "folded"
    assert f"adapter  {tmp_path}/run/adapter" in lines, "the result's own facts stand below its name"
    assert sum("lora  rank 4, alpha" in line for line in lines) == 2, "of config.toml, and of the provenance"
    assert not any(word in line for line in lines for word in ("None", "[]", "reason"))
    assert sum(line.startswith("files              .lock  0 bytes") for line in lines) == 1
    status, out, err = run("inspect", tmp_path / "run")
    assert (status, err) == (0, "")
    assert re.search(r"^latest checkpoint +step-00000004$", out, re.MULTILINE)
    assert out.endswith("would load: yes\n")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert (
        "the run has neither adapter nor model yet; minilora train --resume goes on"
        in (gather(tmp_path / "run")["reason"])
    )


def test_a_gguf_file(tmp_path: Path, tiny_base: Path, run: Run) -> None:
    export_checkpoint(tiny_base, tmp_path / "out", "gguf-q8_0")
    for path in (tmp_path / "out", tmp_path / "out" / "model-q8_0.gguf"):
        facts = gather(path)
        assert (facts["kind"], facts["reason"]) == ("GGUF", None)
        assert (facts["keys"]["llama.block_count"], facts["keys"]["tokenizer.ggml.tokens"]) == (2, "458 values")
        assert "blk.0-1.ffn_up.weight (48, 32) Q8_0" in facts["tensors"]
        assert {kind: entry["tensors"] for kind, entry in facts["dtypes"].items()} == {"Q8_0": 14, "F32": 5, "F16": 2}
    file = tmp_path / "out" / "model-q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-40])  # the last 31 may be padding
    status, _, err = run("inspect", tmp_path / "out")
    assert (status, err.count("\n")) == (1, 1)
    assert "not a whole GGUF file" in err


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.model.v3")
    facts = gather(tmp_path)
    assert (facts["kind"], facts["tokenizer"]["version"], facts["tokenizer"]["vocabulary"]) == ("tokenizer", "v3", 458)
    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    shutil.copyfile(tekken, tmp_path / "tekken.json")
    (tmp_path / "tokenizer.model.v3").unlink()
    assert "is a Tekken tokenizer, which is not supported" in gather(tmp_path)["reason"]


def test_what_is_nothing(tmp_path: Path, run: Run) -> None:
    assert "no checkpoint here" in gather(tmp_path)["reason"]
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        gather(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickle files can run code and are not read" in gather(tmp_path)["reason"]
    assert run("inspect", tmp_path / "nothing")[0] == 1


def test_a_folder_that_may_not_be_read_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may read everything, so the system is told to refuse."""
    children, locked = Path.iterdir, tmp_path / "adapter"
    locked.mkdir()

    def refuse(path: Path) -> Iterator[Path]:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return children(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    refused(run("inspect", locked), 1, f"minilora inspect: {locked}: Permission denied; change its permissions")


def test_what_it_is_instead(tmp_path: Path) -> None:
    """As a comparison, which is a folder of runs, and data."""
    for file in ("compare/a/config.toml", "compare/b/config.toml", "compare/compare.json", "d.jsonl", "d.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    facts = gather(tmp_path / "compare")
    assert (facts["kind"], facts["reason"].partition(": ")[2]) == ("runs", "holds runs, and is none; name one: a, b")
    for file in ("d.jsonl", "d.csv", "compare/a/config.toml"):
        facts = gather(tmp_path / file)
        assert (facts["kind"], facts["reason"].partition(": ")[2]) == (
            "file",
            "no file that tells all; name its folder, or if it holds data: minilora data check",
        )


# -- how it is said ----------------------------------------------------------------------------------------------------


def test_layers_are_folded_where_they_are_alike() -> None:
    listed = [(f"layers.{i}.w", (2, 3), "BF16", 12) for i in (0, 1, 2)] + [("layers.4.w", (2, 3), "BF16", 12)]
    assert list(fold([*listed[:3], ("norm.weight", (3,), "F32", 12)])) == [
        "layers.0-2.w (2, 3) BF16",
        "norm.weight (3,) F32",
    ]
    assert list(fold(listed)) == ["layers.0,1,2,4.w (2, 3) BF16"]
    by_text = sorted((f"layers.{i}.w", (2, 3), "BF16", 12) for i in range(12))  # as the keys of a file are
    assert list(fold(by_text)) == ["layers.0-11.w (2, 3) BF16"]
    assert list(fold([*listed[:2], ("layers.2.w", (9, 3), "BF16", 54)])) == [
        "layers.0-1.w (2, 3) BF16", "layers.2.w (9, 3) BF16"
    ]  # fmt: skip


def test_the_text_and_the_json(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    export_checkpoint(tiny_base, tmp_path / "out", "bnb-4bit")
    status, out, err = run("inspect", tmp_path / "out")
    assert (status, err) == (0, "")
    for line in ("quantization       type  nf4 double-quantized", "architecture       dim  32", "would load: yes"):
        assert line in out.splitlines()
    found = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert found == gather(tmp_path / "out")


def test_markup_and_line_ends_in_a_file_stay_text(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    (folder / "minilora.json").write_text(
        json.dumps({"format_version": 2, "base_path": "[red]x[/nope]\nwould load: yes"})
    )
    _, out, _ = run("inspect", folder)
    assert "[red]x[/nope] would load: yes" in out


def test_what_a_stranger_wrote_commands_no_terminal(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    """Such as to write to the clipboard."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    told = {"format_version": 2, "base_path": "\x1b]52;c;ZXZpbA==\x07", "\x1b[31m": {"\x1b[1m": {"\x1b[2m": "\x1b"}}}
    (folder / "minilora.json").write_text(json.dumps(told))
    (folder / "\x1b[41m.txt").touch()
    _, out, _ = run("inspect", folder)
    assert "\x1b" not in out
    assert r"\x1b]52;c;ZXZpbA==\x07" in out
    assert r"\x1b[41m.txt" in out
    (tmp_path / "\x1b[5m").mkdir()
    assert "\x1b" not in "".join(map(str, run("inspect", tmp_path / "\x1b[5m")))


def test_what_is_nested_too_deeply_is_not_read(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    """What json's own parser still takes is too much for those who go through it."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    for depth, status in ((99, 0), (100, 1), (700, 1)):
        (folder / "minilora.json").write_text(f'{{"format_version": 2, "data": {"[" * depth}{"]" * depth}}}')
        found, _, err = run("inspect", folder)
        assert (found, "nested too deeply" in err) == (status, bool(status))


def test_checksums_find_what_was_altered(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    save_hf(load_model(tiny_base), tmp_path / "model", tokenizer=TOKENIZER)
    facts = gather(tmp_path / "model", checksum=True)
    assert facts["manifest"] == "4 files are as they were written"
    assert facts["sha256"].keys() == facts["files"].keys()
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert gather(tmp_path / "model")["reason"] is None
    status, _, err = run("inspect", tmp_path / "model", "--checksum")
    assert (status, err.count("\n")) == (1, 1)
    assert "model.safetensors: altered since it was written" in err


def test_an_adapter_whose_base_is_named(run: Run, tmp_path: Path, tiny_base: Path) -> None:
    folder = adapter_of(tiny_base, tmp_path / "adapter")
    (folder / "minilora.json").unlink()
    (folder / "manifest.json").unlink()
    assert "give it with --model.path" in run("inspect", folder)[2]
    assert run("inspect", folder, "--model.path", tiny_base)[0] == 0
    save_hf(tiny_model(config=replace(TINY, dim=64)), tmp_path / "wider", dtype=F32, tokenizer=TOKENIZER)
    assert "(4, 32)" in run("inspect", folder, "--model.path", tmp_path / "wider")[2]
