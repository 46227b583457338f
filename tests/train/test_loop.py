"""Whole runs in this process: their files, early stopping, the best weights, what stops a run and what does not."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY, TOKENIZER, MakeConfig, Quiet, chat, stop_after, tiny_model, write_jsonl

from minilora.checkpoint.adapter import load_adapter
from minilora.checkpoint.files import sha256_of
from minilora.checkpoint.load import load_model
from minilora.checkpoint.provenance import read_provenance
from minilora.checkpoint.save import save_hf
from minilora.config import RunConfig
from minilora.data import pack
from minilora.data.pack import PackedBatch, epoch_rows
from minilora.errors import UserError
from minilora.evaluate.perplexity import mean_loss
from minilora.generation import generate
from minilora.memory import PeakMemory
from minilora.projections import Projections
from minilora.report.page import write_report
from minilora.tokenizer import load_tokenizer
from minilora.train import dry_run, ledger, loop, schedule, setup
from minilora.train.data_check import check_data
from minilora.train.ledger import Ledger
from minilora.train.loop import fine_tune
from minilora.train.results import records
from minilora.train.run_folder import LineLog, bytes_in
from minilora.train.setup import Run
from minilora.train.signals import Stopped
from minilora.train.step import StepResult
from minilora.train.strategies import trainable

Steps = list[dict[str, Any]]


def read_lines(path: Path) -> Steps:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def adapter_bytes(run: Run) -> bytes:
    return (run.folder.path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_and_its_files(make_config: MakeConfig, quiet: Quiet) -> None:
    config = make_config(train__checkpoint_every=2, data__test=make_config().data.validation)
    run = fine_tune(config, quiet)
    path = run.folder.path
    assert {c.name for c in path.iterdir()} == {
        ".lock", "config.toml", "before.json", "metrics.jsonl", "timing.jsonl", "checkpoints", "adapter",
        "summary.json", "samples.md", "generated.jsonl", "test_looks.jsonl",
    }  # fmt: skip
    assert quiet.began == (0, 4)
    assert quiet.ended
    assert not run.model.training

    metrics, timing = read_lines(path / "metrics.jsonl"), read_lines(path / "timing.jsonl")
    assert [m["step"] for m in metrics] == [t["step"] for t in timing] == [1, 2, 3, 4]
    assert [m.keys() >= {"val_loss", "val_perplexity"} for m in metrics] == [False, True, False, True]
    assert all(m.keys() >= {"loss", "lr", "grad_norm", "tokens", "target_tokens"} for m in metrics)
    assert all(t["tok_per_s"] > 0 and t["memory_bytes"] > 0 for t in timing)
    assert metrics[-1]["tokens"] == run.state.counters.tokens

    summary = run.folder.read_json("summary.json")
    assert summary["steps"] == summary["updates"] == 4
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["after"].keys() == {"loss", "perplexity", "exact_match", "f1"} == summary["test"].keys()
    assert summary["after"]["perplexity"] == pytest.approx(math.exp(summary["after"]["loss"]))
    assert summary["after"] == summary["test"]
    assert summary["trainable_parameters"] == sum(p.numel() for p in run.state.weights.values())
    samples, probes = (path / "samples.md").read_text().split("# Probes")
    assert samples.count("\n| ") == 3  # head and two samples
    assert probes.count("\n| ") == 9  # head and eight probes

    provenance = read_provenance(path / "adapter")
    assert provenance["base_path"] == config.model.path
    assert provenance["validation_path"] == config.data.validation
    recipe = {"type": "nf4", "double_quant": True, "block_size": 64, "compute_dtype": "float32"}
    assert provenance["quantization"] == recipe
    assert provenance["tokenizer"] == {"sha256": sha256_of(TOKENIZER), "template": run.tokenizer.version}
    assert provenance["data"]["train"] == run.state.origin["data"]["train"]
    assert provenance["versions"].keys() == {"minilora", "torch", "threads", "python"}
    assert provenance["metrics"] == {key: summary[key] for key in ("before", "after", "test")}


def test_the_adapter_is_the_model_that_was_measured(make_config: MakeConfig, quiet: Quiet, tiny_base: Path) -> None:
    run = fine_tune(make_config(), quiet)
    loaded = load_model(tiny_base, quantize="nf4", dtype=torch.float32)
    load_adapter(loaded, run.folder.path / "adapter")
    loss = mean_loss(loaded, run.validation, 64)
    assert loss == run.folder.read_json("summary.json")["after"]["loss"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path
) -> None:
    config = make_config(lora__dropout=0.1, eval__answers=0, eval__samples=0)
    runs = [
        fine_tune(make_config(config, train__output=str(tmp_path / name), train__seed=seed), quiet)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    metrics = [(run.folder.path / "metrics.jsonl").read_bytes() for run in runs]
    assert metrics[0] == metrics[1] != metrics[2]
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1]) != adapter_bytes(runs[2])


@pytest.mark.parametrize(
    ("strategy", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("qlora", "float16"), ("full", "auto")]
)
def test_every_strategy_and_dtype_learns(make_config: MakeConfig, quiet: Quiet, strategy: Any, dtype: Any) -> None:
    lr = 1e-3 if strategy == "full" else 1e-2
    config = make_config(
        train__strategy=strategy, model__dtype=dtype, train__lr=lr, train__max_steps=8, eval__every=8, eval__answers=0,
        eval__samples=0,
    )  # fmt: skip
    run = fine_tune(config, quiet)
    summary = run.folder.read_json("summary.json")
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.2
    assert all(p.dtype == torch.float32 for p in run.state.weights.values())
    if dtype == "float16":
        assert run.state.loss_scale.enabled
        assert any("float16" in said for said in quiet.said)
    if strategy == "full":
        reloaded = load_model(run.folder.path / "model", dtype=torch.float32)
        assert all(p.equal(reloaded.get_parameter(name)) for name, p in run.state.weights.items())


STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"train__strategy": "full", "train__lr": 1e-3},
    "full, all begun anew": {"train__strategy": "full", "train__reinit": "all", "train__lr": 1e-2},
    "full in 8 bits": {"train__strategy": "full", "train__optimizer": "adamw_8bit", "train__lr": 1e-3},
    "partial": {"train__strategy": "partial", "train__layers": 1, "train__parameters": ("lm_head",)},
    "lora": {"train__strategy": "lora", "train__lora_plus_ratio": 4.0},
    "qlora": {"train__strategy": "qlora", "train__neftune_alpha": 1.0},
    "qlora with DoRA": {"train__strategy": "qlora", "lora__dora": True, "lora__dropout": 0.1},
    "prefix": {"train__strategy": "prefix", "train__prefix_tokens": 8, "train__lr": 0.3},
    "prefix on NF4": {"train__strategy": "prefix", "train__prefix_tokens": 8, "model__quantize": "nf4",
                      "train__lr": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns_from_chats_and_from_text(
    make_config: MakeConfig, quiet: Quiet, data_folder: Path, name: str, raw: bool
) -> None:
    """The loss falls, what should moves and nothing else does, and what was saved is the model that was measured."""
    data = str(data_folder / ("text.jsonl" if raw else "train.jsonl"))
    config = make_config(
        **{
            "data__train": data, "data__validation": None, "train__max_steps": 8, "train__lr": 1e-2,
            "eval__answers": 0, "eval__samples": 0, **STRATEGIES[name],
        }
    )  # fmt: skip
    run = fine_tune(config, quiet)
    assert quiet.steps[-1]["loss"] < quiet.steps[0]["loss"] - 0.2
    base = load_model(config.model.path, quantize=config.quantize, dtype=torch.float32)
    frozen = {n: p for n, p in run.model.named_parameters() if n not in run.state.weights}
    start = {key.replace(".weight", ""): p for key, p in base.named_parameters()}
    for key, p in frozen.items():
        assert torch.equal(p, start[key.replace(".base.weight", "").replace(".weight", "")]), key
    reloaded = dry_run._reload(run.config, run.folder.path)
    tokens = torch.tensor([run.train[0].tokens[:-1].tolist()])
    with torch.no_grad():
        assert torch.equal(reloaded(tokens), run.model(tokens))
    assert generate(reloaded, tokens, 5).equal(generate(run.model, tokens, 5))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_resumes_exactly(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    def config(folder: str) -> RunConfig:
        return make_config(
            **{"eval__answers": 0, "eval__samples": 0, "train__accumulate": 2, **STRATEGIES[name],
               "train__output": str(tmp_path / folder)}
        )  # fmt: skip

    straight = fine_tune(config("straight"), Quiet()).folder.path
    with pytest.raises(Stopped):
        fine_tune(config("cut"), stop_after(2, Quiet()))
    cut = fine_tune(config("cut"), Quiet(), resume=True).folder.path
    weights = "model/model.safetensors" if config("cut").train.base_learns else "adapter/adapter_model.safetensors"
    for file in ("metrics.jsonl", weights):
        assert (cut / file).read_bytes() == (straight / file).read_bytes(), file


@pytest.mark.parametrize("strategy", ["full", "partial"])
def test_training_the_base_in_16_bits_is_refused(make_config: MakeConfig, quiet: Quiet, strategy: str) -> None:
    some = {"train__layers": 1} if strategy == "partial" else {}
    with pytest.raises(UserError, match=rf'"{strategy}" trains float32 weights; model.dtype .bfloat16.'):
        fine_tune(make_config(train__strategy=strategy, model__dtype="bfloat16", **some), quiet)


def test_layers_that_the_base_does_not_have_are_refused_before_it_is_loaded(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"train.layers is 3, but the model has 2 layers"):
        fine_tune(make_config(train__strategy="partial", train__layers=3), quiet)


def test_what_is_seen_is_every_sample_once_an_epoch(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an epoch come and go with the order; the steps are those of the rows of all epochs."""
    seen: list[int] = []
    make_batch = loop.make_batch

    def remember(samples: Any, rows: list[list[int]], *args: Any) -> Any:
        seen.extend(i for row in rows for i in row)
        return make_batch(samples, rows, *args)

    monkeypatch.setattr(loop, "make_batch", remember)
    monkeypatch.setattr(pack, "WINDOW", 8)  # with all samples in one window the number of rows would not change
    config = make_config(
        train__max_steps=None, train__epochs=3.0, train__batch_size=1, data__validation=None, data__max_seq_len=50
    )
    run = fine_tune(config, quiet)
    lengths = [s.length for s in run.train]
    rows = [len(epoch_rows(lengths, 50, 0, epoch)) for epoch in range(3)]
    assert len(set(rows)) > 1, "else a multiple of the first epoch's rows would pass"
    assert run.n_steps == sum(rows)
    assert sorted(seen) == sorted(list(range(len(lengths))) * 3)


@pytest.mark.parametrize(("epochs", "share"), [(0.5, 0.5), (1.0, 1.0), (1e-6, 0.0)])
def test_part_of_an_epoch(make_config: MakeConfig, quiet: Quiet, epochs: float, share: float) -> None:
    config = make_config(train__max_steps=None, train__epochs=epochs, train__accumulate=2)
    folder = loop.RunFolder(config, resume=False, overwrite=False)
    run = loop.set_up(config, folder, quiet)
    folder.close()
    assert run.n_steps == max(1, math.ceil(share * len(run.state.sampler.rows) / 4))


def test_modules_that_learn_whole_are_told_in_their_dtype(make_config: MakeConfig) -> None:
    said = setup.dtypes(make_config(lora__modules_to_save=("lm_head",)), torch.bfloat16)
    assert "head and activations bfloat16; adapters, modules_to_save and gradients float32" in said


@pytest.mark.parametrize(("warmup", "warned"), [(4, False), (5, True)])
def test_a_warm_up_that_the_run_does_not_outlast_is_told(
    make_config: MakeConfig, quiet: Quiet, warmup: int, warned: bool
) -> None:
    run = fine_tune(make_config(train__warmup_steps=warmup, eval__answers=0, eval__samples=0), quiet)
    assert (max(m["lr"] for m in quiet.steps) < run.config.train.lr) == warned
    said = [line for line in quiet.said if "warm-up takes 5 steps, the run has 4: train.lr is never reached" in line]
    assert len(said) == warned


# --- Validation -----------------------------------------------------------------------------------------------------


def with_validation(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let the validations while training give these losses; the weights of each, once they are known."""
    seen: list[dict[str, torch.Tensor]] = []
    real, left = loop.mean_loss, list(losses)

    def fake(model: Any, *args: Any) -> float:
        if model.training and left:  # before and after the run it is in eval mode
            seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
            return left.pop(0)
        return real(model, *args)

    monkeypatch.setattr(loop, "mean_loss", fake)
    return seen


def test_the_best_weights_are_put_back(make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = with_validation(monkeypatch, [3.0, 2.0, 2.5, 2.0])
    run = fine_tune(make_config(eval__every=1, train__checkpoint_every=1, train__keep_checkpoints=1), quiet)
    assert run.state.counters.best_step == run.folder.read_json("summary.json")["best_step"] == 2
    assert run.stopped_because == "all steps done"
    names = {c.name for c in run.folder.checkpoints.iterdir()}
    assert names == {"best-00000002", "step-00000004"}
    saved = load_file(run.folder.path / "adapter" / "adapter_model.safetensors")
    for name, weight in seen[1].items():
        assert run.state.weights[name].equal(weight)
        assert saved[f"base_model.model.model.{name}.weight"].equal(weight)
    assert not all(weight.equal(seen[1][name]) for name, weight in seen[3].items())


def test_it_stops_out_of_patience(make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    with_validation(monkeypatch, [3.0, 2.0, 2.5, 1.0, 1.5, 1.25, 0.5])
    run = fine_tune(make_config(eval__every=1, eval__patience=2, train__max_steps=9), quiet)
    assert len(quiet.steps) == 6
    assert run.stopped_because == "no better validation in 2 since step 4"
    again = fine_tune(run.config, Quiet(), resume=True)  # from the start: the last checkpoint was never reached
    assert again.folder.path == run.folder.path


def test_patience_without_a_validation_is_refused(make_config: MakeConfig, quiet: Quiet) -> None:
    with pytest.raises(
        UserError, match=r"eval\.patience waits for a better validation, and there is none; name data\.v"
    ):
        fine_tune(make_config(eval__patience=2, data__validation=None), quiet)


def test_without_patience_it_never_stops_early(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_validation(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    assert fine_tune(make_config(eval__every=1), quiet).state.counters.step == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_that_is_not_a_number_is_no_best(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    with_validation(monkeypatch, [bad, 2.0, bad, 1.0])
    run = fine_tune(make_config(eval__every=1), quiet)
    assert run.state.counters.best_step == 4
    metrics = read_lines(run.folder.path / "metrics.jsonl")
    assert [m["val_loss"] for m in metrics] == [None, 2.0, None, 1.0]


def test_a_model_that_has_learnt_by_heart_is_measured_where_it_was_best(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path
) -> None:
    """Without a trick: two chats only, until the validation gets worse."""
    few = write_jsonl(tmp_path / "few.jsonl", [chat("a", "emit it"), chat("some more", "name t")])
    config = make_config(
        data__train=str(few), train__lr=5e-2, eval__every=1, train__max_steps=12, train__schedule="constant"
    )
    run = fine_tune(config, quiet)
    losses = [m["val_loss"] for m in quiet.steps]
    assert losses.index(min(losses)) + 1 == run.state.counters.best_step < 12
    assert run.folder.read_json("summary.json")["after"]["loss"] == min(losses)


# --- What stops a run -----------------------------------------------------------------------------------------------


def test_a_forgotten_adapter_stops_the_run_by_name(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Projections.of

    def forgetful(*layers: torch.nn.Module, **options: int) -> Projections:
        parts = of(*layers, **options)
        return replace(parts, adapters=(None,)) if parts.weights[0].shape[1] == TINY.hidden_dim else parts

    monkeypatch.setattr(Projections, "of", staticmethod(forgetful))
    with pytest.raises(UserError, match=r"after update 1, 2 of 28 .*layers.0.mlp.down_proj.lora_B \(got no gradient\)"):
        fine_tune(make_config(), quiet)
    assert quiet.ended
    assert not list((Path(make_config().train.output) / "checkpoints").glob("step-*"))


def test_an_adapter_that_the_optimizer_forgot_stops_the_run(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = setup.optimizer_for
    monkeypatch.setattr(
        setup, "optimizer_for", lambda weights, config: optimizer(dict(list(weights.items())[1:]), config)
    )
    with pytest.raises(UserError, match=r"after update 2, 1 of 28 .* layers.0.self_attn.q_proj.lora_A \(did not move"):
        fine_tune(make_config(), quiet)


def spoil_steps(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Let the losses of these steps (from 1) be NaN."""
    train_step, calls = loop.train_step, iter(range(1, 1000))
    loss_sum = train_step.__globals__["loss_sum"]

    def step(*args: Any) -> StepResult:
        factor = math.nan if next(calls) in bad else 1.0
        monkeypatch.setitem(train_step.__globals__, "loss_sum", lambda *a: loss_sum(*a) * factor)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", step)


def test_bad_steps_are_skipped_and_told(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch, data_folder: Path
) -> None:
    spoil_steps(monkeypatch, {1, 3, 4})
    run = fine_tune(make_config(train__max_steps=6, train__max_bad_steps=3), quiet)
    metrics = read_lines(run.folder.path / "metrics.jsonl")
    assert [m.get("skipped", False) for m in metrics] == [True, False, True, True, False, False]
    assert [m["loss"] is None for m in metrics] == [True, False, True, True, False, False]
    assert run.state.counters.updates == 3
    good = [m["lr"] for m in metrics if not m.get("skipped")]
    assert good == [loop.lr_at(i, 6, run.config.train) for i in range(3)], "the schedule waits"
    named = metrics[0]["samples"]
    assert named
    assert all(where.startswith(f"{data_folder / 'train.jsonl'}:") for where in named)


@pytest.mark.parametrize("limit", [1, 3])
def test_too_many_bad_steps_stop_the_run_with_all_of_them_told(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    spoil_steps(monkeypatch, set(range(2, 100)))
    with pytest.raises(UserError, match=rf"not finite {limit} times in a row, up to step {limit + 1}; .*metrics.jsonl"):
        fine_tune(make_config(train__max_steps=50, train__max_bad_steps=limit), quiet)
    metrics = read_lines(Path(make_config().train.output) / "metrics.jsonl")
    assert len(metrics) == limit + 1
    assert all(m["samples"] for m in metrics[1:])


def test_float16_overflows_do_not_count_until_the_scale_is_at_its_least(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, set(range(1, 9)))
    run = fine_tune(make_config(model__dtype="float16", train__max_steps=10, train__max_bad_steps=2), quiet)
    assert run.state.counters.updates == 2
    assert run.state.loss_scale.scale == 2.0**8


def test_a_run_that_blew_up_says_so(make_config: MakeConfig, quiet: Quiet) -> None:
    config = make_config(train__weight_decay=1e30, data__validation=None)
    with pytest.raises(UserError, match=r"run: training diverged: .*; lower train.lr or train.weight_decay$"):
        fine_tune(config, quiet)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ..."), UserError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), UserError),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), UserError),  # pinned memory
        (RuntimeError("anything else"), RuntimeError),
    ],
)
def test_out_of_memory_says_what_to_turn(
    make_config: MakeConfig,
    quiet: Quiet,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    becomes: type[Exception],
) -> None:
    def fail(*_args: Any) -> StepResult:
        raise error

    monkeypatch.setattr(loop, "train_step", fail)
    words = r"^out of memory; .*activation_checkpointing.*max_seq_len.*batch_size" if becomes is UserError else "else"
    with pytest.raises(becomes, match=words):
        fine_tune(make_config(), quiet)


# --- What does not --------------------------------------------------------------------------------------------------


def test_a_full_disk_for_the_logs_does_not_end_training(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = LineLog.append

    def full(self: LineLog, record: dict[str, Any]) -> str | None:
        path, self.path = self.path, Path("/dev/full" if record["step"] < 4 else self.path)
        try:
            return append(self, record)
        finally:
            self.path = path

    monkeypatch.setattr(LineLog, "append", full)
    run = fine_tune(make_config(), quiet)
    assert [m["step"] for m in read_lines(run.folder.path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sum("training goes on" in said for said in quiet.said) == 2  # once a file
    assert (run.folder.path / "adapter").exists()


def test_a_run_without_any_log_still_ends_well(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LineLog, "append", lambda *_: None)
    summary = fine_tune(make_config(), quiet).folder.read_json("summary.json")
    assert summary["tok_per_s"] is None


@pytest.mark.parametrize("learns", [{}, {"train__strategy": "partial", "train__layers": 1}])
def test_a_disk_that_is_too_small_is_found_before_the_base_is_loaded(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: dict[str, Any]
) -> None:
    """Two checkpoints, of weights and two moments, the best weights twice, and what is left: of partial the model; what
    a run has written counts as free."""
    config = make_config(train__checkpoint_every=2, **learns)
    run = fine_tune(config, Quiet())
    learned, whole = (sum(p.numel() for p in ps) for ps in (trainable(run.model).values(), run.model.parameters()))
    needed = 4 * (learned * (2 * 3 + 2) + (whole if learns else learned))
    assert bytes_in(run.folder.path) > needed

    def disk_with(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))  # type: ignore[attr-defined]

    disk_with(needed - 1)
    with pytest.raises(UserError, match=r"new: .* GB are needed, .* are free; free some or choose another folder"):
        fine_tune(replace(config, train=replace(config.train, output=str(tmp_path / "new"))), quiet)
    assert not (tmp_path / "new").exists()
    assert not any("weights learn" in said for said in quiet.said)
    disk_with(0)
    fine_tune(config, quiet, resume=True)


def test_the_data_are_known_as_they_were_read(
    make_config: MakeConfig, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is appended while the base is loaded is of another run."""
    grows = tmp_path / "train.jsonl"
    grows.write_bytes((data_folder / "train.jsonl").read_bytes())
    known, real = sha256_of(grows), setup.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        with grows.open("a") as file:
            file.write(json.dumps(chat("more", "of it")) + "\n")
        return real(*args, **kwargs)

    monkeypatch.setattr(setup, "load_model", load)
    run = fine_tune(make_config(data__train=str(grows)), Quiet())
    assert run.state.origin["data"]["train"] == known


def test_a_failed_start_leaves_nothing_in_the_way(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl: cannot be read"):
        fine_tune(make_config(data__train=str(tmp_path / "nowhere.jsonl")), quiet)
    fine_tune(make_config(train__max_steps=2), Quiet())
    with pytest.raises(UserError, match=r"nowhere.jsonl: cannot be read"):
        fine_tune(make_config(data__train=str(tmp_path / "nowhere.jsonl")), quiet, overwrite=True)
    assert (tmp_path / "run" / "adapter").exists(), "an old run is deleted only once the new one can begin"


# --- Resuming within this process (tests/train/test_resume.py kills real ones) --------------------------------------


def test_a_signal_saves_and_puts_the_old_handlers_back(make_config: MakeConfig, quiet: Quiet) -> None:
    old = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after step 2, saved; go on with --resume") as stopped:
        fine_tune(make_config(), stop_after(2, quiet))
    assert stopped.value.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) is old
    again = Quiet()
    run = fine_tune(make_config(), again, resume=True)
    assert again.began == (2, 4)
    assert [m["step"] for m in again.steps] == [3, 4]
    assert [m["step"] for m in read_lines(run.folder.path / "metrics.jsonl")] == [1, 2, 3, 4]


def interrupted(make_config: MakeConfig, **changes: Any) -> RunConfig:
    config = make_config(**changes)
    with pytest.raises(Stopped):
        fine_tune(config, stop_after(2, Quiet()))
    return config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora__rank": 8}, "config.lora.rank was 4 when the run began and is 8 now"),
        ({"train__seed": 1}, "config.train.seed was 0"),
        ({"train__optimizer": "adamw_8bit"}, "config.train.optimizer was 'adamw' when the run began"),
        ({"train__max_steps": 5}, "config.train.max_steps was 4"),
        ({"model__double_quant": False}, "config.model.double_quant was True"),
        ({"data__max_seq_len": 65}, "config.data.max_seq_len was 64"),
    ],
)
def test_another_configuration_is_not_gone_on_with(
    make_config: MakeConfig, quiet: Quiet, change: dict[str, Any], named: str
) -> None:
    interrupted(make_config)
    with pytest.raises(UserError, match=named):
        fine_tune(make_config(**change), quiet, resume=True)
    assert len(read_lines(Path(make_config().train.output) / "metrics.jsonl")) == 2


def test_where_the_state_lies_may_change(make_config: MakeConfig, quiet: Quiet) -> None:
    """It changes no bit; without a GPU it does not even change where."""
    interrupted(make_config)
    fine_tune(make_config(train__paged=True), quiet, resume=True)
    [told] = [line for line in quiet.said if line.startswith("paged: ")]
    assert told.endswith(" of the optimizer's state is in the host's memory anyway, where there is no GPU")


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 11), (1.11, 12), (0.3, 3), (1e-12, 1)])
def test_a_sum_that_is_off_by_a_rounding_is_no_step_more(make_config: MakeConfig, epochs: float, steps: int) -> None:
    config = make_config(train__max_steps=None, train__epochs=epochs, train__batch_size=10, data__max_seq_len=50)
    assert schedule.steps_of_run([50] * 100, config, None) == steps


@pytest.mark.parametrize(("epochs", "packed"), [(1.0, [0]), (2.0, [0, 1]), (1.5, [0, 1])])
def test_rows_are_packed_for_the_epochs_that_there_are(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, epochs: float, packed: list[int]
) -> None:
    asked, pack_rows = list[int](), schedule.epoch_rows
    monkeypatch.setattr(schedule, "epoch_rows", lambda *args, mix: asked.append(args[3]) or pack_rows(*args, mix=mix))
    lengths = [20, 30, 40, 10] * 5
    config = make_config(train__epochs=epochs, train__max_steps=None, train__batch_size=1)
    assert 0 < schedule.steps_of_run(lengths, config, None) <= epochs * len(lengths)
    assert asked == packed


def on_batch(monkeypatch: pytest.MonkeyPatch, then: Callable[[int, PackedBatch], None]) -> None:
    """Call `then` with the number, from 1, of each micro-batch, and with it."""
    make_batch, numbers = loop.make_batch, count(1)

    def make(*args: Any) -> PackedBatch:
        batch = make_batch(*args)
        then(next(numbers), batch)
        return batch

    monkeypatch.setattr(loop, "make_batch", make)


@pytest.mark.parametrize("at", [1, 9])
def test_a_signal_is_followed_between_two_micro_batches(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The step is taken anew after it, across the end of an epoch and with dropout, to the same bytes."""
    keys = {"lora__dropout": 0.1, "train__accumulate": 6, "train__batch_size": 1, "eval__answers": 0}
    straight = fine_tune(make_config(**keys, train__output=str(tmp_path / "straight")), Quiet())
    assert straight.state.sampler.epoch > 0
    with monkeypatch.context() as patch:
        on_batch(patch, lambda number, _: os.kill(os.getpid(), signal.SIGTERM) if number == at else None)
        with pytest.raises(Stopped, match=f"stopped after step {at // 6}, saved"):
            fine_tune(make_config(**keys), quiet)
    run = fine_tune(make_config(**keys), Quiet(), resume=True)
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (run.folder.path, straight.folder.path)]
    assert (adapter_bytes(run), logs[0]) == (adapter_bytes(straight), logs[1])


def test_however_many_micro_batches_a_step_has_few_are_held(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, most = list[ref[PackedBatch]](), 0

    def look(_number: int, batch: PackedBatch) -> None:
        nonlocal most
        made.append(ref(batch))
        most = max(most, sum(one() is not None for one in made))

    on_batch(monkeypatch, look)
    fine_tune(make_config(train__accumulate=20, train__max_steps=2), quiet)
    assert len(made) == 40
    assert most <= 2


def test_changed_data_are_refused_and_moved_data_are_not(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path, data_folder: Path
) -> None:
    here = tmp_path / "here.jsonl"
    here.write_bytes((data_folder / "train.jsonl").read_bytes())
    interrupted(make_config, data__train=str(here))
    moved = here.rename(tmp_path / "there.jsonl")
    moved.write_bytes(moved.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"data.train was '[0-9a-f]{64}' when the run began"):
        fine_tune(make_config(data__train=str(moved)), quiet, resume=True)
    moved.write_bytes(moved.read_bytes()[:-1])
    config = make_config(data__train=str(moved), train__checkpoint_every=1, train__keep_checkpoints=5)
    assert fine_tune(config, quiet, resume=True).state.counters.step == 4


def test_of_several_sources_each_is_known_with_its_weight(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path, data_folder: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat("a name", "emit it")])
    sources = str(data_folder / "train.jsonl"), f"{other}:2"
    interrupted(make_config, data__train=sources)
    with pytest.raises(UserError, match=r"data.train.2.weight was 2.0 when the run began and is 3.0 now"):
        fine_tune(make_config(data__train=(sources[0], f"{other}:3")), quiet, resume=True)
    was = other.read_bytes()
    other.write_bytes(was + b"\n")
    with pytest.raises(UserError, match=r"data.train.2.sha256 was '[0-9a-f]{64}'"):
        fine_tune(make_config(data__train=sources), quiet, resume=True)
    other.write_bytes(was)
    assert fine_tune(make_config(data__train=sources), quiet, resume=True).state.counters.step == 4


def test_a_split_and_replayed_text(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    """Resumed at any step, it sees the same; the replayed text has its share of the tokens."""
    general = str(write_jsonl(tmp_path / "general.jsonl", [{"text": f"general words {n}"} for n in range(30)]))
    config = make_config(
        data__validation=None, data__validation_share=0.2, data__test_share=0.1, data__replay=0.3,
        data__replay_from=general, train__max_steps=None, train__output=str(tmp_path / "straight"),
    )  # fmt: skip
    straight = fine_tune(config, quiet)
    n_records = [len({sample.where for sample in part}) for part in (straight.validation, straight.test)]
    assert min(n_records) > 0
    replayed = [i for i, sample in enumerate(straight.train) if sample.where.startswith(general)]
    taken = [i for row in straight.state.sampler.rows for i in row]
    share = sum(straight.train[i].length for i in taken if i in replayed) / sum(straight.train[i].length for i in taken)
    assert share == pytest.approx(0.3, abs=0.02)
    assert json.loads((straight.folder.path / "summary.json").read_text())["test"]

    again = replace(config, train=replace(config.train, output=str(tmp_path / "again")))
    with pytest.raises(Stopped):
        fine_tune(again, stop_after(2, Quiet()))
    resumed = fine_tune(again, quiet, resume=True)
    logs = [(run.folder.path / "metrics.jsonl").read_bytes() for run in (straight, resumed)]
    assert logs[0] == logs[1]


def test_what_leaks_is_not_trained_on(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    both = chat("a name", "emit it")
    train = write_jsonl(tmp_path / "leaky.jsonl", [chat("more", "so"), both, chat("more", "so")])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [both])
    config = make_config(data__train=str(train), data__validation=str(held_out))
    with pytest.raises(UserError, match=r"leaky.jsonl:2: the same record as .*held_out.jsonl:1, which data.validation"):
        fine_tune(config, quiet)
    assert not (Path(config.train.output) / "config.toml").exists()
    fine_tune(make_config(data__train=str(train), data__validation=None), quiet)
    assert any("warning: 1 x duplicate, the first:" in line and "leaky.jsonl:3" in line for line in quiet.said)


def test_another_base_is_refused(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    save_hf(tiny_model(seed=7), tmp_path / "other", dtype=torch.float32, tokenizer=TOKENIZER)
    interrupted(make_config)
    with pytest.raises(UserError, match=r"base was '[0-9a-f]{64}' when the run began"):
        fine_tune(make_config(model__path=str(tmp_path / "other")), quiet, resume=True)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path
) -> None:
    straight = fine_tune(make_config(train__output=str(tmp_path / "straight")), Quiet())
    interrupted(make_config, train__checkpoint_every=1)
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    file = last / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-00000002 is damaged; delete .*state\.safetensors: altered since it was"):
        fine_tune(make_config(), quiet, resume=True)
    for part in last.iterdir():
        part.unlink()
    last.rmdir()
    run = fine_tune(make_config(), quiet, resume=True)
    assert adapter_bytes(run) == adapter_bytes(straight)


@pytest.mark.parametrize(
    "damage", [{"answers": [1]}, {"answers": [1, 2]}, {"answers": []}, {"probes": ["a"]}, {}, None]
)
def test_a_damaged_before_json_is_named(make_config: MakeConfig, quiet: Quiet, damage: dict[str, Any] | None) -> None:
    interrupted(make_config)
    file = Path(make_config().train.output) / "before.json"
    held = json.loads(file.read_text())
    file.unlink()
    if damage is not None:
        file.write_text(json.dumps(held | damage if damage else {}))
    with pytest.raises(UserError, match=r"run/before\.json is missing, or not what a run writes; .*--overwrite"):
        fine_tune(make_config(), quiet, resume=True)


def test_other_versions_are_told(make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(make_config)
    monkeypatch.setattr(loop, "versions", lambda: {"minilora": "9", "torch": torch.__version__, "threads": 1})
    fine_tune(make_config(), quiet, resume=True)
    assert any(
        said.startswith(f"warning: minilora {version('minilora')} -> 9 since step-00000002") for said in quiet.said
    )


def test_a_finished_run_resumed_is_the_same(make_config: MakeConfig, quiet: Quiet) -> None:
    run = fine_tune(make_config(), quiet)
    before = adapter_bytes(run), (run.folder.path / "metrics.jsonl").read_bytes()
    again = fine_tune(make_config(), Quiet(), resume=True)
    assert (adapter_bytes(again), (again.folder.path / "metrics.jsonl").read_bytes()) == before


@pytest.mark.parametrize("strategy", ["qlora", "full"])
def test_a_finished_run_resumed_leaves_alone_what_lies_there(
    make_config: MakeConfig, quiet: Quiet, strategy: str
) -> None:
    """And what must be written anew does not take a user's file with it."""
    config = make_config(train__strategy=strategy, train__lr=1e-3)
    path = fine_tune(config, quiet).folder.path
    [learnt] = (path / name for name in ("adapter", "model") if (path / name).exists())
    was = learnt.stat().st_ino
    (learnt / "README-mine.md").write_text("x")
    fine_tune(config, Quiet(), resume=True)
    assert learnt.stat().st_ino == was
    weights = next(learnt.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=r"written anew, but minilora did not write README-mine\.md there: move it away"
    ):
        fine_tune(config, Quiet(), resume=True)
    (learnt / "README-mine.md").unlink()
    fine_tune(config, Quiet(), resume=True)
    assert weights.read_bytes() == whole


def test_the_test_that_a_finished_run_opens_late_stands_in_its_adapter(make_config: MakeConfig, quiet: Quiet) -> None:
    config = make_config(data__test=make_config().data.validation)
    path = fine_tune(config, quiet, with_test=False).folder.path
    assert read_provenance(path / "adapter")["metrics"]["test"] == {}
    fine_tune(config, Quiet(), resume=True)
    assert read_provenance(path / "adapter")["metrics"]["test"]


def test_a_gpu_s_peaks_are_those_of_all_processes(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run that is resumed takes no step, and knows them all the same."""

    def note(memory: PeakMemory) -> None:
        memory.device_allocated, memory.device_reserved = 300, 400

    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(PeakMemory, "note", note)
        fine_tune(make_config(), quiet)
    again = fine_tune(make_config(), quiet, resume=True)
    peaks = json.loads((again.folder.path / "summary.json").read_text())["peak_memory_bytes"]
    assert (peaks["device_allocated"], peaks["device_reserved"]) == (300, 400)


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_again(make_config: MakeConfig, quiet: Quiet) -> None:
    path = fine_tune(make_config(), quiet).folder.path
    metrics = (path / "metrics.jsonl").read_bytes()
    for folder in (path / "checkpoints").iterdir():
        for part in folder.iterdir():
            part.unlink()
        folder.rmdir()
    (path / "summary.json").unlink()
    again = Quiet()
    fine_tune(make_config(), again, resume=True)
    assert again.began == (0, 4)
    assert (path / "metrics.jsonl").read_bytes() == metrics


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that runs: a run of 4 steps that was cut off after the second, and what it learnt."""
    return {"folder": tmp_path_factory.mktemp("cut") / "run"}


@pytest.mark.parametrize("damage", ["cut", "gone", "binary"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_log_that_was_cut_with_the_power_does_not_stand_in_the_way(
    make_config: MakeConfig, cut_off: dict[str, Any], name: str, damage: str
) -> None:
    config = make_config(train__checkpoint_every=1, train__keep_checkpoints=4)
    if "adapter" not in cut_off:
        run = fine_tune(config, Quiet())
        (run.folder.path / "summary.json").unlink()
        for step in (3, 4):
            shutil.rmtree(run.folder.checkpoint("step", step))
        cut_off["adapter"] = adapter_bytes(run)
        run.folder.path.rename(cut_off["folder"])
    folder = shutil.copytree(cut_off["folder"], config.train.output)
    log = Path(folder) / name
    damaged = {"cut": log.read_bytes()[: log.stat().st_size // 3], "gone": b"", "binary": b"\xff\x00" * 10_000}[damage]
    log.write_bytes(damaged)
    if damage == "gone":
        log.unlink()
    again = fine_tune(config, Quiet(), resume=True)
    assert adapter_bytes(again) == cut_off["adapter"]
    assert [record["step"] for record in read_lines(log)] == [1, 3, 4][damage != "cut" :]
    write_report(again.folder.path)


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        b'{"step": 1, "lr": 1}\n{"st\xff\n\n7\n{"step": 2}\n{"step": 3, "lr": 2}\n{"step": 4'
    )
    assert [record["step"] for record in records(tmp_path / "log", "step", "lr")] == [1, 3]


def test_the_logs_are_on_the_disk_before_a_checkpoint_that_counts_on_them(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = list[int](), os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = fine_tune(make_config(data__validation=None), quiet).folder
    files = folder.metrics.path, folder.timing.path, folder.checkpoint("step", 4) / "state.json"
    at = [synced.index(file.stat().st_ino) for file in files]
    assert at == sorted(at)


# --- A dry run ------------------------------------------------------------------------------------------------------


def test_of_a_dry_run_s_two_models_one_is_there_at_a_time(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, reload = list[ref[Any]](), dry_run._reload

    def tuned(*args: Any, **options: Any) -> Run:
        run = fine_tune(*args, **options)
        trained.append(ref(run.model))
        return run

    def alone(*args: Any) -> Any:
        assert trained[0]() is None
        return reload(*args)

    monkeypatch.setattr(dry_run, "fine_tune", tuned)
    monkeypatch.setattr(dry_run, "_reload", alone)
    dry_run.dry_run(make_config(), quiet)
    assert any("is answered" in said for said in quiet.said)


@pytest.mark.parametrize("n_bad", [2, 99])
def test_a_dry_run_in_float16_goes_on_until_a_step_updates(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch, n_bad: int
) -> None:
    """As the run would, whose loss scale the first overflows settle."""
    spoil_steps(monkeypatch, set(range(1, 1 + n_bad)))
    config = make_config(model__dtype="float16", train__max_bad_steps=99, eval__every=99)
    with pytest.raises(UserError, match="no step could be taken") if n_bad == 99 else nullcontext():
        dry_run.dry_run(config, quiet)
    assert [m.get("skipped", False) for m in quiet.steps] == ([True] * 30 if n_bad == 99 else [True, True, False])
    assert ["val_loss" in m for m in quiet.steps] == [False] * (len(quiet.steps) - 1) + [True]


def test_a_dry_run_that_is_stopped_tells_of_nothing_to_go_on_with(make_config: MakeConfig) -> None:
    with pytest.raises(Stopped, match=r"^stopped; nothing was kept$") as stopped:
        dry_run.dry_run(make_config(), stop_after(1, Quiet()))
    assert stopped.value.exit_status == 128 + signal.SIGTERM


def test_a_dry_run_tells_that_the_folder_is_taken(make_config: MakeConfig) -> None:
    fine_tune(make_config(), Quiet())
    for resume, overwrite, refused in ((False, False, True), (False, True, False), (True, False, False)):
        quiet = Quiet()
        dry_run.dry_run(make_config(), quiet, resume, overwrite)
        said = [line for line in quiet.said if line.startswith("warning: the run itself would be refused: ")]
        assert [line.endswith("or --train.output") for line in said] == [True] * refused


def test_a_dry_run_looks_at_the_disk_that_the_run_writes_to(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all of its steps; what would be begun anew there counts as free, and no best step without validation."""
    config = make_config(train__checkpoint_every=1)
    learned = sum(p.numel() for p in trainable(fine_tune(config, Quiet()).model).values())
    needed = 4 * (3 * 3 + 3) * learned
    shutil.move(tmp_path / "run", tmp_path / "away")
    free = needed

    def disk_usage(path: Path) -> Any:
        here = free if Path(path).is_relative_to(tmp_path) else 10**15
        return shutil._ntuple_diskusage(2 * here, here, here)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    dry_run.dry_run(config, Quiet())
    free = needed - 1
    with pytest.raises(UserError, match=r"run: .* GB are needed, .* are free; free some or choose another folder"):
        dry_run.dry_run(config, quiet)
    assert not quiet.steps
    free = needed - 4 * 2 * learned
    dry_run.dry_run(make_config(train__checkpoint_every=1, data__validation=None), Quiet())
    shutil.move(tmp_path / "away", tmp_path / "run")
    dry_run.dry_run(config, quiet, overwrite=True)


# --- Data -----------------------------------------------------------------------------------------------------------


def test_what_is_answered_is_in_the_ledger_of_train_and_of_data_check(
    make_config: MakeConfig, quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt, of the test, too; what is trained on is shorter."""
    long = chat("name it and " * 4, "so")
    test = str(write_jsonl(tmp_path / "test.jsonl", [chat("a", "b"), long, chat("or " * 40, "never asked")]))
    ledgers = list[Ledger]()
    monkeypatch.setattr(Ledger, "fitted", lambda self: ledgers.append(self) or self)
    monkeypatch.setattr(ledger, "private_bytes", lambda: 0)
    config = make_config(data__test=test, data__max_seq_len=200, eval__batch_size=50)
    fine_tune(config, quiet)
    check_data(config)
    tokens, _ = load_tokenizer(TOKENIZER).encode_chat(long["messages"][:1])
    assert [found.prompt for found in ledgers] == [len(tokens)] * 2
    assert ledgers[0].predict() == ledgers[1].predict()
    probes_only = make_config(data__validation=None, eval__batch_size=50)
    check_data(probes_only)
    assert ledgers[2].prompt > 0, "probes are answered without any held-out data, too"
    assert "KV cache" in ledgers[2].predict()


def test_one_sample_is_enough(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [chat("a", "b")])
    config = make_config(
        data__train=str(one), data__validation=None, train__max_steps=None, train__accumulate=3, train__epochs=1.0
    )
    run = fine_tune(config, quiet)
    assert run.n_steps == 1
    assert run.state.counters.target_tokens == 6 * run.train[0].n_targets, "the row is taken again to fill the step"
    assert run.folder.read_json("summary.json")["best_step"] is None, "nothing was validated"


def test_text_is_trained_on_too(make_config: MakeConfig, quiet: Quiet, data_folder: Path, tmp_path: Path) -> None:
    text = str(data_folder / "text.jsonl")
    held_out = str(write_jsonl(tmp_path / "held_out.jsonl", [{"text": "tomato"}]))
    run = fine_tune(make_config(data__train=text, data__validation=held_out, data__max_seq_len=2), quiet)
    assert "exact_match" not in run.before["metrics"]
    assert (run.folder.path / "samples.md").read_text().startswith("# Probes\n\n| prompt"), "and no empty table"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__train": ""}, "data.train is empty"),
        ({"data__max_seq_len": 2}, r"train.jsonl:1: the conversation takes \d+ positions, but data.max_seq_len is 2"),
        ({"data__max_seq_len": 2, "data__too_long": "skip"}, r"train.jsonl:1: .* more than data.max_seq_len, 2 "),
        ({"model__path": "/nowhere"}, "/nowhere"),
        ({"model__tokenizer": "/nowhere"}, "/nowhere"),
        ({"model__device": "cuda:99"}, "model.device 'cuda:99' cannot be used"),
        ({"lora__targets": ("lm_head",)}, "lora.targets names 'lm_head'"),
    ],
)
def test_what_the_user_can_mend(make_config: MakeConfig, quiet: Quiet, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        fine_tune(make_config(**changes), quiet)


@pytest.mark.parametrize("which", ["train", "validation", "test"])
def test_an_empty_file_is_named(make_config: MakeConfig, quiet: Quiet, tmp_path: Path, which: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.jsonl: the file holds no records"):
        fine_tune(make_config(**{f"data__{which}": str(tmp_path / "empty.jsonl")}), quiet)


def test_the_tokenizer_of_a_larger_model_is_refused(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    from dataclasses import replace

    small = tiny_model(config=replace(TINY, vocab_size=400))
    save_hf(small, tmp_path / "small", dtype=torch.float32, tokenizer=TOKENIZER)
    with pytest.raises(UserError, match=r"model: a v\d tokenizer of 458 pieces, but the model's vocabulary has 400; "):
        fine_tune(make_config(model__path=str(tmp_path / "small")), quiet)


def test_another_tokenizer_is_refused(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    """The same pieces, but two of them swapped: other ids for the same text."""
    interrupted(make_config)
    changed = bytearray(TOKENIZER.read_bytes())
    first, second = changed.index(b"\x0a\x01a"), changed.index(b"\x0a\x01b")
    changed[first + 2], changed[second + 2] = changed[second + 2], changed[first + 2]
    (tmp_path / "tokenizer.model").write_bytes(changed)
    with pytest.raises(UserError, match=r"tokenizer\.sha256 was '[0-9a-f]{64}' when the run began"):
        fine_tune(make_config(model__tokenizer=str(tmp_path / "tokenizer.model")), quiet, resume=True)


def test_a_run_in_which_nothing_could_be_learnt_does_not_say_done(
    make_config: MakeConfig, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: StepResult(math.nan, math.nan, False))
    with pytest.raises(UserError, match="no step could be taken"):
        fine_tune(make_config(train__max_steps=2, eval__every=100), quiet)
    assert not (Path(make_config().train.output) / "adapter").exists()


def test_a_resume_without_a_checkpoint_begins_with_what_it_says(make_config: MakeConfig, quiet: Quiet) -> None:
    config = make_config()
    fine_tune(config, quiet)
    folder = Path(config.train.output)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="finished, and its checkpoints are gone"):
        fine_tune(config, quiet, resume=True)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    (folder / "summary.json").unlink()  # as if it had been killed before its first checkpoint
    fine_tune(make_config(train__lr=0.005), quiet, resume=True)
    assert "lr = 0.005" in (folder / "config.toml").read_text()
