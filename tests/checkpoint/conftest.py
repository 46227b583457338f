"""Checkpoints written once a session; `hf_folder`, `sharded_folder` and `mistral_folder` are copies to spoil."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
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


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, or of so much as a parameter says, where the machine lets us mount one."""
    mount, size = tmp_path / "disk", f"size={getattr(request, 'param', '2m')}"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
