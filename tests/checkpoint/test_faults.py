"""Every writer of a folder under a full disk, a limit of its files' size, a read-only disk, and killed in the middle.

Each is asked to replace what it wrote before: that must stay whole, nothing else be left, and the line say what to do.
"""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import largest_file
from tiny_runs import TINY, TOKENIZER, chat, tiny_model, write_jsonl

from minilora.adamw import FlatAdamW
from minilora.base import Base
from minilora.checkpoint import write
from minilora.checkpoint.adapter import read_adapter, save_adapter
from minilora.checkpoint.export import FORMATS, export_checkpoint
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.save import save_hf, save_mistral
from minilora.checkpoint.write import sweep_stale, verify_manifest
from minilora.config import UNNAMED, BaseConfig, LoraConfig
from minilora.data.encode import read_samples
from minilora.data.pack import RowSampler
from minilora.errors import UserError
from minilora.evaluate.merge_audit import merge_with_audit
from minilora.lora import add_lora
from minilora.train.state import RunState
from minilora.train.step import LossScale

Writer = Callable[[Path], object]
LIMIT = 8000  # bytes: less than any writer's largest file has, more than its small ones


def prepare(folder: Path) -> None:
    """What the writers write from."""
    save_hf(tiny_model(), folder / "base", dtype=torch.float32, tokenizer=TOKENIZER)
    model = add_lora(load_model(folder / "base", quantize="nf4", dtype=torch.float32), LoraConfig(rank=8))
    save_adapter(model, folder / "adapter", provenance={"base_path": str(folder / "base")})
    write_jsonl(folder / "text.jsonl", [chat("a in", "on")])


def merge(folder: Path, out: Path) -> None:
    base = Base.find(BaseConfig(path=UNNAMED, device="cpu"), str(folder / "adapter"))
    samples = read_samples(folder / "text.jsonl", base.tokenizer, 64)
    adapter = read_adapter(folder / "adapter", base.checkpoint.config)
    merge_with_audit(base, adapter, out, samples, 64, overwrite=True, force=True)


def save_state(folder: Path, out: Path) -> None:
    model = add_lora(load_model(folder / "base", dtype=torch.float32), LoraConfig(rank=8))
    weights: Any = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = FlatAdamW({(0.0, 1.0): list(weights.values())})
    sum(p.sum() for p in weights.values()).backward()
    optimizer.step(1e-3)
    RunState(weights, optimizer, RowSampler([8, 8], 8, seed=0), LossScale.of(torch.float32), {}).save(out)


def writers(folder: Path) -> dict[str, Writer]:
    """Each writes to the folder that it is given, and may replace it."""
    model = load_model(folder / "base")
    adapted = add_lora(load_model(folder / "base"), LoraConfig(rank=8))
    adapter = read_adapter(folder / "adapter", TINY)
    return {
        "save_hf": partial(save_hf, model, overwrite=True),
        "save_mistral": partial(save_mistral, model, overwrite=True),
        "save_adapter": partial(save_adapter, adapted, overwrite=True),
        "save_mistral_adapter": partial(save_mistral_adapter, adapter, TINY, overwrite=True),
        "save_state": partial(save_state, folder),
        "quantize": partial(quantize_checkpoint, folder / "base", overwrite=True),
        "merge": partial(merge, folder),
        **{to: partial(export_checkpoint, folder / "base", to=to, overwrite=True) for to in FORMATS},
    }


NAMES = (
    "save_hf", "save_mistral", "save_adapter", "save_mistral_adapter", "save_state", "quantize", "merge", *FORMATS
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> dict[str, Writer]:
    return writers(source)


@pytest.fixture(params=NAMES)
def writer(request: pytest.FixtureRequest, made: dict[str, Writer]) -> Writer:
    return made[request.param]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextmanager
def unharmed(target: Path) -> Iterator[None]:
    """The folder, its files, and what lies beside it, are the same afterwards."""
    before, beside = contents(target), sorted(os.listdir(target.parent))
    yield
    assert contents(target) == before
    assert sorted(os.listdir(target.parent)) == beside
    verify_manifest(target)


def test_a_limit_of_the_files_size(writer: Writer, tmp_path: Path) -> None:
    target = tmp_path / "out"
    writer(target)
    message = rf"^{target}: could not be written: .*\(ulimit -f\)"
    with unharmed(target), largest_file(LIMIT), pytest.raises(UserError, match=message):
        writer(target)


def test_a_full_disk(writer: Writer, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills while the files are written; what is needed was looked at before, and somebody else was quicker."""
    monkeypatch.setattr(write, "check_space", lambda *_: None)
    target, filler = disk / "out", disk / "filler"
    writer(target)
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * 3_000_000)
    os.truncate(filler, filler.stat().st_size - 3 * 4096)
    with unharmed(target), pytest.raises(UserError, match=rf"^{target}: could not be written: the disk is full; free"):
        writer(target)


def test_a_disk_that_became_read_only(writer: Writer, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root, too, whom no permissions stop."""
    monkeypatch.setattr(write, "check_space", lambda *_: None)
    target = disk / "out"
    writer(target)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with (
        unharmed(target),
        pytest.raises(UserError, match=rf"^{target}: could not be written: the file system is read-"),
    ):
        writer(target)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /sys")
def test_a_folder_that_nobody_can_write_to(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even root, in no container."""
    monkeypatch.setattr(write, "check_space", lambda *_: None)
    with pytest.raises(UserError, match=r"^/sys/kernel/out: could not be written: .*; choose another folder$"):
        writer(Path("/sys/kernel/out"))


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_in_the_way(writer: Writer, tmp_path: Path, kind: str) -> None:
    target, precious = tmp_path / "out", tmp_path / ("out" if kind == "file" else "precious")
    precious.write_text("precious")
    if kind == "link":
        target.symlink_to(precious)
    with pytest.raises(UserError, match="out: is a link or a file; choose another name for the folder"):
        writer(target)
    assert precious.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == sorted({"out", precious.name})


# -- killed ------------------------------------------------------------------------------------------------------------


def die_while_writing() -> None:
    """By the kernel's hand, at the 8,000th byte of a file, without a last word."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def die_at_the_first_sync() -> None:
    write._fsync = lambda _path: os.kill(os.getpid(), signal.SIGKILL)


def die_between_the_renames() -> None:
    """The old folder has been set aside, the new one has not its name yet."""
    rename = Path.rename

    def once(path: Path, to: Path) -> Path:
        rename(path, to)
        os.kill(os.getpid(), signal.SIGKILL)
        return path

    Path.rename = once  # type: ignore[method-assign, assignment]


DEATHS = {die_while_writing: signal.SIGXFSZ, die_at_the_first_sync: signal.SIGKILL}
DEATHS[die_between_the_renames] = signal.SIGKILL


def kill_them_all(folder: Path) -> None:
    """In a process of its own: each writer in a child that dies in each way, over what it wrote before."""
    torch.set_num_threads(1)
    prepare(folder)
    for name, writer in writers(folder).items():
        for death, number in DEATHS.items():
            target = folder / f"{name}-{death.__name__}" / "out"
            writer(target)
            before = contents(target)
            if (child := os.fork()) == 0:
                death()
                writer(target)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), f"{name} outlived {death.__name__}"
            assert os.WTERMSIG(status) == number
            left = set(os.listdir(target.parent))
            assert f".out.minilora-tmp-{child}" in left, f"{name}, {death.__name__}: {left}"
            if death is die_between_the_renames:
                assert left == {f".out.minilora-tmp-{child}", f".out.minilora-old-{child}"}
                sweep_stale(target.parent)
            assert contents(target) == before, f"{name}, {death.__name__}"
            writer(target)
            assert os.listdir(target.parent) == ["out"], "what the dead had left is gone"
            verify_manifest(target)


def test_killed_in_the_middle(tmp_path: Path) -> None:
    script = f"import test_faults; test_faults.kill_them_all(test_faults.Path({str(tmp_path)!r}))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(os.listdir(tmp_path)) == 3 + len(NAMES) * len(DEATHS)


def test_the_list_is_whole(made: dict[str, Writer]) -> None:
    """Who else writes a folder must stand above."""
    assert tuple(made) == NAMES
    package = Path(write.__file__).parents[1]
    found = {file.stem for file in package.rglob("*.py") if "atomic_folder(" in file.read_text()}
    assert found == {"write", "save", "export", "adapter", "mistral_adapter", "state"}


def test_nobody_else_writes_files() -> None:
    """Who writes by itself does so within a folder of `atomic_folder`, or has a reason."""
    package = Path(write.__file__).parents[1]
    raw = re.compile(
        r"\.write_(text|bytes)\(|open\([^)]*[\"'][wax]b?[\"']|copy_?file\(|\bsave_file\(|torch\.save\(|GGUFWriter\("
        r"|(?<!\.)write_(json|provenance|tokenizer|card)\("
    )
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if raw.search(file.read_text("utf-8"))}
    within = {
        "save", "export", "adapter", "mistral_adapter", "card", "chat_template", "safetensors_file", "gguf_file",
        "write", "json_file", "files", "provenance",
    }  # fmt: skip
    others = {
        "train/state.py",
        "train/run_folder.py",  # lines that are appended, and mended if half of one was written; the lock
        "train/results.py",  # within the folder of `save_hf`
        "evaluate/merge_audit.py",  # within that of `write_plan`
        "train/compare.py",  # what a run's process prints
        "memory.py",  # a counter of the kernel's
    }
    assert found == {f"checkpoint/{name}.py" for name in within} | others
