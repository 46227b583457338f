"""What an epoch costs at least, by `minilora data check`, and what torch counts of a step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, write_jsonl
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from minilora.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from minilora.model import Mistral
from minilora.train import data_check
from minilora.train.strategies import apply_strategy

SIZES = replace(TINY, dim=64, hidden_dim=128, n_layers=4, vocab_size=900)
ADAPTED = LoraConfig(rank=1, dropout=0.1, targets=("layers.3.mlp.down_proj", "layers.3.self_attn.v_proj"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("train", "lora"),
    [
        ({"strategy": "full"}, LoraConfig()),
        ({"strategy": "partial", "layers": 1}, LoraConfig()),
        ({"strategy": "partial", "parameters": ("norm",)}, LoraConfig()),
        ({"strategy": "partial", "parameters": ("embed_tokens",)}, LoraConfig()),
        ({"strategy": "lora"}, LoraConfig(rank=1, dropout=0.1)),
        ({"strategy": "lora"}, ADAPTED),
        ({"strategy": "prefix", "prefix_tokens": 1}, LoraConfig()),
    ],
)
def test_the_work_is_no_more_than_torch_counts(train: dict[str, Any], lora: LoraConfig, tied: bool) -> None:
    sizes = replace(SIZES, tied_embeddings=tied)
    config = RunConfig(train=TrainConfig(**train), lora=lora)
    model = apply_strategy(Mistral(sizes), config)
    with FlopCounterMode(display=False) as counter:  # which does not know products that are written in place
        logits = model.lm_head(model.hidden(torch.zeros(1, 32, dtype=torch.int64))[0, -8:])
        cross_entropy(logits, torch.ones(8, dtype=torch.int64)).backward()
    known = data_check.work(sizes, data_check._learned(config, sizes), 32, 8)
    assert 0.75 < known / counter.get_total_flops() < 1.03


def test_an_epoch_s_time_and_steps_are_plain_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {0.5: "0.5 seconds", 119: "120 seconds", 150: "2.5 minutes", 7100: "120 minutes", 9001: "2.5 hours"}
    assert {n: data_check._duration(n) for n in seconds} == seconds
    assert data_check._duration(5e6) == "1,400 hours"
    train = write_jsonl(tmp_path / "t.jsonl", [{"text": "a" * 20_000}])  # which is cut into rows
    monkeypatch.setattr(data_check, "_flop_per_s", lambda *_: 1e9)
    data = DataConfig(str(train), max_seq_len=2)
    figures = dict(data_check.check_data(RunConfig(data=data, train=TrainConfig(max_steps=12_345_000)))[1])
    assert figures["steps"].startswith("10,001 to an epoch, ")
    assert figures["steps"].endswith(" comes to 1,234 epochs")
