"""The verbs that use a base, with what was trained on it."""

import json
import shutil
import sys
import tomllib
from io import StringIO
from pathlib import Path

import pytest
import torch
from tiny_runs import TOKENIZER, MakeConfig, Run, chat, refused, tiny_model

from minilora.base import Base
from minilora.checkpoint.save import save_hf
from minilora.config import UNNAMED, BaseConfig
from minilora.evaluate import metrics
from minilora.generation import generate
from minilora.toml import config_toml


def test_evaluate_agrees_with_the_run(run: Run, finished: Path, data_folder: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    file, adapter = data_folder / "validation.jsonl", finished / "adapter"
    flags = ["--data.max_seq_len", 64, "--eval.answers", 2, "--eval.max_new_tokens", 4]
    status, out, err = run("evaluate", file, "--adapter", adapter, *flags)
    said = [line.partition(":")[0] for line in err.splitlines()]
    assert (status, said) == (0, ["device", "memory", "scoring 6 samples, answering 2 of them"])
    after = json.loads(out)
    assert after["quantization"]["type"] == "nf4"
    assert {k: after[k] for k in ("loss", "perplexity", "exact_match", "f1")} == summary["after"]
    base = tomllib.loads((finished / "config.toml").read_text())["model"]["path"]
    status, out, _ = run("evaluate", file, "--model.path", base, "--model.quantize", "nf4", *flags)
    assert json.loads(out)["loss"] == summary["before"]["loss"]
    assert after["loss"] < json.loads(out)["loss"]


def test_figures_are_shown_also_where_answers_cannot_be_written(
    run: Run, chats: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model.path", tiny_base, "--eval.answers", 1, "--eval.max_new_tokens", 2]
    below = chats / "below a file"
    refused(run("evaluate", chats, *given, "--out", below), 1, f"{below}: could not be written: a part of that path is")
    monkeypatch.setattr("minilora.checkpoint.write.check_new", lambda _: None)  # it becomes a file meanwhile
    status, out, err = run("evaluate", chats, *given, "--out", below)
    assert (status, json.loads(out)["answers"]) == (1, 1)
    assert "below a file: could not be written: a part of that path is a file" in err


def test_answers_are_scored_once(
    run: Run, chats: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, of_two = list[str](), metrics.token_f1

    def count(given: str, expected: str) -> float:
        scored.append(expected)
        return of_two(given, expected)

    monkeypatch.setattr(metrics, "token_f1", count)
    flags = ["--eval.answers", 3, "--eval.max_new_tokens", 2, "--out", tmp_path / "answers.jsonl"]
    figures = json.loads(run("evaluate", chats, "--model.path", tiny_base, *flags)[1])
    each = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["expected"] for answer in each] == scored
    assert figures["answers"] == len(scored) == 3
    assert figures["f1"] == pytest.approx(sum(answer["f1"] for answer in each) / 3)


def test_generate_answers(run: Run, finished: Path) -> None:
    adapter = finished / "adapter"
    status, out, err = run("generate", "a in", "--adapter", adapter, "--max_new_tokens", 5)
    assert (status, [line.partition(":")[0] for line in err.splitlines()]) == (0, ["device", "memory"])
    assert run("generate", "a in", "--adapter", adapter, "--max_new_tokens", 5)[1] == out
    drawn = [
        run("generate", "a in", "--adapter", adapter, "--temperature", 2, "--seed", seed, "--raw")[1]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def known_up_to(n: int, tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the base that says that it was trained on n positions."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "short"))
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": n}
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.filterwarnings("default")
def test_a_text_that_outgrows_the_model_is_one_line(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    base = known_up_to(4, tiny_base, tmp_path)
    status, _, err = run("generate", "a in b", "--model.path", base, "--max_new_tokens", 2)
    assert (status, err.count("\n")) == (0, 3), err
    assert err.endswith("warning: the text goes beyond the model's max_position_embeddings, 4\n")


def test_a_conversation_stays_within_what_the_model_knows(
    run: Run, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = known_up_to(24, tiny_base, tmp_path)
    monkeypatch.setattr(sys, "stdin", StringIO("a in\nb in\nc in\n"))
    status, _, err = run("chat", "--model.path", base, "--max_new_tokens", 8)  # a warning would be an error here
    assert status == 0
    assert "of at most 16: its oldest exchange is left out" in err


@pytest.mark.slow
def test_generate_prints_each_character_whole(run: Run, finished: Path) -> None:
    """Hot draws from the demo's pieces, most of them bytes: also what no character comes of is printed, once."""
    found = Base.find(BaseConfig(path=UNNAMED), str(finished / "adapter"))
    tokenizer, model, whole = found.tokenizer, found.load(), []
    for seed in range(5):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("a in")]])
        drawn = generate(model, ids, 64, 9.0, eos_id=tokenizer.eos_id, seed=seed)[0, ids.shape[1] :].tolist()
        flags = ["--raw", "--max_new_tokens", 64, "--temperature", 9.0, "--seed", seed]
        whole.append(tokenizer.decode(drawn))
        assert run("generate", "a in", "--adapter", finished / "adapter", *flags)[1] == whole[-1] + "\n"
    assert "\ufffd" in "".join(whole)


def test_a_validation_that_was_drawn_is_there_for_evaluate_and_merge(
    run: Run, make_config: MakeConfig, chats: Path, tmp_path: Path
) -> None:
    config = make_config(data__train=str(chats), data__validation="", data__validation_share=0.3, eval__answers=4)
    (tmp_path / "drawn.toml").write_text(config_toml(config))
    assert run("train", tmp_path / "drawn.toml")[0] == 0
    folder = Path(config.train.output)
    rows = {json.dumps(json.loads(line)) for line in (folder / "validation.jsonl").read_text().splitlines()}
    assert rows < {json.dumps(json.loads(line)) for line in chats.read_text().splitlines()}
    _, out, _ = run("evaluate", folder / "validation.jsonl", "--adapter", folder / "adapter", "--eval.answers", 0)
    after = json.loads((folder / "summary.json").read_text())["after"]
    assert json.loads(out)["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert "target tokens" in run("merge", folder / "adapter")[1]
    assert run("train", tmp_path / "drawn.toml", "--overwrite", "--data.validation_share", 0)[0] == 0
    assert not (folder / "validation.jsonl").exists()


def test_records_that_were_too_long_to_train_on(run: Run, make_config: MakeConfig, chats: Path, tmp_path: Path) -> None:
    """The run's own validation has none; a file that has is taken by merge, and by evaluate where it is told."""
    with chats.open("a") as file:
        file.writelines(json.dumps(chat(f"long {n}", "name it " * 2000)) + "\n" for n in range(12))
    config = make_config(data__train=str(chats), data__validation="", data__validation_share=0.5, data__too_long="skip")
    (tmp_path / "skip.toml").write_text(config_toml(config))
    assert run("train", tmp_path / "skip.toml")[0] == 0
    folder = Path(config.train.output)
    assert max(map(len, (folder / "validation.jsonl").read_text().splitlines())) < 1000
    assert run("merge", folder / "adapter")[0] == run("merge", folder / "adapter", "--text", chats)[0] == 0
    evaluate = ("evaluate", chats, "--adapter", folder / "adapter", "--eval.answers", 0)
    refused(run(*evaluate), 1, 'set data.too_long to "truncate" or "skip"')
    assert run(*evaluate, "--data.too_long", "skip")[0] == 0


def test_a_prefix_is_used_as_adapters_are_but_not_merged(
    run: Run, toml: Path, tmp_path: Path, data_folder: Path
) -> None:
    flags = ["--train.strategy", "prefix", "--model.quantize", "nf4", "--train.max_steps", "1"]
    assert run("train", toml, *flags)[0] == 0
    adapter, validation = tmp_path / "run" / "adapter", data_folder / "validation.jsonl"
    status, out, err = run("evaluate", validation, "--adapter", adapter, "--eval.max_new_tokens", 4)
    assert status == 0, err
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    assert json.loads(out)["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert run("generate", "ma", "--adapter", adapter, "--max_new_tokens", 3)[0] == 0
    refused(run("merge", adapter, tmp_path / "merged"), 1, "a prefix has no place in the weights")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base(run: Run, finished: Path, data_folder: Path, tmp_path: Path) -> None:
    save_hf(tiny_model(seed=5), tmp_path / "other", dtype=torch.float32, tokenizer=TOKENIZER)
    flags = ["--adapter", finished / "adapter", "--model.path", tmp_path / "other"]
    refused(run("generate", "a", *flags), 1, "trained on another base")
    refused(run("evaluate", data_folder / "validation.jsonl", *flags), 1, "another base")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "a", "--temperature", "-1"], ["temperature"]),
        (["generate", "a", "--top_p", "2"], ["top_p"]),
        (["generate", "a", "--top_k", "0"], ["top_k"]),
        (["generate", "a", "--seed", "-1"], ["seed"]),
        (["generate", "a", "--seed", str(2**63)], ["seed"]),
        (["generate", "a", "--max_new_tokens", "-1"], ["max_new_tokens"]),
        (["generate", "a", "--adapter", "nowhere"], ["nowhere"]),
        (["generate", "a", "--model.device", "nonsense"], ["nonsense"]),
        (["evaluate", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["evaluate", "VALIDATION", "--eval.batch_size", "0"], ["batch_size"]),
        (["evaluate", "VALIDATION", "--data.max_seq_len", "0"], ["max_seq_len"]),
        (["evaluate", "VALIDATION", "--data.max_seq_len", "2"], ["validation.jsonl:1", "max_seq_len"]),
        (["evaluate", "VALIDATION", "--eval.answers", "-1"], ["answers"]),
        (["merge", "nowhere", "out"], ["nowhere"]),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Run, tiny_base: Path, data_folder: Path, args: list[str], words: list[str]
) -> None:
    args = [str(data_folder / "validation.jsonl") if arg == "VALIDATION" else arg for arg in args]
    got = run(*args, "--model.path", tiny_base)
    assert got[0] in (1, 2)
    refused(got, got[0], *words)


@pytest.mark.parametrize(
    ("args", "where"),
    [
        *((["generate", "a", *flag], "at --temperature 0") for flag in (["--top_k=3"], ["--top_p=.5"], ["--seed=0"])),
        *((["generate", "a", flag], "without --adapter") for flag in ("--force", "--adapter_scaling=5")),
        *((["evaluate", "f", flag], "without --adapter") for flag in ("--force", "--adapter_scaling=5")),
    ],
)
def test_generate_and_evaluate_ignore_no_flag(run: Run, args: list[str], where: str) -> None:
    refused(run(*args), 2, f"{args[2].partition('=')[0]} does nothing {where}; leave it out")


def test_an_adapter_whose_provenance_names_no_base(run: Run, finished: Path, tmp_path: Path) -> None:
    for base in (None, ""):
        adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
        said = json.loads((finished / "adapter/minilora.json").read_text()) | {"base_path": base}
        (adapter / "minilora.json").write_text(json.dumps(said))
        refused(run("generate", "a", "--adapter", adapter), 1, "does not say where its base lies", "--model.path")


def test_an_adapter_that_names_no_base_wants_one(run: Run, finished: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((finished / "adapter" / name).read_bytes())
    refused(run("generate", "a", "--adapter", foreign), 1, "--model.path")
