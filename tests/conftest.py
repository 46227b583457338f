"""A tiny base on the disk, small files of chats and text, and the configuration of a short run."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TOKENIZER, MakeConfig, Quiet, chat, tiny_model, write_jsonl

from minilora.checkpoint.save import save_hf
from minilora.config import BaseConfig, DataConfig, EvalConfig, LoraConfig, RunConfig, TrainConfig

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated, so before any of them is imported


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without the threads' hand-shakes."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


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
def quiet() -> Quiet:
    return Quiet()
