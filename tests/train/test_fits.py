"""A run that does not fit is refused in one line, before a weight is loaded, with settings that are enough."""

import re
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.feeds import random_batch
from benchmarks.shapes import shape
from minilora.adamw import PAGE, state_bytes
from minilora.config import BaseConfig, DataConfig, EvalConfig, LoraConfig, RunConfig, TrainConfig
from minilora.data.encode import Sample
from minilora.errors import UserError
from minilora.fused import Keep
from minilora.train import ledger
from minilora.train.ledger import SPARE, Ledger, ledger_of, predict_on_gpu

RUN = RunConfig(
    model=BaseConfig(dtype="float32"),
    lora=LoraConfig(rank=16),
    data=DataConfig(max_seq_len=512),
    train=TrainConfig(batch_size=4),
)


SIZES = replace(shape("135m"), n_layers=6)  # as each prediction takes as long as the model has layers


def of(run: RunConfig, longest: int = 100) -> Ledger:
    batch = random_batch(run.train.batch_size, run.data.max_seq_len, SIZES.vocab_size)
    return Ledger(run, SIZES, torch.device("cpu"), batch, longest)


def total(run: RunConfig) -> int:
    return sum(of(run).predict().values())


def least(run: RunConfig) -> int:
    """With every block's input alone kept for backward."""
    return total(replace(run, train=replace(run.train, activation_checkpointing=True)))


def changed(**sections: dict[str, Any]) -> RunConfig:
    return replace(RUN, **{name: replace(getattr(RUN, name), **values) for name, values in sections.items()})


def refusal(monkeypatch: pytest.MonkeyPatch, run: RunConfig, free: float, longest: int = 100) -> str:
    monkeypatch.setattr(ledger, "free_bytes", lambda _: free)
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)  # else it moves between two predictions
    with pytest.raises(UserError) as error:
        of(run, longest).check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_on_a_gpu_blocks_keep_what_leaves_some_of_the_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what its allocator rounds up and libraries take; a run that fits without that is not refused."""
    run = replace(changed(model={"dtype": "bfloat16"}), train=replace(RUN.train, batch_size=16))
    here = replace(of(run), sizes=shape("135m"), device=torch.device("cuda"), flash=True)
    most, fewest = (sum(replace(here, keep=(keep,) * 30).predict().values()) for keep in (Keep.ALL, Keep.INPUT))
    free = (most + fewest) / 2
    monkeypatch.setattr(ledger, "free_bytes", lambda _: free)
    kept = sum(here.fitted().predict().values())
    assert (1 - 2 * SPARE) * free < kept <= (1 - SPARE) * free
    monkeypatch.setattr(ledger, "free_bytes", lambda _: fewest)
    assert sum(here.fitted().check().values()) == fewest


def test_runs_are_those_of_the_fullest_rows() -> None:
    """And of what is left of each; a smaller batch has its share of them. Recorded steps have some power of two, less
    one."""
    samples = [Sample(np.ones(5, np.int32), np.ones(5, bool), "f")] * 10
    data: Any = SimpleNamespace(learnt=samples, samples={key: [] for key in ("validation", "test", "general")})
    sampler: Any = SimpleNamespace(rows=[[0], [1, 2, 3], [4], [5, 6, 7, 8]])
    run = changed(model={"dtype": "bfloat16"}, train={"batch_size": 2}, data={"max_seq_len": 64})
    here = ledger_of(run, SIZES, torch.device("cuda"), data, [], sampler)
    assert here.runs == (3 + 1) + (4 + 1)
    for size, noise, expected in ((2, 0.0, 15), (1, 0.0, 7), (2, 5.0, 9), (1, 5.0, 5)):
        train = replace(run.train, batch_size=size, neftune_alpha=noise)
        assert replace(here, config=replace(run, train=train), flash=True)._plan().runs == expected


def test_what_fits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    monkeypatch.setattr(ledger, "free_bytes", lambda _: total(RUN))
    assert sum(of(RUN).check().values()) == total(RUN)


def test_the_mildest_form_of_each_setting_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    half = changed(train={"batch_size": 2, "accumulate": 2})
    said = refusal(monkeypatch, RUN, total(half))
    assert said.startswith(f"the run needs {ledger.as_text(total(RUN))} of memory, {ledger.as_text(total(half))} are")
    assert "train.batch_size 2 and train.accumulate 2" in said
    assert "data.max_seq_len 256" in said
    assert "train.batch_size 1" not in said
    assert "max_seq_len 128" not in said


@pytest.mark.parametrize(
    ("key", "value", "smaller"),
    [
        ("train.batch_size", "1 and train.accumulate 4", changed(train={"batch_size": 1, "accumulate": 4})),
        ("data.max_seq_len", "128", changed(data={"max_seq_len": 128})),
        ("lora.rank", "4", changed(lora={"rank": 4})),
        ("model.dtype", "bfloat16", changed(model={"dtype": "bfloat16"})),
    ],
)
def test_each_setting_makes_it_fit_as_it_says(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, smaller: RunConfig
) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    said = refusal(monkeypatch, RUN, least(smaller))
    assert f"{key} {value} ({ledger.as_text(least(smaller))})" in said
    # and one byte less is too little for it
    assert f"{key} {value} (" not in refusal(monkeypatch, RUN, least(smaller) - 1)


def test_adapters_without_a_fast_block_are_told_of_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    dora = changed(lora={"dora": True})
    said = refusal(monkeypatch, dora, least(dora))
    assert f"train.activation_checkpointing true ({ledger.as_text(least(dora))})" in said
    assert of(dora).fitted().keep == ()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_no_more_is_made_again_than_must(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Anything between everything and the inputs alone can be had; one step of one block more would not fit."""
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    free = least(RUN) + share * (total(RUN) - least(RUN))
    monkeypatch.setattr(ledger, "free_bytes", lambda _: free)
    fitted = of(RUN).fitted()
    assert sum(fitted.check().values()) <= free
    if share < 1:
        n_steps = sum(Keep.ALL - keep for keep in fitted.keep)
        assert 0 < n_steps <= 3 * 6
        assert sum(of(RUN)._keeping(n_steps - 1).predict().values()) > free
        assert fitted.kept().startswith("kept for backward: ")
    else:
        assert set(fitted.keep) == {Keep.ALL}
        assert fitted.kept() == ""


def test_plentiful_memory_keeps_the_decoded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free is plentiful. A base that is not in NF4 has nothing to decode."""
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    ample = replace(of(RUN), keep=(Keep.WEIGHTS,) * 6)
    assert sum(ample.predict().values()) == total(RUN) + 4 * 6 * 3_538_944  # the linear weights of a block
    for free, keep in ((2 * ample._total(), Keep.WEIGHTS), (2 * ample._total() - 1, Keep.ALL)):
        monkeypatch.setattr(ledger, "free_bytes", lambda _, free=free: free)
        assert set(of(RUN).fitted().keep) == {keep}
    monkeypatch.setattr(ledger, "free_bytes", lambda _: inf)
    assert of(RUN).fitted().kept() == "kept for backward: weights of 6 blocks"
    assert set(of(changed(train={"strategy": "lora"})).fitted().keep) == {Keep.ALL}


def test_a_row_is_not_made_shorter_than_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for longest, is_advised in ((100, True), (400, False)):
        assert ("data.max_seq_len" in refusal(monkeypatch, RUN, 650e6, longest)) == is_advised


def test_a_plain_base_is_told_of_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    plain = changed(train={"strategy": "lora"}, model={"quantize": "none"})
    packed = changed(train={"strategy": "qlora"})
    assert total(packed) < total(plain)
    assert f"train.strategy qlora ({ledger.as_text(total(packed))})" in refusal(monkeypatch, plain, total(packed))


OTHERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"strategy": "full", "reinit": "all"}, ["train.strategy qlora", "train.batch_size 1"]),
    ({"strategy": "partial", "layers": 4, "reinit": "top:2"}, ["train.layers 2", "train.strategy qlora"]),
    ({"strategy": "partial", "layers": 2, "parameters": ("lm_head",)}, ["train.layers 1", "train.strategy qlora"]),
    ({"strategy": "prefix"}, ["model.quantize nf4", "model.dtype bfloat16", "train.prefix_tokens 1"]),
]


@pytest.mark.parametrize(("train", "keys"), OTHERS)
def test_every_strategy_is_told_what_would_help_it(
    monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], keys: list[str]
) -> None:
    """And of no key that it does not have."""
    said = refusal(monkeypatch, changed(train=train), 1e6)
    assert said.startswith("the run needs")
    assert all(key in said for key in keys)
    assert ("model.dtype" in said) == (train["strategy"] == "prefix")
    assert ("train.layers" in said) == (train["strategy"] == "partial")


def test_what_learns_less_takes_less() -> None:
    def of_strategy(**train: Any) -> int:
        return total(changed(train=train))

    full, top = of_strategy(strategy="full"), of_strategy(strategy="partial", layers=2)
    head = of_strategy(strategy="partial", layers=2, parameters=("norm",))
    assert of_strategy(strategy="partial", layers=1) < top < head < full
    plain = total(changed(train={"strategy": "lora"}))
    assert plain < total(changed(train={"strategy": "lora"}, lora={"dora": True}))
    assert of_strategy(strategy="prefix") < of_strategy(strategy="prefix", prefix_tokens=512)


def test_huge_settings_are_refused_at_once_each_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion rows have 99 smaller divisors; looking for them one by one would take minutes."""
    huge = changed(lora={"rank": 2**31 - 1}), changed(data={"general": "g.jsonl"}, eval={"general_tokens": 2**31 - 1})
    for run, key in zip(huge, ("lora.rank", "eval.general_tokens"), strict=True):
        assert re.search(rf"it fits with {key} \d+ \([0-9.]+ GB\)$", refusal(monkeypatch, run, 20e9))
    monkeypatch.setattr(
        ledger, "range", lambda *ends: range(*ends) if max(ends) < 10**6 else pytest.fail("too many"), raising=False
    )
    batch = of(RUN).first
    wide = Ledger(changed(train={"batch_size": 10**9}), SIZES, torch.device("cpu"), batch, 100)
    tried = [changes["train"] for key, _, changes in wide._smaller() if key == "train.batch_size"]
    assert len(tried) == 99
    assert {t["batch_size"] * t["accumulate"] for t in tried} == {10**9}


def test_what_no_setting_can_help(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, RUN, 300e6)
    found = re.search(r"even (.*) comes to (.*), too much still: take a smaller model$", said)
    assert found
    assert all(key in found[1] for key in ("batch_size 1", "max_seq_len 128", "dtype bfloat16"))


def test_the_optimizer_s_state() -> None:
    """All weights learn: 8 bytes a number or 2 + 8/256; on a GPU, paged, two pages of it."""
    full = changed(train={"strategy": "full"})
    n, sizes = SIZES.n_parameters, SIZES
    for changes, expected in (
        ({}, 8 * n),
        ({"optimizer": "adamw_8bit"}, 2 * n + 8 * -(-n // 256)),
        ({"paged": True}, 8 * 2 * PAGE),
        ({"paged": True, "optimizer": "adamw_8bit"}, 2 * 2 * PAGE + 8 * 2 * PAGE // 256),
    ):
        run = replace(full, train=replace(full.train, **changes))
        assert predict_on_gpu(run, sizes)["optimizer"] == expected
    assert of(replace(full, train=replace(full.train, paged=True))).predict()["optimizer"] == 8 * n


def test_decoding_ahead_takes_memory_for_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in bfloat16; these are there when the logits are, too, where the step is largest. On a CPU none is."""
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    runs = [changed(model={"dtype": "bfloat16"}, train={"decode_ahead": ahead}) for ahead in (False, True)]
    sizes = SIZES
    plain, ahead = (predict_on_gpu(run, sizes) for run in runs)
    assert ahead["scratch"] - plain["scratch"] == 2 * 2 * sizes.dim * sizes.hidden_dim
    assert {**ahead, "scratch": 0} == {**plain, "scratch": 0}
    assert of(runs[0]).predict() == of(runs[1]).predict()
    on_card = replace(of(runs[1]), device=torch.device("cuda"), flash=True)
    plan, plan_ahead = replace(on_card._plan(), ahead=False), on_card._plan()
    assert plan_ahead.forward_bytes() == plan.forward_bytes()
    decoded = [p.decoded_bytes() for p in (plan, plan_ahead)]
    assert decoded == [2 * sizes.dim * sizes.hidden_dim, 0], "it lies in one of the two"
    monkeypatch.setattr(ledger, "free_bytes", lambda _: sum(on_card.predict().values()) - 1)
    with pytest.raises(UserError, match=r"train\.decode_ahead false"):
        on_card.check()


@pytest.mark.parametrize("changes", [{"train": {"strategy": "lora"}}, {"train": {"strategy": "full"}}, {}])
def test_nothing_is_decoded_ahead_where_nothing_is_decoded(
    changes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain weights; those that memory holds decoded; and on a CPU."""
    train = changes.get("train", {}) | {"decode_ahead": True}
    run = changed(model={"dtype": "auto" if train.get("strategy") == "full" else "bfloat16"}, train=train)
    monkeypatch.setattr(ledger, "free_bytes", lambda _: 1e12)
    on_card = replace(of(run), device=torch.device("cuda"), flash=True)
    assert on_card.decodes_ahead == (not changes)
    assert not on_card.fitted().decodes_ahead
    assert not of(run).decodes_ahead


def test_a_smaller_state_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    full, coded = (changed(train={"strategy": "full", "optimizer": kind}) for kind in ("adamw", "adamw_8bit"))
    said = refusal(monkeypatch, full, total(coded))
    assert f"train.optimizer adamw_8bit ({ledger.as_text(total(coded))})" in said
    assert "train.paged" not in said, "there is no GPU that it would unburden"
    assert "train.optimizer" not in refusal(monkeypatch, coded, 1e9)


def test_on_a_gpu_paging_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace(of(changed(model={"dtype": "float32"}, train={"strategy": "full"})), device=torch.device("cuda"))
    paged = full._with({"train": {"paged": True}})
    free = sum(paged.predict().values())
    monkeypatch.setattr(ledger, "free_bytes", lambda _: free)
    with pytest.raises(UserError, match=rf"train\.paged true \({re.escape(ledger.as_text(free))}\)"):
        full.check()


def test_a_paged_state_must_fit_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = changed(model={"dtype": "float32"}, train={"strategy": "full", "paged": True})
    monkeypatch.setattr(ledger, "free_bytes", lambda device: 1e12 if device.type == "cuda" else 1e9)
    monkeypatch.setattr(ledger, "private_bytes", lambda: 100_000_000)
    on_card = replace(of(paged), device=torch.device("cuda"))
    message = r"^for train.paged 1.07 GB of the host's memory are needed, 900.0 MB are free: .*adamw_8bit"
    with pytest.raises(UserError, match=message):
        on_card.check()
    coded = replace(paged, train=replace(paged.train, optimizer="adamw_8bit"))
    assert replace(on_card, config=coded).check()["optimizer"] == state_bytes("adamw_8bit", 2 * PAGE)


def test_what_the_base_says_must_fit_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    run = changed(data={"general": "general.jsonl"}, eval={"general_tokens": 10_000})
    said = 4 * of(run).sizes.vocab_size * 10_000
    monkeypatch.setattr(ledger, "private_bytes", lambda: 100_000_000)
    for free, fits in ((said + 100_000_000, True), (said + 99_999_999, False)):
        monkeypatch.setattr(ledger, "free_bytes", lambda device, free=free: 1e12 if device.type == "cuda" else free)
        on_card = replace(of(run), device=torch.device("cuda"))
        if fits:
            on_card.check()
        else:
            with pytest.raises(UserError, match=r"^for eval.general_tokens .* are needed, .*: set a smaller"):
                on_card.check()
    replace(on_card, general=9_999).check()  # a text may have fewer
    assert replace(of(run), general=10).predict()["base's predictions"] == 40 * SIZES.vocab_size


def test_evaluation_counts_where_it_takes_more_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "private_bytes", lambda: 300_000_000)
    step = changed(train={"batch_size": 1, "activation_checkpointing": True})
    validated = replace(step, data=replace(step.data, validation="held_out.jsonl"), eval=EvalConfig(batch_size=32))
    assert total(validated) > total(step)
    smaller = replace(validated, eval=EvalConfig(batch_size=16))
    assert f"eval.batch_size 16 ({ledger.as_text(total(smaller))})" in refusal(monkeypatch, validated, total(smaller))
