"""What the ledger predicts against every byte that a real step takes, as benchmarks/watch.py sees them."""

from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import step_of

from benchmarks import ledger
from benchmarks.feeds import random_batch
from benchmarks.ledger import CLOSE, Cell, _step, main, one_step, random_model, run_config
from benchmarks.shapes import SHAPES, shape
from benchmarks.watch import StepWatch
from minilora import scratch
from minilora.config import BaseConfig, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from minilora.data.pack import PackedBatch
from minilora.errors import UserError
from minilora.evaluate.perplexity import loss_sum
from minilora.fused import Keep
from minilora.model import Mistral
from minilora.train.ledger import Ledger
from minilora.train.setup import optimizer_for
from minilora.train.strategies import apply_strategy, trainable
from minilora.visible import Runs

pytestmark = pytest.mark.slow
AT_REST = (
    "linear weights", "packed weights", "absmax", "embeddings, head, norms", "adapters", "gradients", "optimizer"
)  # fmt: skip
FEW = 512  # words: with the shape's own the head's bytes would hide what else is predicted wrongly


def assert_predicted(predicted: dict[str, int], measured: dict[str, int]) -> None:
    """What is there between steps to the byte, all that a step adds to it in sum."""
    of_step = []
    for found in (predicted, measured):
        found = dict(found)
        of_step.append([found.pop(owner, 0) for owner in AT_REST])
        of_step[-1].append(sum(found.values()))
    (*rest, ours), (*at_rest, all_of_it) = of_step
    assert rest == at_rest
    assert abs(ours / all_of_it - 1) <= CLOSE, (predicted, measured)


def test_help_names_each_shape_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert f"{{{','.join(['demo', *SHAPES])}}}" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("shapes", [[], ["demo", "135m"]])
def test_a_model_is_of_one_shape(shapes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "demo", *(word for name in shapes for word in ("--shape", name))])


def test_a_model_of_another_shape_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="demo: dim is"):
        one_step(asdict(Cell("tiny", 1, 32, "float32")), "demo")
    monkeypatch.setattr(ledger, "measure", lambda *_: pytest.fail("measured"))
    out = tmp_path / "ledger.json"
    for model, words in (("demo", "--shape tiny has 64"), (str(tmp_path / "typo"), "typo")):
        assert main(["--shape", "tiny", "--model", model, "--out", str(out)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("ledger: ")
        assert words in err
        assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("dtype", "keep", "rows", "n_words"),
    [*product(["float32", "bfloat16"], Keep, [1, 4], [FEW]), ("float32", Keep.ALL, 4, shape("tiny").vocab_size)],
)
def test_a_step_takes_what_was_predicted(dtype: str, keep: Keep, rows: int, n_words: int) -> None:
    cell = Cell("tiny", rows, 256, dtype, keep.name)
    sizes = replace(shape(cell.shape), vocab_size=n_words)
    predicted = cell.ledger(sizes).predict()
    assert predicted.pop("process") > 0
    scratch._held.__dict__.clear()  # of larger models that were here before
    step = _step(cell, random_model(sizes, getattr(torch, dtype)))
    step()
    measured, _ = step()
    assert_predicted(predicted, measured)
    assert measured.keys() >= {"attention", "residual stream"} | ({"adapter inputs"} if keep > Keep.INPUT else set())
    assert measured.get("decoded weights") == predicted.get("decoded weights")


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.ALL])
@pytest.mark.parametrize(("window", "packed"), [(100, ()), ((None, 300), ()), (100, (30, 20)), (None, (30, 20))])
def test_under_a_window_and_of_short_samples_too(window: Any, packed: tuple[int, ...], keep: Keep) -> None:
    """Rows that the window cuts, and rows of samples that share a piece: no mask has as many entries as T x T."""
    rows, length = 2, 1200
    cell = Cell("tiny", rows, length, "float32", keep.name)
    sizes = replace(shape("tiny"), sliding_window=window, vocab_size=FEW)
    batch = random_batch(rows, length, sizes.vocab_size)
    if packed:
        each = torch.tensor(packed * (length // sum(packed)))
        batch.positions[:] = torch.cat([torch.arange(int(n)) for n in each])
        batch.segments[:] = torch.repeat_interleave(torch.arange(len(each)), each)
        stops = torch.cat([torch.zeros(1), each.repeat(rows).cumsum(0)]).int()
        batch = replace(batch, runs=Runs(stops, max(packed)))
    ledger = Ledger(run_config(cell), sizes, torch.device("cpu"), batch, length, cell.kept(sizes))
    predicted = {owner: n for owner, n in ledger.predict().items() if owner != "process"}
    assert 0 < ledger._plan().masks < 4 * length * length / 2
    scratch._held.__dict__.clear()
    model = apply_strategy(random_model(sizes, torch.float32), run_config(cell), cell.kept(sizes)).train()
    optimizer = optimizer_for(trainable(model), run_config(cell))
    for _ in range(2):
        with StepWatch(model, optimizer) as watch:
            step_of(model, optimizer, [batch])
    measured = watch.owners()
    assert_predicted(predicted, measured)
    if keep == Keep.ALL:  # else it is made again in backward, and counts as scratch
        assert abs(predicted["attention"] / measured["attention"] - 1) <= CLOSE


STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "full"},
    {"strategy": "full", "activation_checkpointing": True},
    {"strategy": "partial", "layers": 1},
    {"strategy": "partial", "layers": 1, "activation_checkpointing": True},
    {"strategy": "partial", "parameters": ("lm_head", "norm")},
    {"strategy": "partial", "parameters": ("embed_tokens", "layers.1.mlp")},
    {"strategy": "lora", "dora": True},
    {"strategy": "qlora", "dora": True, "dtype": "bfloat16"},
    {"strategy": "qlora", "dora": True, "activation_checkpointing": True},
    {"strategy": "lora", "modules_to_save": ("lm_head",)},
    {"strategy": "qlora", "modules_to_save": ("embed_tokens", "norm"), "activation_checkpointing": True},
    {"strategy": "qlora", "modules_to_save": ("embed_tokens", "lm_head")},
    {"strategy": "qlora", "modules_to_save": ("input_layernorm", "post_attention_layernorm")},
    {"strategy": "lora", "targets": r".*\.1\..*_proj", "rank_pattern": {"up_proj": 64}},
    {"strategy": "prefix"},
    {"strategy": "prefix", "quantize": "nf4", "prefix_tokens": 100, "dtype": "bfloat16"},
    {"strategy": "prefix", "activation_checkpointing": True},
]


@pytest.mark.parametrize(
    ("settings", "tied"), [*((each, False) for each in STRATEGIES), *((STRATEGIES[i], True) for i in (0, 2, 5))]
)
def test_every_strategy_takes_what_was_predicted(settings: dict[str, Any], tied: bool) -> None:
    assert_step(settings, replace(shape("tiny"), tied_embeddings=tied, vocab_size=FEW))


SAVED = {"strategy": "qlora", "modules_to_save": ("embed_tokens",)}


@pytest.mark.parametrize("settings", [SAVED, SAVED | {"dtype": "bfloat16"}, STRATEGIES[5]])
def test_of_a_short_row_a_large_embedding_s_gradient_is_the_most(settings: dict[str, Any]) -> None:
    assert_step(settings, replace(shape("tiny"), dim=256, vocab_size=8192), 1, 64)


WIDE: list[dict[str, Any]] = [{"strategy": "qlora"}, {"strategy": "qlora", "activation_checkpointing": True}]
WIDE += [{"strategy": "full"}, {"strategy": "prefix"}]


@pytest.mark.parametrize("settings", WIDE)
def test_attention_that_is_wider_than_the_mlp_is_the_most(settings: dict[str, Any]) -> None:
    assert_step(settings, replace(shape("tiny"), hidden_dim=64, n_heads=16, n_kv_heads=4, head_dim=64, vocab_size=FEW))


def assert_step(settings: dict[str, Any], sizes: ModelConfig, rows: int = 4, length: int = 256) -> None:
    ledger, model, batch = made(settings, sizes, rows, length)
    predicted = {owner: n for owner, n in ledger.predict().items() if owner != "process"}
    optimizer = optimizer_for(trainable(model.train()), ledger.config)
    for _ in range(2):
        with StepWatch(model, optimizer) as watch:
            step_of(model, optimizer, [batch])
    assert_predicted(predicted, watch.owners())


def made(settings: dict[str, Any], sizes: ModelConfig, rows: int, length: int) -> tuple[Ledger, Mistral, PackedBatch]:
    """A ledger, the model that it is of, and a batch; settings: keys of all sections."""
    keys = dict(settings)
    base = {"dtype": keys.pop("dtype", "float32"), "quantize": keys.pop("quantize", "auto")}
    of_lora = {f.name for f in fields(LoraConfig)} & keys.keys()
    lora = LoraConfig(**{"rank": 16, **{name: keys.pop(name) for name in of_lora}})
    train = TrainConfig(batch_size=rows, **keys)
    run = RunConfig(BaseConfig(**base), lora, DataConfig(max_seq_len=length), train)
    batch = random_batch(rows, length, sizes.vocab_size)
    scratch._held.__dict__.clear()
    if run.quantize:
        model = random_model(sizes, getattr(torch, base["dtype"]))
    else:
        model = Mistral(sizes)
        model.init_weights(0)
    ledger = Ledger(run, sizes, torch.device("cpu"), batch, length)
    return ledger, apply_strategy(model.requires_grad_(False), run), batch


@pytest.mark.parametrize("settings", [{"strategy": "qlora"}, {"strategy": "prefix"}, {"strategy": "full"}])
def test_a_loss_without_gradients_takes_what_was_predicted(settings: dict[str, Any]) -> None:
    sizes = replace(shape("tiny"), dim=256, hidden_dim=896, n_heads=4, n_kv_heads=1, head_dim=64, vocab_size=FEW)
    ledger, model, batch = made(settings, sizes, 8, 256)
    optimizer = optimizer_for(trainable(model.eval()), ledger.config)
    for _ in range(2):
        with torch.no_grad(), StepWatch(model, optimizer) as watch:
            loss_sum(model, batch)
    measured = watch.owners()
    at_rest = sum(measured.pop(owner, 0) for owner in AT_REST)
    assert at_rest > 0
    assert abs(sum(ledger._plan().forward_bytes().values()) / sum(measured.values()) - 1) <= CLOSE
