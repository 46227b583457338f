"""The embedded model: official files, small, and a window that matters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import minilora
from benchmarks.demo_base.pretrain import MODEL
from minilora.checkpoint.open import open_checkpoint
from minilora.data.encode import read_samples
from minilora.demo.phonemes import DATA
from minilora.demo.story import LONGEST_ANSWER

BASE = DATA.parent / "base"


@pytest.fixture(scope="module")
def model() -> minilora.Mistral:
    return minilora.load_model("demo", dtype=torch.float32)


def chats(name: str) -> list[list[int]]:
    samples = read_samples(DATA / name, minilora.load_tokenizer(BASE), max_seq_len=256)
    return [sample.tokens.tolist() for sample in samples]


def test_the_files_are_hugging_faces_layout_within_8_mb() -> None:
    assert sorted(path.name for path in BASE.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 8_000_000
    checkpoint = open_checkpoint("demo")
    assert checkpoint.config == MODEL
    assert {entry.dtype for entry in checkpoint.entries.values()} == {"BF16"}


def test_transformers_computes_the_same_logits(model: minilora.Mistral) -> None:
    theirs = transformers.MistralForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor(chats("chat_test.jsonl")[:1])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5 * 20, rtol=0)


def test_every_conversation_is_longer_than_the_window(model: minilora.Mistral) -> None:
    window = model.config.sliding_window
    assert window is not None
    for name in ("chat_train.jsonl", "chat_validation.jsonl", "chat_test.jsonl"):
        assert min(map(len, chats(name))) > window


def test_logits_change_without_the_window(model: minilora.Mistral) -> None:
    tokens = torch.tensor(chats("chat_test.jsonl")[:1])
    window = model.config.sliding_window
    assert window is not None
    wide = minilora.Mistral(replace(model.config, sliding_window=None)).eval()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        difference = (model(tokens) - wide(tokens)).abs()[0].amax(-1)
    assert float(difference[:window].max()) < 1e-4
    assert float(difference[window:].min()) > 1e-2


def test_no_answer_is_cut_by_the_longest_one_allowed() -> None:
    samples = read_samples(DATA / "chat_test.jsonl", minilora.load_tokenizer(BASE), max_seq_len=256)
    assert max(sample.n_targets for sample in samples) <= LONGEST_ANSWER


def test_the_packaged_folder_is_what_the_name_demo_means() -> None:
    assert open_checkpoint("demo").folder == Path(minilora.__file__).parent / "demo" / "base"
