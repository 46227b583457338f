"""A folder quantized on the disk is what `load_model` makes in memory; disks that fill, kills, sources that change."""

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import as_trained, lora_layers
from disks import dead_pid, largest_file
from tiny_checkpoints import edit_tensors, hf_model

from minilora.checkpoint import load, save
from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.write import verify_manifest
from minilora.cli import main
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.lora import add_lora
from minilora.memory import private_bytes

DATA = Path(__file__).parents[2] / "minilora" / "demo" / "data"


def assert_same_bytes(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Every parameter and buffer, by name, bit for bit."""
    left, right = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("layout", ["hf", "sharded", "mistral"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_loads_as_its_source_quantizes(
    originals: Path, tmp_path: Path, layout: str, double_quant: bool, dtype: torch.dtype
) -> None:
    before = {file: file.read_bytes() for file in (originals / layout).iterdir()}
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(
        originals / layout,
        tmp_path / "nf4",
        double_quant=double_quant,
        progress=lambda done, of: seen.append((done, of)),
    )
    in_memory = load_model(originals / layout, quantize="nf4", double_quant=double_quant, dtype=dtype)
    on_disk = load_model(tmp_path / "nf4", dtype=dtype)
    assert_same_bytes(in_memory, on_disk)
    layers = [(m, n) for m, n in zip(in_memory.modules(), on_disk.modules(), strict=True) if isinstance(m, NF4Linear)]
    assert len(layers) == 14
    assert all(m.weight_dtype == n.weight_dtype == torch.float32 for m, n in layers)
    assert seen == sorted(seen)
    assert seen[-1] == (in_memory.config.n_parameters,) * 2
    assert {file: file.read_bytes() for file in (originals / layout).iterdir()} == before


def test_shards_index_manifest_and_tokenizer(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "notes.txt"):
        (hf_folder / name).write_text(name)
    quantize_checkpoint(hf_folder, tmp_path / "one")
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 60_000)
    quantize_checkpoint(hf_folder, tmp_path / "many")
    names = set(os.listdir(tmp_path / "many"))
    assert {"tokenizer.model", "tokenizer_config.json"} < names
    assert "notes.txt" not in names
    assert set(verify_manifest(tmp_path / "many")["files"]) == names - {"manifest.json"}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    up = {file for key, file in index["weight_map"].items() if key.startswith("model.layers.1.mlp.up_proj.weight")}
    assert len(up) == 1, "a weight and what stands beside it lie together"
    config = json.loads((tmp_path / "many" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }
    assert_same_bytes(load_model(tmp_path / "many"), load_model(tmp_path / "one"))
    assert open_checkpoint(tmp_path / "many").fingerprint() == open_checkpoint(tmp_path / "one").fingerprint()
    assert set(os.listdir(tmp_path)) == {"hf", "many", "one"}


def test_another_dtype_is_that_of_all_that_stays_dense(originals: Path, tmp_path: Path) -> None:
    quantize_checkpoint(originals / "hf", tmp_path / "x", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path / "x")
    assert {e.dtype for name, e in checkpoint.entries.items() if name not in checkpoint.nf4} == {"BF16"}
    assert {entry.dtype for entry in checkpoint.nf4.values()} == {torch.bfloat16}
    assert_same_bytes(load_model(tmp_path / "x"), load_model(originals / "hf", quantize="nf4"))


# --- What is refused, and leaves everything as it was -----------------------------------------------------------------


def refused(message: str, source: Path, out: Path, **options: Any) -> None:
    """One line, and the folder around `out` holds what it held."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        quantize_checkpoint(source, out, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before


def test_a_source_that_is_quantized_already(originals: Path, tmp_path: Path) -> None:
    quantize_checkpoint(originals / "hf", tmp_path / "x")
    refused(r"x: is in NF4 already; name the checkpoint", tmp_path / "x", tmp_path / "y")


def test_targets_that_are_in_the_way(hf_folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(hf_folder, tmp_path / "x")
    refused("x: exists already", hf_folder, tmp_path / "x")
    refused("hf: holds .*hf, which it would be made from", hf_folder, hf_folder, overwrite=True)
    refused("holds .*hf, which it would be made from", hf_folder, tmp_path, overwrite=True)
    quantize_checkpoint(hf_folder, tmp_path / "x", double_quant=False, overwrite=True)
    assert not open_checkpoint(tmp_path / "x").double_quant
    (tmp_path / "x" / "mine.txt").write_text("precious")
    refused(r"x: holds mine\.txt, which minilora did not write", hf_folder, tmp_path / "x", overwrite=True)
    (tmp_path / "file").touch()
    refused("file: is a link or a file; choose another name", hf_folder, tmp_path / "file")
    refused("x: could not be written: a part of that path is a file; choose", hf_folder, tmp_path / "file" / "x")


def test_a_refusal_and_a_run_leave_the_backups_beside_the_target(hf_folder: Path, tmp_path: Path) -> None:
    ours = tmp_path / f".x.minilora-tmp-{(dead := dead_pid())}"
    backups = [tmp_path / f"x.old-{dead}", tmp_path / "x.old-20240501", tmp_path / f"x.tmp-{dead}"]
    for folder in (ours, tmp_path / "x", *backups):
        folder.mkdir()
        (folder / "precious").touch()
    refused("x: exists already", hf_folder, tmp_path / "x")  # and nothing is swept
    shutil.rmtree(tmp_path / "x")
    quantize_checkpoint(hf_folder, tmp_path / "x")
    assert not ours.exists()
    assert all((folder / "precious").exists() for folder in backups)


def test_a_folder_that_appears_meanwhile_is_not_replaced(hf_folder: Path, tmp_path: Path) -> None:
    def progress(_done: int, _of: int) -> None:
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "precious").touch()

    with pytest.raises(UserError, match="x: exists already; choose another name"):
        quantize_checkpoint(hf_folder, tmp_path / "x", progress=progress)
    assert set(os.listdir(tmp_path)) == {"hf", "x"}
    assert os.listdir(tmp_path / "x") == ["precious"]


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tokenizer.json"])
@pytest.mark.parametrize("broken", ["link", "folder"])
def test_a_tokenizer_that_is_no_file(hf_folder: Path, tmp_path: Path, name: str, broken: str) -> None:
    file = hf_folder / name
    if broken == "link":
        file.symlink_to("nowhere")
    else:
        file.mkdir()
    refused(rf"hf/{name}: a broken link or no file; put .* there, or remove it$", hf_folder, tmp_path / "x")


def test_a_tokenizer_that_cannot_be_read(hf_folder: Path, tmp_path: Path) -> None:
    """Is no fault of the folder that is written. One elsewhere, as somebody's key, is no part of the model."""
    unreadable = "/proc/self/mem"  # which opens for root, too, and cannot be read
    with pytest.raises(UserError, match=f"^{unreadable}: cannot be read: Input/output error$"):
        save.save_hf(load_model(hf_folder), tmp_path / "x", tokenizer=unreadable)
    (tmp_path / "key").write_text("secret")
    (hf_folder / "special_tokens_map.json").symlink_to(tmp_path / "key")
    refused(r"special_tokens_map\.json: a link out of the folder is not followed", hf_folder, tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            (192, 128),
            r"layers\.1\.mlp\.up_proj\.weight: element 389 .* nan.* fetch",
        ),
        ("model.embed_tokens.weight", (320, 128), r"embed_tokens\.weight: .* nan at element 389 .* fetch"),
        ("lm_head.weight", (320, 128), r"lm_head\.weight: .* nan at element 389 .* fetch"),
    ],
)
def test_numbers_that_are_not_finite(
    hf_folder: Path, tmp_path: Path, name: str, shape: tuple[int, int], message: str
) -> None:
    weight = torch.randn(shape)
    weight.view(-1)[3 * 128 + 5] = float("nan")
    edit_tensors(hf_folder / "model.safetensors", **{name.replace(".", "__"): weight})
    refused(r"hf/model\.safetensors: " + message, hf_folder, tmp_path / "x")


def test_numbers_that_the_dtype_cannot_hold(hf_folder: Path, tmp_path: Path) -> None:
    edit_tensors(hf_folder / "model.safetensors", model__norm__weight=torch.full((128,), 1e6))
    message = r"norm\.weight: .* inf at element 0 .* too large for torch\.float16, choose another dtype"
    refused(message, hf_folder, tmp_path / "x", dtype=torch.float16)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_matrix_that_the_dtype_cannot_hold(hf_folder: Path, tmp_path: Path, double_quant: bool) -> None:
    weight = torch.randn(192, 128).bfloat16()
    weight[1, 5] = 3.3895e38  # the largest of bfloat16
    edit_tensors(hf_folder / "model.safetensors", model__layers__1__mlp__up_proj__weight=weight)
    message = r"hf/model\.safetensors: layers\.1\.mlp\.up_proj\.weight: absmax .* too large for torch\.float16, choose"
    refused(message, hf_folder, tmp_path / "x", dtype=torch.float16, double_quant=double_quant)
    quantize_checkpoint(hf_folder, tmp_path / "x", double_quant=double_quant)


def rewrite(file: Path) -> None:
    file.write_bytes(file.read_bytes())


def replace_by_a_copy(file: Path) -> None:
    shutil.copy2(file, file.with_suffix(".new"))  # same size, same time
    file.with_suffix(".new").replace(file)


def cut(file: Path) -> None:
    os.truncate(file, 5_000)


@pytest.mark.parametrize("spoil", [rewrite, replace_by_a_copy, cut, os.unlink])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_source_that_changes_meanwhile(
    hf_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], when: str
) -> None:
    def progress(done: int, of: int) -> None:
        if (done == of) == (when == "last") and not spoilt:
            time.sleep(0.01)  # a file system's clock may tick every few milliseconds only
            spoil(hf_folder / "model.safetensors")
            spoilt.append(done)

    spoilt: list[int] = []
    message = r"hf/model\.safetensors: (changed while it was read; run this again|cannot be read)"
    with pytest.raises(UserError, match=message):
        quantize_checkpoint(hf_folder, tmp_path / "x", progress=progress)
    assert spoilt
    assert os.listdir(tmp_path) == ["hf"]


def test_space_is_checked_before_a_byte_is_written(originals: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    refused(r"GB are needed, 0\.001 GB are free", originals / "hf", tmp_path / "x")


def test_a_file_size_limit_in_the_middle(originals: Path, tmp_path: Path) -> None:
    with largest_file(200_000):
        refused(r"x: could not be written: .*ulimit -f", originals / "hf", tmp_path / "x")


@pytest.mark.parametrize("disk", ["200k"], indirect=True)
def test_a_full_disk_in_the_middle(originals: Path, disk: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("minilora.checkpoint.write.check_space", lambda *_: None)
    refused("x: could not be written: the disk is full", originals / "hf", disk / "x")


# --- Memory and signals, on something larger --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 million weights in float32, 122 MB; the largest tensor has 8 MB."""
    folder = tmp_path_factory.mktemp("larger") / "source"
    hf_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=4096).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
def test_memory_holds_a_few_weights_of_the_source(originals: Path, larger: Path, tmp_path: Path) -> None:
    quantize_checkpoint(originals / "hf", tmp_path / "warm")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak = private_bytes(), 0

    def watch(_done: int, _of: int) -> None:
        nonlocal peak
        peak = max(peak, private_bytes() - before)

    quantize_checkpoint(larger, tmp_path / "x", progress=watch)
    assert (larger / "model.safetensors").stat().st_size > 110e6
    # Two weights read, two quantized (8 MB each at most), and what quantizing a chunk takes (20 MB). Of a 7B model:
    # two of 268 MB and two of 117 MB.
    assert peak < 60e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
def test_a_load_takes_little_more_than_the_weights(
    larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(larger, tmp_path / "x")
    load_model(tmp_path / "x")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, fill = private_bytes(), 0, load.fill

    def watch(*args: Any) -> None:
        nonlocal peak
        fill(*args)
        peak = max(peak, private_bytes() - before)

    monkeypatch.setattr(load, "fill", watch)
    model = load_model(tmp_path / "x", dtype=torch.float32)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert weights > 25e6
    assert peak < weights + 6e6


def start(source: Path, out: Path) -> "subprocess.Popen[str]":
    """`minilora quantize` in a process of its own, once it has begun to write."""
    # The lowest priority, so that a busy machine does not let it end before it is looked at.
    command = ["nice", "-n", "19", sys.executable, "-m", "minilora", "quantize", str(source), str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 600  # a busy machine lets it wait
    while not list(out.parent.glob(f".{out.name}.minilora-tmp-*/model.safetensors")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it has not begun to write: {process.communicate()[1]}")
        time.sleep(0.001)
    return process


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_nothing_is_left(larger: Path, tmp_path: Path, signum: int, status: int) -> None:
    process = start(larger, tmp_path / "x")
    process.send_signal(signum)
    _, err = process.communicate(timeout=600)
    assert process.returncode == status
    assert err == f"minilora quantize: {tmp_path / 'x'}: stopped, nothing was written\n"
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_folder_and_the_next_one_sweeps(larger: Path, tmp_path: Path) -> None:
    process = start(larger, tmp_path / "x")
    process.kill()
    process.communicate(timeout=60)
    assert os.listdir(tmp_path) == [f".x.minilora-tmp-{process.pid}"]
    other = f".other.minilora-tmp-{process.pid}"
    (tmp_path / other).mkdir()  # not ours to judge
    quantize_checkpoint(larger, tmp_path / "x")
    assert set(os.listdir(tmp_path)) == {"x", other}
    verify_manifest(tmp_path / "x")
    load_model(tmp_path / "x")


# --- The verb, and the others on what it wrote ------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str], *args: object, status: int = 1) -> str:
    """The line on stderr of a command that fails with this status."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_the_verb_and_everything_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nf4, train = tmp_path / "nf4", tmp_path / "train.jsonl"
    assert main(["quantize", "demo", str(nf4), "--double_quant", "false"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"written to {nf4}"
    assert "100%" in out
    assert "ETA 0 s" in out
    assert "exists already" in one_line(capsys, "quantize", "demo", nf4)
    assert "is in NF4 already" in one_line(capsys, "quantize", nf4, tmp_path / "again")
    assert "out is empty; name a file or folder" in one_line(capsys, "quantize", "demo", "", status=2)
    assert main(["quantize", "demo", str(nf4), "--double_quant", "false", "--overwrite"]) == 0

    assert main(["generate", "--model.path", str(nf4), "--max_new_tokens", "8", 'How is "mistral" pronounced?']) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    flags = ["--model.quantize", "nf4", "--model.double_quant", "false", "--max_new_tokens", "8"]
    assert main(["generate", *flags, 'How is "mistral" pronounced?']) == 0
    assert capsys.readouterr().out.splitlines() == [said]
    assert "by these files model.quantize is nf4" in one_line(
        capsys, "generate", "--model.path", nf4, "--model.quantize", "none", "hi"
    )

    train.write_text("".join((DATA / "chat_train.jsonl").read_text().splitlines(keepends=True)[:40]))
    held_out = tmp_path / "validation.jsonl"
    held_out.write_text("".join((DATA / "chat_validation.jsonl").read_text().splitlines(keepends=True)[:20]))
    run = ["train", "--model.path", nf4, "--data.train", train, "--data.validation", held_out, "--train.max_steps", 2]
    run += ["--train.output", tmp_path / "run", "--data.max_seq_len", 64, "--eval.answers", 0, "--eval.samples", 1]
    for strategy in ("lora", "full"):
        err = one_line(capsys, *run, "--train.strategy", strategy)
        assert f'train.strategy "{strategy}" needs plain weights, but by these files model.quantize is nf4' in err
    assert main([str(arg) for arg in run]) == 0
    assert "linear layers NF4;" in capsys.readouterr().out
    assert "double_quant = false" in (tmp_path / "run" / "config.toml").read_text()
    provenance = json.loads((tmp_path / "run" / "adapter" / "minilora.json").read_text())
    assert (provenance["base_path"], provenance["quantization"]["double_quant"]) == (str(nf4), False)
    assert provenance["base_fingerprint"] == open_checkpoint(nf4).fingerprint()
    assert main(["generate", "--adapter", str(tmp_path / "run" / "adapter"), "--max_new_tokens", "4", "hi"]) == 0
    assert main([str(arg) for arg in [*run, "--dry-run"]]) == 0


def test_merging_onto_it_dequantizes(tmp_path: Path) -> None:
    quantize_checkpoint("demo", tmp_path / "nf4")
    model = add_lora(load_model(tmp_path / "nf4", dtype=torch.float32), LoraConfig(rank=2))
    as_trained(model)
    save_adapter(model, tmp_path / "adapter", provenance={"base_path": str(tmp_path / "nf4")})
    text = tmp_path / "text.jsonl"
    text.write_text("".join((DATA / "chat_validation.jsonl").read_text().splitlines(keepends=True)[:20]))
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--text", str(text)]) == 0
    layer = next(layer for name, layer in lora_layers(model) if name == "layers.1.mlp.up_proj")
    assert isinstance(layer.base, NF4Linear)
    expected = (layer.base.weight.dequantize(torch.float32) + layer.delta()).bfloat16()
    merged = load_model(tmp_path / "merged")
    assert torch.equal(merged.get_parameter("layers.1.mlp.up_proj.weight"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
