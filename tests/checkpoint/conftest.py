"""Checkpoints written once a session; `hf_folder`, `sharded_folder` and `mistral_folder` are copies to spoil."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import hf_model, write_mistral


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    model = hf_model()
    model.save_pretrained(root / "hf")
    model.save_pretrained(root / "sharded", max_shard_size="300KB")
    write_mistral(model, root / "mistral")
    return root


@pytest.fixture
def hf_folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "hf", tmp_path / "hf"))


@pytest.fixture
def sharded_folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


@pytest.fixture
def mistral_folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "mistral", tmp_path / "mistral"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without the threads' hand-shakes."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
