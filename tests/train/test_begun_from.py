"""Runs that go on from an adapter (`train.adapter`): where it stood, by its own settings, on the base that it is of."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, MakeConfig, Quiet, stop_after, tiny_model

from minilora.checkpoint.adapter import read_adapter
from minilora.checkpoint.adapter_parts import added_tensors
from minilora.checkpoint.save import save_hf
from minilora.config import RunConfig
from minilora.errors import UserError
from minilora.fused import FusedBlock
from minilora.train.dry_run import dry_run
from minilora.train.loop import fine_tune
from minilora.train.setup import settled
from minilora.train.signals import Stopped
from minilora.train.strategies import apply_strategy


@pytest.fixture
def first(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    """A run that is done, with settings of [lora] that are not the default."""
    config = make_config(train__output=str(tmp_path / "first"), lora__rank=2, lora__targets=("q_proj", "down_proj"))
    fine_tune(config, Quiet())
    return config


def summary(config: RunConfig) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(Path(config.train.output, "summary.json").read_text())
    return found


def test_it_begins_where_the_adapter_stood(make_config: MakeConfig, first: RunConfig) -> None:
    config, _ = settled(make_config(train__adapter=first.train.output))
    assert config.train.adapter == f"{first.train.output}/adapter"
    assert config.lora == first.lora, "and not of make_config"
    model = apply_strategy(tiny_model(), config)
    adapter = read_adapter(config.train.adapter, TINY)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in added_tensors(model).items())
    assert all(type(block) is FusedBlock for block in model.layers)
    run = fine_tune(config, Quiet())
    before, after = summary(config)["before"], summary(first)["after"]
    assert before["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert summary(config)["after"]["loss"] != before["loss"]
    assert run.config.lora == first.lora


def test_a_resumed_run_needs_no_other_adapter_than_its_checkpoint(
    make_config: MakeConfig, first: RunConfig, tmp_path: Path
) -> None:
    """The adapter may have moved meanwhile; what it was comes from the checkpoint."""
    whole = make_config(train__adapter=first.train.output, train__checkpoint_every=2, eval__samples=0)
    fine_tune(whole, Quiet())
    part = make_config(whole, train__output=str(tmp_path / "part"))
    with pytest.raises(Stopped):
        fine_tune(part, stop_after(2, Quiet()))
    Path(first.train.output).rename(tmp_path / "moved")
    fine_tune(make_config(part, train__adapter=str(tmp_path / "moved")), Quiet(), resume=True)
    weights = [Path(c.train.output, "adapter", "adapter_model.safetensors").read_bytes() for c in (whole, part)]
    assert weights[0] == weights[1]


def test_it_is_of_this_base(make_config: MakeConfig, first: RunConfig, tmp_path: Path) -> None:
    save_hf(tiny_model(seed=1), tmp_path / "other", dtype=torch.float32)
    tokenizer = Path(first.model.path, "tokenizer.model")
    (tmp_path / "other" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    config = make_config(train__adapter=first.train.output, model__path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="base"):
        fine_tune(config, Quiet())
    assert not Path(config.train.output).exists()


def test_another_storage_of_the_base_is_said(make_config: MakeConfig, first: RunConfig) -> None:
    config = make_config(train__adapter=first.train.output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settled(config)
    with pytest.warns(UserWarning, match="trained on a base stored with type nf4, here it is none"):
        settled(make_config(config, train__strategy="lora"))


def test_what_is_no_adapter_is_told_before_anything_is_loaded(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no adapter_config\.json; name the folder of an adapter"):
        settled(make_config(train__adapter=str(tmp_path / "empty")))
    prefix = make_config(train__strategy="prefix", train__output=str(tmp_path / "prefix"), eval__samples=0)
    fine_tune(prefix, Quiet())
    with pytest.raises(UserError, match="is a prefix, which only begins anew"):
        settled(make_config(train__adapter=prefix.train.output))


@pytest.mark.parametrize("strategy", ["full", "prefix"])
def test_other_strategies_have_no_adapter(make_config: MakeConfig, strategy: str) -> None:
    with pytest.raises(UserError, match=r"train\.adapter is for lora and qlora"):
        make_config(train__strategy=strategy, train__adapter="somewhere")


def test_it_is_not_overwritten_by_what_begins_from_it(first: RunConfig) -> None:
    for adapter in (first.train.output, f"{first.train.output}/adapter"):
        with pytest.raises(UserError, match="would be begun anew; name another"):
            fine_tune(replace(first, train=replace(first.train, adapter=adapter)), Quiet(), overwrite=True)
    assert read_adapter(first.train.output, TINY)


def test_a_dry_run_begins_from_it_too(make_config: MakeConfig, first: RunConfig, quiet: Quiet) -> None:
    dry_run(make_config(train__adapter=first.train.output), quiet)
    assert f"adapters begin as those of {first.train.output}/adapter, with its [lora]" in quiet.said
