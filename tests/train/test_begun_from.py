"""Runs that go on from an adapter (`train.adapter`): where it stood, by its own settings, on the base that it is of."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from tiny_runs import TINY, MakeConfig, Quiet, stop_after, tiny_model

from minilora.checkpoint.adapter import read_adapter
from minilora.checkpoint.adapter_parts import added_tensors
from minilora.checkpoint.save import save_hf
from minilora.config import LoraConfig, RunConfig
from minilora.errors import UserError
from minilora.fast_block import FusedBlock
from minilora.lora import LoRALinear
from minilora.tokenizer import OLD_HF
from minilora.train.compare import all_variants
from minilora.train.data_check import check_data, fix_data
from minilora.train.dry_run import dry_run
from minilora.train.ledger import Ledger
from minilora.train.loop import fine_tune
from minilora.train.setup import settled
from minilora.train.signals import Stopped
from minilora.train.strategies import apply_strategy


def begun_from(make_config: MakeConfig, first: RunConfig, **changes: Any) -> RunConfig:
    """A run that goes on from another's adapter, and says nothing else of [lora]."""
    return make_config(replace(make_config(), lora=LoraConfig()), train__adapter=first.train.output, **changes)


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
    config, _ = settled(begun_from(make_config, first, lora__dropout=0.1))
    assert config.train.adapter == f"{first.train.output}/adapter"
    assert config.lora == replace(first.lora, dropout=0.1), "and not of make_config, but for dropout"
    model = apply_strategy(tiny_model(), config)
    adapter = read_adapter(config.train.adapter, TINY)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in added_tensors(model).items())
    assert {layer.dropout for layer in model.modules() if isinstance(layer, LoRALinear)} == {0.1}
    config = begun_from(make_config, first)
    assert all(type(block) is FusedBlock for block in apply_strategy(tiny_model(), settled(config)[0]).layers)
    assert fine_tune(config, Quiet()).config.lora == first.lora
    figures = summary(config), summary(first)
    assert figures[0]["before"] == figures[1]["before"], "of the base"
    for run, name in ((config, "base"), (first, "before")):
        samples = Path(run.train.output, "samples.md").read_text()
        assert f"| prompt | expected | {name} | after |" in samples
        assert f"| prompt | {name} | after |" in samples
    assert figures[0]["after"]["loss"] != figures[1]["after"]["loss"]


def test_a_resumed_run_began_from_the_same_adapter(make_config: MakeConfig, first: RunConfig, tmp_path: Path) -> None:
    """Which may have moved meanwhile."""
    whole = begun_from(make_config, first, train__checkpoint_every=2, eval__samples=0)
    fine_tune(whole, Quiet())
    part = make_config(whole, train__output=str(tmp_path / "part"))
    with pytest.raises(Stopped):
        fine_tune(part, stop_after(2, Quiet()))
    Path(first.train.output).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"first: holds no adapter_config\.json"):
        fine_tune(part, Quiet(), resume=True)
    other = make_config(train__output=str(tmp_path / "other"), lora__rank=2, lora__targets=("q_proj", "down_proj"))
    fine_tune(make_config(other, train__seed=1), Quiet())
    with pytest.raises(UserError, match="adapter"):
        fine_tune(make_config(part, train__adapter=other.train.output), Quiet(), resume=True)
    fine_tune(make_config(part, train__adapter=str(tmp_path / "moved")), Quiet(), resume=True)
    weights = [Path(c.train.output, "adapter", "adapter_model.safetensors").read_bytes() for c in (whole, part)]
    assert weights[0] == weights[1]


def test_it_is_of_this_base(make_config: MakeConfig, first: RunConfig, tmp_path: Path) -> None:
    save_hf(tiny_model(seed=1), tmp_path / "other", dtype=torch.float32)
    tokenizer = Path(first.model.path, "tokenizer.model")
    (tmp_path / "other" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    config = begun_from(make_config, first, model__path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="base"):
        fine_tune(config, Quiet())
    assert not Path(config.train.output).exists()


def test_another_storage_of_the_base_is_said(make_config: MakeConfig, first: RunConfig) -> None:
    config = begun_from(make_config, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settled(config)
    with pytest.warns(UserWarning, match="trained on a base stored with type nf4, here it is none"):
        settled(make_config(config, train__strategy="lora"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        settled(make_config(config, train__strategy="lora"))
        settled(make_config(config, train__strategy="lora"))  # as by `minilora data check --fix`
    assert len(said) == 1


def test_what_is_no_adapter_is_told_before_anything_is_loaded(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no adapter_config\.json; name the folder of an adapter"):
        settled(make_config(train__adapter=str(tmp_path / "empty")))
    prefix = make_config(train__strategy="prefix", train__output=str(tmp_path / "prefix"), eval__samples=0)
    fine_tune(prefix, Quiet())
    with pytest.raises(UserError, match="is a prefix, which only begins anew"):
        settled(make_config(train__adapter=prefix.train.output))


def test_what_the_adapter_says_is_not_said_otherwise(make_config: MakeConfig, first: RunConfig) -> None:
    with pytest.raises(UserError, match=r"lora\.rank is 4, but that of train\.adapter, .*first, is 2; leave it out"):
        settled(begun_from(make_config, first, lora__rank=4))

    def configured(_: Mapping[str, str]) -> RunConfig:
        return begun_from(make_config, first)

    for strategies, grid in ((["dora"], []), ([], ["lora.rank=4,8"])):
        with pytest.raises(UserError, match=r"lora\.\w+ cannot be compared: it is the adapter's own"):
            all_variants(strategies, grid, [], configured)
    assert all_variants(["qlora"], ["lora.dropout=0,0.1"], [], configured)


def test_tokenizer_and_template_are_the_adapter_s(make_config: MakeConfig, first: RunConfig, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(first.model.path, base)
    (base / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    named = {"model__path": str(base), "model__tokenizer": str(tmp_path / "tokenizer.model")}
    old = make_config(**named, train__output=str(tmp_path / "old"), eval__samples=0)
    fine_tune(old, Quiet())
    config = begun_from(make_config, old, model__path=str(base), eval__samples=0)
    fine_tune(config, Quiet())
    told = [
        json.loads(Path(c.train.output, "adapter", "minilora.json").read_text())["tokenizer"] for c in (old, config)
    ]
    assert told[0] == told[1]


def test_data_check_sees_what_the_run_sees(
    make_config: MakeConfig, first: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's [lora], of which the memory is, and its tokenizer, also where data are mended."""
    base, ledgers = tmp_path / "base", list[Ledger]()
    shutil.copytree(first.model.path, base)
    (base / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    old = make_config(
        first, model__path=str(base), model__tokenizer=str(tmp_path / "tokenizer.model"), eval__samples=0,
        train__output=str(tmp_path / "old"),
    )  # fmt: skip
    fine_tune(old, Quiet())
    config = begun_from(make_config, old, model__path=str(base))
    monkeypatch.setattr(Ledger, "fitted", lambda self: ledgers.append(self) or self)
    data, _ = check_data(config)
    assert (data.tokenizer.path, ledgers[0].config.lora) == (tmp_path / "tokenizer.model", first.lora)
    assert "60 records; left out: nothing" in fix_data(config, str(tmp_path / "fixed.jsonl"))


def test_an_old_template_is_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    """The one that put no space before an answer, which an adapter may have learnt."""
    base = tmp_path / "v1"
    save_hf(tiny_model(config=replace(TINY, vocab_size=32_000)), base, dtype=torch.float32)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", base / "tokenizer.model")
    old = make_config(model__path=str(base), model__old_hf_spaces=True, train__output=str(tmp_path / "old"))
    fine_tune(make_config(old, eval__samples=0, eval__answers=0), Quiet())
    config, _ = settled(begun_from(make_config, old, model__path=str(base)))
    assert config.model.old_hf_spaces
    assert check_data(begun_from(make_config, old, model__path=str(base)))[0].tokenizer.template == OLD_HF


@pytest.mark.parametrize("strategy", ["full", "prefix"])
def test_other_strategies_have_no_adapter(make_config: MakeConfig, strategy: str) -> None:
    with pytest.raises(UserError, match=r"train\.adapter is for lora and qlora"):
        make_config(train__strategy=strategy, train__adapter="somewhere")


def test_it_is_not_overwritten_by_what_begins_from_it(
    first: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called: a folder may have the embedded base's name, hold links, or be one."""
    folder = Path(first.train.output)
    (tmp_path / "link").symlink_to(folder)
    for name in ("holds", "files"):
        (tmp_path / name).mkdir()
    (tmp_path / "holds" / "adapter").symlink_to(folder / "adapter")
    for file in (folder / "adapter").iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    folder.rename("demo")
    folder.symlink_to("demo")
    for adapter in (str(folder), f"{folder}/adapter", "link", "holds", "files", "demo"):
        with pytest.raises(UserError, match="would be begun anew; name another"):
            fine_tune(replace(first, train=replace(first.train, adapter=adapter)), Quiet(), overwrite=True)
    assert read_adapter(first.train.output, TINY)


def test_a_dry_run_begins_from_it_too(make_config: MakeConfig, first: RunConfig, quiet: Quiet) -> None:
    dry_run(begun_from(make_config, first), quiet)
    assert f"adapters begin as those of {first.train.output}/adapter, with its [lora]" in quiet.said
