"""Which files are read: index rules, and names that try to lead elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import PUBLISHED, edit_json, edit_tensors, in_mistral, write_json, write_sparse
from transformers import MistralConfig, MistralForCausalLM

from minilora.checkpoint.layout import find_layout, read_entries
from minilora.checkpoint.open import open_checkpoint
from minilora.errors import UserError

INDEX = "model.safetensors.index.json"


def weight_map(folder: Path) -> dict[str, str]:
    return {key: entry.file.name for key, entry in read_entries(folder, "hf").items()}


def test_the_index_rules_over_everything_else(sharded_folder: Path, originals: Path) -> None:
    shutil.copy(originals / "mistral" / "consolidated.safetensors", sharded_folder)
    shutil.copy(originals / "mistral" / "params.json", sharded_folder)
    shutil.copy(originals / "hf" / "model.safetensors", sharded_folder)
    assert find_layout(sharded_folder) == "hf"
    names = {entry.file.name for entry in open_checkpoint(sharded_folder).entries.values()}
    assert len(names) > 2
    assert all("-of-" in name for name in names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_as_it_was_published_opens(name: str, tmp_path: Path) -> None:
    """Every tensor of the whole model in both layouts, by the names and shapes of transformers; shards as v0.3 has."""
    values, params, n_parameters = PUBLISHED[name]
    with torch.device("meta"):
        theirs = MistralForCausalLM(MistralConfig(**values))
    shapes = {key: tuple(weight.shape) for key, weight in theirs.state_dict().items()}
    names = {key: f"model-0000{1 + 3 * i // len(shapes)}-of-00003.safetensors" for i, key in enumerate(shapes)}
    write_json(tmp_path / "config.json", values)
    write_json(tmp_path / INDEX, {"metadata": {"total_size": 2 * n_parameters}, "weight_map": names})
    for file in set(names.values()):
        write_sparse(tmp_path / file, {key: shapes[key] for key in shapes if names[key] == file})
    write_json(tmp_path / "params.json", params)
    write_sparse(tmp_path / "consolidated.safetensors", {in_mistral(key): shape for key, shape in shapes.items()})

    both = open_checkpoint(tmp_path)
    assert (both.layout, len(both.entries)) == ("hf", len(shapes))
    assert {entry.file.name for entry in both.entries.values()} == set(names.values())
    assert sum(entry.nbytes for entry in both.entries.values()) == 2 * n_parameters
    (tmp_path / INDEX).unlink()
    mistral = open_checkpoint(tmp_path)
    assert mistral.layout == "mistral"
    assert {entry.file.name for entry in mistral.entries.values()} == {"consolidated.safetensors"}
    assert mistral.fingerprint() == both.fingerprint()


def test_an_index_whose_shards_were_not_fetched_hides_no_whole_model(sharded_folder: Path, originals: Path) -> None:
    for name in {*weight_map(sharded_folder).values()}:
        (sharded_folder / name).unlink()
    assert find_layout(sharded_folder) == "hf"
    for name in ("consolidated.safetensors", "params.json"):
        shutil.copy(originals / "mistral" / name, sharded_folder)
    assert open_checkpoint(sharded_folder).fingerprint() == open_checkpoint(originals / "hf").fingerprint()


def test_a_missing_shard(sharded_folder: Path) -> None:
    shard = sharded_folder / weight_map(sharded_folder)["model.norm.weight"]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard}: no such file, but {INDEX} names it"):
        open_checkpoint(sharded_folder)


def test_a_shard_that_lacks_what_the_index_promises(sharded_folder: Path) -> None:
    shard = sharded_folder / weight_map(sharded_folder)["model.norm.weight"]
    edit_tensors(shard, model__norm__weight=None)
    with pytest.raises(UserError, match=rf"{shard}: lacks the tensor 'model\.norm\.weight', which {INDEX} says"):
        open_checkpoint(sharded_folder)


def test_a_tensor_in_a_shard_that_the_index_does_not_know(sharded_folder: Path) -> None:
    names = weight_map(sharded_folder)
    shard = sharded_folder / names.pop("model.norm.weight")
    write_json(sharded_folder / INDEX, {"weight_map": names})
    with pytest.raises(UserError, match=rf"{shard}: holds the tensor 'model\.norm\.weight', which {INDEX} does not"):
        open_checkpoint(sharded_folder)


def test_a_tensor_missing_in_index_and_shards(sharded_folder: Path) -> None:
    names = weight_map(sharded_folder)
    edit_tensors(sharded_folder / names.pop("model.norm.weight"), model__norm__weight=None)
    write_json(sharded_folder / INDEX, {"weight_map": names})
    with pytest.raises(UserError, match=r"missing tensor: model\.norm\.weight"):
        open_checkpoint(sharded_folder)


ESCAPES = [
    "../outside.safetensors",
    "/etc/passwd",
    "",
    ".",
    "..",
    "sub/model.safetensors",
    "a\0b",
    "a\\b",
    "a\ud800b",
    "x" * 300,
    3,
    None,
    ["x"],
]


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_may_only_name_files_beside_it(sharded_folder: Path, originals: Path, name: Any) -> None:
    shutil.copy(originals / "hf" / "model.safetensors", sharded_folder.parent / "outside.safetensors")
    write_json(sharded_folder / INDEX, {"weight_map": {**weight_map(sharded_folder), "model.norm.weight": name}})
    with pytest.raises(UserError, match=rf"{INDEX}: tensor 'model\.norm\.weight' lies in .* not a plain file name"):
        open_checkpoint(sharded_folder)


@pytest.mark.parametrize("layout", ["hf", "sharded", "mistral"])
def test_a_link_out_of_the_folder_is_not_followed(originals: Path, tmp_path: Path, layout: str) -> None:
    folder = Path(shutil.copytree(originals / layout, tmp_path / "copy"))
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to("../elsewhere")
    with pytest.raises(UserError, match=rf"{victim}: a link out of the folder is not followed"):
        open_checkpoint(folder)


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(originals: Path, tmp_path: Path) -> None:
    snapshot = Path(shutil.copytree(originals / "sharded", tmp_path / "models--x" / "snapshots" / "abc"))
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    first, second = sorted(snapshot.glob("*.safetensors"))[:2]
    first.rename(blobs / "0123")
    first.symlink_to("../../blobs/0123")
    second.rename(snapshot / "real")
    second.symlink_to("real")
    open_checkpoint(snapshot)


@pytest.mark.parametrize("layout", ["hf", "sharded"])
def test_a_link_to_itself(originals: Path, tmp_path: Path, layout: str) -> None:
    folder = Path(shutil.copytree(originals / layout, tmp_path / "copy"))
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.unlink()
    victim.symlink_to(victim.name)
    with pytest.raises(UserError, match=str(folder)):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [..., None, [], {}, "x"])
def test_an_index_without_a_map(sharded_folder: Path, value: Any) -> None:
    edit_json(sharded_folder / INDEX, weight_map=value)
    with pytest.raises(UserError, match=rf"{INDEX}: weight_map must be an object"):
        open_checkpoint(sharded_folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff"])
def test_a_damaged_index(sharded_folder: Path, content: bytes) -> None:
    (sharded_folder / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=rf"{INDEX}: not a readable JSON file"):
        open_checkpoint(sharded_folder)


def test_a_huge_index_is_not_parsed(sharded_folder: Path) -> None:
    with (sharded_folder / INDEX).open("wb") as file:
        file.truncate(101_000_000)
    with pytest.raises(UserError, match=rf"{INDEX}: .*101,000,000 bytes"):
        open_checkpoint(sharded_folder)
