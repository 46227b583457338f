"""Which files of a folder are the model. A repository may hold the same weights twice; "all *.safetensors" is wrong.

    hf        config.json   model.safetensors.index.json, or model.safetensors
    mistral   params.json   consolidated.safetensors.index.json, or consolidated.safetensors

The first of which weights are there is taken, so a folder of Mistral 7B v0.3, which has both, is read in Hugging Face's
layout; but where its shards were not fetched, only their index, in Mistral's.
An index names shards. What it names must be a plain file name, and the file must lie in the folder, links resolved:
a downloaded index must not make us read elsewhere.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Literal

from minilora.checkpoint.json_file import read_json, short
from minilora.checkpoint.safetensors_file import TensorEntry, read_header
from minilora.errors import UserError

Layout = Literal["hf", "mistral"]
CONFIG_NAMES: dict[Layout, str] = {"hf": "config.json", "mistral": "params.json"}
WEIGHTS_NAMES: dict[Layout, str] = {"hf": "model.safetensors", "mistral": "consolidated.safetensors"}
_PICKLED = "pickle files can run code and are not read; convert it to safetensors"
_NO_CHECKPOINT = {  # what says what a folder without one is, the first first: an adapter may have pickles, too
    "adapter_config.json": "this is an adapter; name its base, or what minilora merge makes of both",
    "adapter": "this is a run's adapter; name its base, or what minilora merge makes of both",
    "model": "this is a run's model; name its own folder",
    "config.toml": "this run is not finished; minilora train --resume goes on",
    "*.gguf": "this is for llama.cpp; name what it was made from",
    **dict.fromkeys(("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl"), _PICKLED),
}


def find_layout(folder: Path) -> Layout:
    """The layout that `folder` is read in. Raises UserError if it holds no complete checkpoint."""
    if not os.path.exists(folder):  # false, where Path.exists would raise, for a name that is too long
        raise UserError(f"{folder}: no such folder; name a local checkpoint folder, or demo")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: not a folder; name the folder that holds the checkpoint")
    weights = [x for x in WEIGHTS_NAMES if _index(folder, x).exists() or (folder / WEIGHTS_NAMES[x]).exists()]
    fetched = [x for x in weights if any(folder.glob(f"{Path(WEIGHTS_NAMES[x]).stem}*.safetensors"))]
    for layout in fetched + weights:
        if (folder / CONFIG_NAMES[layout]).exists():
            return layout
    if weights:
        raise UserError(f"{folder}: holds {WEIGHTS_NAMES[weights[0]]} but no {CONFIG_NAMES[weights[0]]}")
    for pattern, why in _NO_CHECKPOINT.items():
        for file in sorted(folder.glob(pattern)):
            if pattern != "model" or (folder / "config.toml").exists():  # else it is something else's
                raise UserError(f"{file}: {why}")
    raise UserError(f"{folder}: no checkpoint here; model.safetensors or consolidated.safetensors was looked for")


def read_entries(folder: Path, layout: Layout) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint by the key they have in the files, from the headers alone. Raises UserError."""
    index = _index(folder, layout)
    if not index.exists():
        return read_header(_weights(folder, WEIGHTS_NAMES[layout], index))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must be an object of tensor: file, and not empty")
    shards = defaultdict[str, set[str]](set)
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise UserError(f"{index}: tensor {short(key)} lies in {short(name)}, which is not a plain file name")
        shards[name].add(key)
    entries: dict[str, TensorEntry] = {}
    for name, keys in sorted(shards.items()):
        held = read_header(file := _weights(folder, name, index))
        for key in sorted(keys ^ held.keys()):
            has, says = ("lacks", "says") if key in keys else ("holds", "does not say")
            raise UserError(f"{file}: {has} the tensor {short(key)}, which {index.name} {says} is there")
        entries |= held
    return entries


def _is_plain_name(name: str) -> bool:
    plain = name not in ("", ".", "..") and not set(name) & set("/\\")
    return plain and name.isprintable() and len(name.encode()) <= 255


def inside(folder: Path, name: str) -> Path:
    """folder / name, if that is where it leads. Hugging Face's cache links from snapshots/X to blobs beside it."""
    file, root = folder / name, Path(os.path.realpath(folder))
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(Path(os.path.realpath(file)).is_relative_to(home) for home in homes):
        raise UserError(f"{file}: a link out of the folder is not followed; put the file itself there")
    return file


def _weights(folder: Path, name: str, index: Path) -> Path:
    """The same of a file with weights, which must be there if an index names it."""
    if not (file := inside(folder, name)).is_file() and index.exists():
        raise UserError(f"{file}: no such file, but {index.name} names it; the checkpoint is not complete")
    return file


def _index(folder: Path, layout: Layout) -> Path:
    return folder / f"{WEIGHTS_NAMES[layout]}.index.json"
