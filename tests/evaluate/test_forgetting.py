"""Forgetting: what is kept of the base, the distance to it by a naive loop, and runs that measure it all along."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, TOKENIZER, MakeConfig, Quiet, chat, tiny_model, write_jsonl

from minilora.checkpoint.load import load_model
from minilora.config import EvalConfig, RunConfig
from minilora.data.encode import Sample, read_samples
from minilora.errors import UserError
from minilora.evaluate.forgetting import Forgetting, read_probes
from minilora.evaluate.perplexity import mean_loss
from minilora.report.page import write_report
from minilora.tokenizer import load_tokenizer
from minilora.train.loop import fine_tune


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["a no", "ten ore mina", "sit in a mist", "not on", "inner most", "it is a term"]
    folder = tmp_path_factory.mktemp("general")
    return write_jsonl(folder / "general.jsonl", [{"text": t} for t in texts] + [chat("is it", "not so")])


@pytest.fixture(scope="module")
def samples(general: Path) -> list[Sample]:
    return read_samples(general, load_tokenizer(TOKENIZER), 64)


def naive_log_p(seed: int, samples: list[Sample]) -> torch.Tensor:
    """(targets, V): sample by sample through the whole model."""
    rows = []
    for sample in samples:
        with torch.no_grad():
            log_p = tiny_model(seed)(torch.from_numpy(sample.tokens[None, :-1]).long())[0].log_softmax(-1)
        rows.append(log_p[torch.from_numpy(sample.target_mask[1:])])
    return torch.cat(rows)


def forgetting_of(samples: list[Sample], config: RunConfig) -> Forgetting:
    return Forgetting(config, load_tokenizer(TOKENIZER), samples, [], tiny_model(0))


@pytest.mark.parametrize("n_tokens", [1, 7, 20, 1000])
def test_the_log_probabilities_are_those_of_the_first_targets(samples: list[Sample], n_tokens: int) -> None:
    wanted = naive_log_p(0, samples)[:n_tokens]
    # Rows so short that no two samples share one: then the order is the file's.
    data = replace(RunConfig().data, max_seq_len=max(s.length for s in samples))
    config = RunConfig(data=data, eval=replace(RunConfig().eval, general_tokens=n_tokens, batch_size=2))
    parts = [*forgetting_of(samples, config).log_probabilities(tiny_model())]
    kept, labels = map(torch.cat, zip(*parts, strict=True))
    assert kept.shape == wanted.shape
    assert max(len(log_p) for log_p, _ in parts) <= 64
    targets = [int(t) for s in samples for t in s.tokens[s.target_mask]][:n_tokens]
    assert (labels.tolist() if n_tokens < 1000 else sorted(labels.tolist())) == (
        targets if n_tokens < 1000 else sorted(targets)
    )
    assert sorted(kept.logsumexp(-1).abs().tolist())[-1] < 1e-5
    if n_tokens == 1000:  # all of them, in the order in which they were packed
        assert torch.allclose(kept.sum(0), wanted.sum(0), rtol=1e-5)


def test_kl_is_that_of_a_naive_loop_and_0_of_the_base_itself(samples: list[Sample]) -> None:
    config = RunConfig(eval=replace(RunConfig().eval, general_tokens=1000))
    measured = forgetting_of(samples, config)
    assert measured.report(tiny_model(0))["kl"] == 0.0
    p, q = naive_log_p(0, samples), naive_log_p(1, samples)
    report = measured.report(tiny_model(1))
    assert report["kl"] == pytest.approx(float((p.exp() * (p - q)).sum() / len(p)), rel=1e-5)
    assert report["kl_tokens"] == len(p) == sum(s.n_targets for s in samples)
    glance = measured.glance(tiny_model(1).train())
    assert glance["kl"] == report["kl"]
    assert glance["loss"] == pytest.approx(report["after"]["loss"], rel=1e-5), "all of the text is looked at here"
    assert glance["perplexity"] == pytest.approx(math.exp(glance["loss"]))
    assert report["before"]["loss"] == mean_loss(tiny_model(0), samples, 2048)
    assert report["after"]["loss"] == mean_loss(tiny_model(1), samples, 2048)
    assert report["after"]["perplexity"] == pytest.approx(math.exp(report["after"]["loss"]))


def test_without_a_general_text_nothing_is_measured() -> None:
    nothing = forgetting_of([], RunConfig())
    assert nothing.report(tiny_model()) == nothing.measure(tiny_model()) == nothing.glance(tiny_model()) == {}


def test_probes_are_lines_of_a_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    file = tmp_path / "probes.txt"
    file.write_text("\ufeffone\n\n  two \n", "utf-8")
    limits = EvalConfig(probes=str(file))
    probes = read_probes(limits, tokenizer)
    assert [p.where for p in probes] == [f"{file}:1", f"{file}:3"]
    assert probes[1].tokens.tolist() == tokenizer.encode_chat([{"role": "user", "content": "two"}])[0]
    assert len(read_probes(EvalConfig(), tokenizer)) == 8
    assert read_probes(replace(limits, samples=0), tokenizer) == []
    file.write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_probes(limits, tokenizer)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_probes(limits, tokenizer)
    with pytest.raises(UserError, match="No such file"):
        read_probes(EvalConfig(probes=str(tmp_path / "none.txt")), tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__strategy": "qlora"},
        {"train__strategy": "full"},
        {"train__strategy": "full", "train__reinit": "all"},
        {"train__strategy": "prefix", "train__prefix_tokens": 2},
    ],
    ids=["qlora", "full", "reinit", "prefix"],
)
def test_before_is_the_base_whatever_the_strategy(
    make_config: MakeConfig, quiet: Quiet, general: Path, samples: list[Sample], changes: dict[str, object]
) -> None:
    config = make_config(data__general=str(general), train__lr=3e-2, **changes)
    base = load_model(config.model.path, quantize=config.quantize, dtype=torch.float32)
    run = fine_tune(config, quiet)
    if config.train.reinit == "none":
        assert run.before["metrics"]["loss"] == pytest.approx(mean_loss(base, run.validation, 64), abs=1e-6)
    forgetting = run.folder.read_json("summary.json")["forgetting"]
    assert forgetting["before"]["loss"] == pytest.approx(mean_loss(base, samples, 64), abs=1e-6)
    assert forgetting["after"]["loss"] == mean_loss(run.model, samples, 64)
    assert forgetting["kl"] > 0.01
    lines = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert ["general_loss" in line for line in lines] == [False, True, False, True]


def test_it_is_measured_without_a_validation_too(make_config: MakeConfig, quiet: Quiet, general: Path) -> None:
    run = fine_tune(make_config(data__general=str(general), data__validation=None), quiet)
    lines = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"general_loss", "general_perplexity", "general_kl"}
    assert not lines[-1].keys() & {"val_loss"}


def test_probes_are_answered_before_and_after(make_config: MakeConfig, quiet: Quiet, tmp_path: Path) -> None:
    (tmp_path / "probes.txt").write_text("in a |\nnot so\n")
    run = fine_tune(make_config(eval__probes=str(tmp_path / "probes.txt")), quiet)
    before = run.folder.read_json("before.json")["probes"]
    table = (run.folder.path / "samples.md").read_text().split("# Probes")[1]
    assert "in a \\|" in table
    assert len(before) == 2
    assert TINY.vocab_size == run.model.config.vocab_size
    quiet_run = fine_tune(make_config(eval__samples=0, train__output=str(tmp_path / "other")), quiet)
    assert quiet_run.forgetting.probes == []
    assert (quiet_run.folder.path / "samples.md").read_text() == "", "there, without an empty table"
    assert "<h2>Samples" not in write_report(quiet_run.folder.path).read_text("utf-8")
