"""A tiny base on the disk, small files of chats and text, and the configuration of a short run."""

import gc
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import environment  # noqa: F401 - before torch
import pytest
import torch
from tiny_runs import TOKENIZER, MakeConfig, Quiet, Run, chat, tiny_model, write_jsonl

from minilora import backend
from minilora.checkpoint.save import save_hf
from minilora.cli import main
from minilora.config import BaseConfig, DataConfig, EvalConfig, LoraConfig, RunConfig, TrainConfig
from minilora.demo import story
from minilora.toml import config_toml

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "CUDA initialization:")  # a driver older than torch's build: there is no GPU
    has_gpu = torch.cuda.is_available()
if not has_gpu:
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated, so before any of them is imported
    from interpreter import patch_once_a_launch

    patch_once_a_launch()


@pytest.hookimpl(trylast=True)  # of those that -m has left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many: the last to begin would keep one process waiting."""
    slow, n_tests = {i.path for i in items if i.get_closest_marker("slow")}, Counter(i.path for i in items)
    items.sort(key=lambda item: (item.path not in slow, -n_tests[item.path]))


@pytest.fixture(autouse=True, scope="module")
def frozen_libraries() -> None:
    """Libraries' objects, a million, are there to stay: no search for garbage, a tenth of a second, looks at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def thawed_in_the_end() -> Iterator[None]:
    """Else some of the libraries find their objects leaked."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def auto_is_the_cpu() -> Iterator[None]:
    """Also beside a GPU, where dtypes and bits are others: a test that is for one names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "default_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in float32. Do not change it."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    save_hf(tiny_model(), folder, dtype=torch.float32, tokenizer=TOKENIZER)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (60 chats of unlike lengths), validation.jsonl (6), text.jsonl (4 texts). Do not change them."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def words(n: int) -> str:
        return " ".join("".join(draw.choices("aeimnorst", k=draw.randint(1, 5))) for _ in range(n))

    for name, n in (("train", 60), ("validation", 6)):
        chats = [chat(*(words(draw.randint(1, 3)) for _ in range(draw.choice([2, 2, 4])))) for _ in range(n)]
        write_jsonl(folder / f"{name}.jsonl", chats)
    write_jsonl(folder / "text.jsonl", [{"text": words(12)} for _ in range(4)])
    return folder


@pytest.fixture
def make_config(tiny_base: Path, data_folder: Path, tmp_path: Path) -> MakeConfig:
    """make_config(train__lr=..., ...) -> a run of 4 steps into tmp_path / "run", but for the keys that are given."""
    default = RunConfig(
        model=BaseConfig(path=str(tiny_base), device="cpu"),
        lora=LoraConfig(rank=4, alpha=8),
        data=DataConfig(str(data_folder / "train.jsonl"), str(data_folder / "validation.jsonl"), max_seq_len=64),
        train=TrainConfig(output=str(tmp_path / "run"), max_steps=4, batch_size=2, lr=1e-2, warmup_steps=1),
        eval=EvalConfig(every=2, answers=2, samples=2, max_new_tokens=4),
    )

    def make(config: RunConfig = default, **changes: Any) -> RunConfig:
        sections: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            sections.setdefault(section, {})[name] = value
        return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})

    return make


@pytest.fixture
def toml(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A configuration of a run of 4 steps."""
    path = tmp_path / "run.toml"
    path.write_text(config_toml(make_config()))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """20 chats, which a test may change."""
    return write_jsonl(tmp_path / "chats.jsonl", [chat(f"name {n}", f"it {n}") for n in range(20)])


@pytest.fixture
def little_demo_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first lines of the demo's files, in a folder from which its story reads."""
    folder, n_lines = tmp_path / "demo_data", {"chat_train": 200, "heldout": 100, "replay": 100}
    n_lines |= {"chat_validation": 30, "chat_test": 30}
    folder.mkdir()
    for name, n in n_lines.items():
        lines = (story.DATA / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:n]), "utf-8")
    monkeypatch.setattr(story, "DATA", folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("train", "x.toml", ...) -> (exit status, stdout, stderr); argparse's own exits count as well."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the oracles have printed is not ours
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as leave:
            status = int(leave.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()
