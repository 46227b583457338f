"""Which runs may be ranked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from tiny_runs import TOKENIZER, MakeConfig, tiny_model

from minilora.checkpoint.save import save_hf
from minilora.errors import UserError
from minilora.evaluate.comparable import refuse_unlike


@pytest.mark.parametrize(
    "own",
    [
        {"data__validation": "another.jsonl"}, {"data__general": "another.jsonl"}, {"data__max_seq_len": 32},
        {"data__too_long": "skip"}, {"eval__answers": 1}, {"eval__max_new_tokens": 1}, {"eval__metrics": ("bleu",)},
    ],
)  # fmt: skip
def test_runs_that_are_measured_otherwise_are_refused(make_config: MakeConfig, own: dict[str, Any]) -> None:
    config, key = make_config(data__too_long="truncate"), next(iter(own)).replace("__", ".")
    with pytest.raises(UserError, match=rf"two has another {key} than .* cannot be ranked; give all the same --{key}"):
        refuse_unlike({"one": config, "two": make_config(config, **own)})


@pytest.mark.parametrize(
    "own",
    [
        {"data__train": "another.jsonl"}, {"data__split_seed": 1}, {"data__test_share": 0.1}, {"data__share": 0.5},
        {"data__validation_share": 0.5},
    ],
)  # fmt: skip
def test_only_a_validation_that_is_drawn_depends_on_the_split(make_config: MakeConfig, own: dict[str, Any]) -> None:
    key = next(iter(own)).replace("__", ".")
    drawn = make_config(data__validation=None, data__validation_share=0.25)
    if key == "data.share":
        refuse_unlike({"one": drawn, "two": make_config(drawn, **own)})
        return
    with pytest.raises(UserError, match=f"two has another {key} than"):
        refuse_unlike({"one": drawn, "two": make_config(drawn, **own)})
    if key != "data.validation_share":
        refuse_unlike({"one": make_config(), "two": make_config(**own)})


def test_what_learns_how_and_how_often_it_is_looked_at_may_differ(make_config: MakeConfig) -> None:
    differs = {"train__lr": 1e-5, "lora__rank": 2, "data__replay_from": "text.jsonl", "model__quantize": "nf4"}
    differs |= {"eval__every": 1, "eval__patience": 3, "data__too_long": "truncate"}
    refuse_unlike({"one": make_config(), "two": make_config(**differs)})


def test_bases_may_differ_where_their_tokenizer_does_not(make_config: MakeConfig, tmp_path: Path) -> None:
    save_hf(tiny_model(seed=1), tmp_path / "base", dtype=torch.float32, tokenizer=TOKENIZER)
    bases = ("/nowhere", make_config().model.path, str(tmp_path / "base"))
    runs = {path: make_config(model__path=path) for path in bases}
    refuse_unlike(runs)
    file = tmp_path / "base" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    model.pieces[-1].score -= 1
    file.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"base has another model\.tokenizer than"):
        refuse_unlike(runs)
