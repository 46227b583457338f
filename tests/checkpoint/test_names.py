"""The table of names against both writers' files."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import config_in

from minilora.checkpoint.layout import Layout
from minilora.checkpoint.names import tensor_specs
from minilora.model import Mistral


@pytest.mark.parametrize(("layout", "file"), [("hf", "model.safetensors"), ("mistral", "consolidated.safetensors")])
def test_keys_and_shapes_are_the_files(originals: Path, layout: Layout, file: str) -> None:
    folder = originals / layout
    with safe_open(folder / file, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    assert {spec.key(layout): spec.shape for spec in tensor_specs(config_in(folder))} == shapes


def test_names_are_the_models_own_in_its_order(originals: Path) -> None:
    config = config_in(originals / "hf")
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in Mistral(config).named_parameters()}
    specs = {spec.name: spec.shape for spec in tensor_specs(config)}
    assert list(specs.items()) == list(parameters.items())


def test_only_q_and_k_change_between_layouts_and_come_back(originals: Path) -> None:
    moved = set()
    for spec in tensor_specs(config_in(originals / "hf")):
        rows = torch.arange(spec.shape[0])
        theirs = spec.to_layout(rows, "mistral")
        assert torch.equal(spec.from_layout(theirs, "mistral"), rows)
        assert torch.equal(spec.to_layout(rows, "hf"), rows)
        if not torch.equal(theirs, rows):
            moved.add(spec.module)
            assert theirs[:4].tolist() == [0, 32, 1, 33]  # head_dim 64: each pair (i, i + 32) stands together
    assert moved == {f"layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "k_proj")}
