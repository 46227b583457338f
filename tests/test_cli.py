"""The command line: exit codes, one line for what is wrong, and nothing heavy before it is needed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import torch
from jsonargparse import ArgumentParser
from tiny_runs import TOKENIZER, MakeConfig, Run, chat, tiny_model, write_jsonl
from transformers import MistralForCausalLM

from minilora import arguments
from minilora.arguments import PATHS, quoted
from minilora.base import Base
from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.cli import VERBS, exit_status
from minilora.config import UNNAMED, BaseConfig, LoraConfig, RunConfig, base_folder, to_dict
from minilora.data.sources import FILE_KEYS
from minilora.errors import UserError
from minilora.evaluate import metrics
from minilora.generation import generate
from minilora.lora import add_lora
from minilora.train import ledger, loop
from minilora.train.run_folder import config_toml
from minilora.verbs.terminal import console


def refused(result: tuple[int, str, str], status: int, *words: str) -> None:
    """The exit status, and one line on stderr that has these words in it."""
    got, out, err = result
    assert got == status, (out, err)
    assert err.count("\n") == 1, err
    assert len(err) < 400, err
    for word in words:
        assert word in err


@pytest.fixture
def toml(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A configuration of a run of 4 steps."""
    path = tmp_path / "run.toml"
    path.write_text(config_toml(make_config()))
    return path


# --- Usage ----------------------------------------------------------------------------------------------------------


def test_the_verbs_are_listed(run: Run) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for verb in VERBS:
        assert re.search(rf"^  {verb} +[A-Z]", out, re.MULTILINE), verb
    assert run()[0] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run: Run, verb: str) -> None:
    status, out, err = run(verb, "--help")
    assert (status, err) == (0, "")
    assert f"minilora {verb}" in out
    assert (VERBS[verb].__doc__ or "").split(":")[0].split()[0] in out


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"minilora {version('minilora')}\n", "")


def test_what_is_no_terminal_is_wide_enough_for_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == 200
    monkeypatch.setenv("COLUMNS", "70")
    assert console().width == 70
    monkeypatch.setenv("COLUMNS", "0")
    assert console().width == 200


def test_an_unknown_verb(run: Run) -> None:
    refused(run("tarin"), 2, "no verb 'tarin'", "train")


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag(run: Run, verb: str, toml: Path) -> None:
    two, one = ["a", "b"], {"train": toml, "evaluate": "f", "generate": "p", "verify": "kernels", "data": "check"}
    needed = {"merge": two, "quantize": two}.get(verb, [one[verb]] if verb in one else [])
    refused(run(verb, *needed, "--nonsense", "3"), 2, f"minilora {verb}:", "nonsense", "--help")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora.rnak", "3"], ["lora.rnak"]),
        (["--lora.rank", "many"], ["rank"]),
        (["--train.strategy", "magic"], ["strategy", "qlora"]),
        (["--train.lr"], ["lr"]),
        (["--train.lr", "1" + "0" * 400], ["int too large to convert to float"]),
    ],
)
def test_a_wrong_flag_of_train(run: Run, toml: Path, flags: list[str], words: list[str]) -> None:
    refused(run("train", toml, *flags), 2, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora.rank", "0"], ["lora.rank is 0"]),
        (["--train.seed", "-1"], ["train.seed is -1"]),
        (["--train.seed", str(2**63)], ["train.seed is 9223372036854775808"]),
        (["--train.lr", "-1"], ["train.lr is -1"]),
        (["--data.max_seq_len", "1"], ["data.max_seq_len is 1"]),
        (["--train.strategy", "full", "--model.quantize", "nf4"], ["train.strategy", "model.quantize"]),
        (["--train.strategy", "full", "--lora.dora", "true"], ["lora.dora is for lora and qlora"]),
        (["--train.reinit", "top:x"], ["train.reinit is 'top:x'"]),
        (["--train.strategy", "partial"], ["needs train.layers"]),
    ],
)
def test_a_value_out_of_range(run: Run, toml: Path, flags: list[str], words: list[str]) -> None:
    got = run("train", toml, *flags)
    refused(got, got[0], *words)
    assert got[0] in (1, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[lora]\nrnak = 3\n", ["rnak"]),
        ("[lroa]\nrank = 3\n", ["lroa"]),
        ("rank = 3\n", ["rank"]),
        ('[lora]\nrank = "many"\n', ["rank"]),
        ("[lora]\nrank = 0\n", ["lora.rank is 0"]),
        ("[lora\n", []),
        ("[lora]\nrank = 3\nrank = 4\n", []),
        ("\x00", []),
        ("x = " + "[" * 100_000, ["recursion"]),
        (f"[train]\nlr = 1{'0' * 400}\n", ["int too large to convert to float"]),
    ],
)
def test_a_wrong_file_is_named_with_its_key(run: Run, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    refused(run("train", path), 1, "wrong.toml", *words)


NUMBER, LIST = "but must be a whole number", "but must be a list such as [a,b]"
NO_KEY = "there is no key"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--train.max_steps", "x"], f"train.max_steps is x, {NUMBER}"),
        (["train", "--train.lr", "abc"], "train.lr is abc, but must be a number"),
        (["train", "--eval.every", "1.5"], f"eval.every is 1.5, {NUMBER}"),
        (["train", "--train.strategy", "lra"], "train.strategy is lra, but must be one of 'qlora', 'lora',"),
        (["train", "--train.paged", "maybe"], "train.paged is maybe, but must be true or false"),
        (["train", "--eval.metrics", "f1"], f"eval.metrics is f1, {LIST}"),
        (["train", "--lora.rank_pattern", "3"], "lora.rank_pattern is 3, but must be a table"),
        (["train", "--model", "x"], "model is a section, and 'x' no TOML file of it; name a key, as in --model.KEY"),
        (["generate", "hi", "--max_new_tokens", "0"], "max_new_tokens is 0, but must be >0"),
        (["generate", "hi", "--max_new_tokens", "x"], f"max_new_tokens is 'x', {NUMBER}"),
        (["generate", "hi", "--temperature", "x"], "temperature is 'x', but must be a number"),
        (["generate", "hi", "--top_p", "2"], "top_p is 2, but must be >0 and <=1"),
        (["generate", "hi", "--seed", "-1"], f"seed is -1, but must be >=0 and <{2**63}"),
        (["verify", "resume", "--steps", "1"], "steps is 1, but must be >=2 and <2147483648"),
        (["explain", "--weights", "[1,a]"], f"weights is [1,a], {LIST}"),
    ],
)
def test_a_value_of_another_type_is_told_in_words_of_ours(run: Run, args: list[str], words: str) -> None:
    got = run(*args)
    refused(got, 2)
    verb = " ".join(args[: 2 if args[0] == "verify" else 1])
    assert got[2].startswith(f"minilora {verb}: {words}")
    assert got[2].endswith(f"; see minilora {verb} --help\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[train]\nmax_steps = "x"\n', f"train.max_steps is x, {NUMBER}"),
        ("[train]\nlr = true\n", "train.lr is True, but must be a number"),
        ('[data]\ntrain = ["a:2", 3]\n', f"data.train is ['a:2', 3], {LIST} or text"),
        ("[model]\npath = 3\n", "model.path is 3, but must be text"),
        ('[data]\ntrain = "[a:2, b"\n', "data.train is [a:2, b, but a list must end with ]"),
        ("[train]\nmax_step = 3\n", f"{NO_KEY} train.max_step; did you mean train.max_steps?"),
        ("[train]\nmax-steps = 3\n", f"{NO_KEY} train.max-steps; did you mean train.max_steps?"),
        ("[trian]\nx = 3\n", f"{NO_KEY} trian.x"),
        ("[trian]\nmax_steps = 3\n", f"{NO_KEY} trian.max_steps; did you mean train.max_steps?"),
        ("[lora.rank_patern]\na = 3\n", f"{NO_KEY} lora.rank_patern.a; did you mean lora.rank_pattern?"),
        ("[zoo]\nelephants = 3\n", f"{NO_KEY} zoo.elephants"),
    ],
)
def test_in_a_file_too(run: Run, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert run("train", path) == (1, "", f"minilora train: {path}: {words}\n")


def test_options_are_spelled_with_hyphens_or_underscores(run: Run, toml: Path) -> None:
    expected = run("train", toml, "--eval.max_new_tokens", 3, "--print-config")
    assert expected[0] == 0
    assert run("train", "--print_config", toml, "--eval.max-new-tokens", 3) == expected
    assert run("train", toml, "--eval.max-new-tokens=3", "--print_config") == expected
    refused(run("generate", "hi", "--max-new-tokens", 0), 2, "max_new_tokens is 0")
    refused(run("merge", "a", "--audit-tokens=0"), 2, "audit_tokens is 0")
    refused(run("train", "--list_recipes", "--no-such_thing"), 2, "--no-such_thing")


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_missing_is_called_as_in_the_usage(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name of its own, in capital letters, or by the choices there are."""

    def look(parser: ArgumentParser, *_: object, **__: object) -> None:
        words = [action for action in parser._actions if not action.option_strings and not action.choices]
        assert [action.metavar for action in words] in ([action.dest.upper() for action in words], ["FILE"])
        raise UserError("seen enough")

    monkeypatch.setattr(arguments, "parse", look)
    with pytest.raises(UserError, match="seen enough"):
        VERBS[verb]([])


def test_lists_of_compare_may_stand_in_brackets(run: Run, toml: Path) -> None:
    for given in ("full,x", "[full,x]", "[full, x]", "full, x"):
        refused(run("compare", toml, "--strategies", given), 1, "there is no strategy 'x' to compare")


def test_config_as_an_option_is_the_word_after_the_verb(run: Run, toml: Path, chats: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[lora]\nrnak = 3\n")
    for given in (["--config", wrong], [f"--config={wrong}"]):
        for verb in (["train"], ["compare"], ["data", "check", chats]):
            refused(run(*verb, *given), 1, "wrong.toml", "rnak")
    refused(run("data", "check", "--config", tmp_path / "no.toml"), 1, "no.toml: no such file")
    refused(run("train", "--config"), 2, "--config")
    expected = run("train", toml, "--lora.rank", 7, "--print-config")
    assert run("train", "--lora.rank", 7, "--config", toml, "--print-config") == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lora.targets", "[q_proj, v_proj]"], ["--lora.targets", '["q_proj", "v_proj"]']),
        (["--lora.targets=[q_proj]"], ['--lora.targets=["q_proj"]']),
        (["--explain.weights", "[1,-2.5]"], ["--explain.weights", "[1,-2.5]"]),
        (['["q_proj"]'], ['["q_proj"]']),
        (["[INST]"], ["[INST]"]),
        (["--raw", "[INST]"], ["--raw", "[INST]"]),
        (["--model.dtype=float32", "[INST]"], ["--model.dtype=float32", "[INST]"]),
    ],
)
def test_a_list_of_words_needs_no_quotes_and_a_prompt_gets_none(given: list[str], expected: list[str]) -> None:
    assert quoted(given) == expected


def test_the_file_need_not_be_the_first_word(run: Run, toml: Path, tmp_path: Path) -> None:
    expected = run("train", toml, "--lora.rank", 7, "--print-config")
    assert run("train", "--print-config", toml, "--lora.rank", 7) == expected
    assert run("train", "--lora.rank", 7, "--print-config", toml) == expected
    assert run("train", "--lora.rank=7", "--print-config", toml) == expected
    refused(run("train", "--resume", toml), 1, "no run to resume here")
    refused(run("train", "--overwrite", tmp_path / "no.toml"), 1, "no.toml: no such file")
    refused(run("train", toml, "--dry-run", toml), 2, "unrecognized")


def test_every_recipe_that_is_named_counts(run: Run) -> None:
    refused(run("train", "--recipe", "24gb", "--recipe", "nonsense", "--print-config"), 1, "nonsense")


def test_a_missing_file_says_how_to_get_one(run: Run, tmp_path: Path) -> None:
    refused(run("train", tmp_path / "no.toml"), 1, "no.toml: no such file", "--print-config")
    refused(run("evaluate", tmp_path / "no.jsonl", "--model.path", tmp_path), 1, str(tmp_path))


def test_what_is_no_toml_file_is_told(run: Run, chats: Path, tmp_path: Path) -> None:
    refused(run("train", tmp_path), 1, f"{tmp_path}: a folder; name a TOML file\n")
    refused(run("train", chats), 1, f"{chats}: no TOML file; data go to --data.train\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1\xff")
    refused(run("compare", "--config", tmp_path / "x.parquet"), 1, "x.parquet: no TOML file; data go to --data.train\n")


def test_an_unknown_option_comes_with_the_nearest(run: Run) -> None:
    for given, words in {
        ("train", "--train.max-step", "3"): "--train.max-step; did you mean --train.max_steps?",
        ("generate", "hi", "--adaptr=x"): "--adaptr; did you mean --adapter?",
        ("chat", "--elephants"): "--elephants",
        ("train", "--dry", "x.toml"): "--dry; did you mean --dry-run?",  # a file would be taken for its value
    }.items():
        told = f"minilora {given[0]}: there is no {words}; see minilora {given[0]} --help\n"
        assert run(*given) == (2, "", told)


@pytest.mark.filterwarnings("default")
def test_what_a_file_overrides_of_a_recipe_is_told(run: Run, toml: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.toml"
    some.write_text("[train]\nlr = 1e-3\nmax_steps = 4\n[lora]\nrank = 3\n")
    said = "warning: --recipe 24gb: the file overrides"
    assert run("train", "--recipe", "24gb", toml, "--print-config")[2] == f"{said} all that it sets\n"
    assert run("train", some, "--recipe", "24gb", "--print-config")[2] == f"{said} lora.rank, train.lr\n"
    some.write_text("[train]\nmax_steps = 4\n")
    assert run("train", some, "--recipe", "24gb", "--print-config", "--train.lr", 1)[2] == ""


def test_help_and_usage_errors_import_no_torch() -> None:
    code = """
import sys
from minilora.cli import main
for args in ("--help", "no", "train --help", "train --nonsense", "train no.toml", "evaluate --help", "generate --help",
             "generate x --top_p 2", "merge", "demo --help"):
    try:
        main(args.split())
    except SystemExit:
        pass
    assert not {"torch", "numpy", "matplotlib"} & sys.modules.keys(), args
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, timeout=120)


def test_python_m_minilora_exits_with_the_status() -> None:
    command = [sys.executable, "-m", "minilora"]
    assert subprocess.run([*command, "--help"], capture_output=True, timeout=60, check=False).returncode == 0
    done = subprocess.run([*command, "nonsense"], capture_output=True, timeout=60, check=False, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# --- Configuration --------------------------------------------------------------------------------------------------


def test_the_printed_configuration_is_complete_and_reads_back(run: Run, tmp_path: Path) -> None:
    flag = "--print-config"
    status, out, err = run("train", flag)
    assert status == 0, err
    assert tomllib.loads(out) == to_dict(RunConfig())
    path = tmp_path / "printed.toml"
    path.write_text(out)
    status, again, err = run("train", path, flag)
    assert (status, again) == (0, out), err


def test_flags_win_over_the_file_and_are_printed(run: Run, toml: Path) -> None:
    status, out, _ = run("train", toml, "--train.lr", "0.5", "--lora.targets", '["q_proj"]', "--print-config")
    assert status == 0
    printed = tomllib.loads(out)
    assert (printed["train"]["lr"], printed["lora"]["targets"], printed["train"]["max_steps"]) == (0.5, ["q_proj"], 4)


# --- Training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def finished(trained: dict[str, Path], make_config: MakeConfig, run: Run) -> Path:
    """The folder of a finished run, made once by `minilora train`. Do not change it."""
    if "run" not in trained:
        folder = trained["root"] / "run"
        toml = folder.with_suffix(".toml")
        toml.write_text(config_toml(make_config(train__output=str(folder), train__max_steps=12, train__lr=2e-2)))
        status, out, err = run("train", toml)
        assert (status, err) == (0, "")
        assert re.search(r"^before +loss .*\nafter +loss ", out, re.MULTILINE), out
        assert re.search(r"done: all steps done; report in .*report.html", out), out
        trained["run"] = folder
    return trained["run"]


def test_train_writes_the_run_folder(finished: Path) -> None:
    assert {c.name for c in finished.iterdir()} >= {
        "config.toml", "metrics.jsonl", "timing.jsonl", "summary.json", "report.html", "adapter", "checkpoints",
        "samples.md", "loss.png",
    }  # fmt: skip


def test_config_toml_of_a_run_runs_again(run: Run, finished: Path, tmp_path: Path) -> None:
    status, _, err = run("train", finished / "config.toml", "--train.output", tmp_path / "again")
    assert (status, err) == (0, "")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_a_folder_that_holds_a_run(run: Run, finished: Path) -> None:
    refused(run("train", finished / "config.toml"), 1, str(finished), "--resume", "--overwrite")
    refused(run("train", finished / "config.toml", "--resume", "--overwrite"), 1, "give one of them")
    status, _, err = run("train", finished / "config.toml", "--resume")
    assert (status, err) == (0, "")


def test_a_dry_run_goes_the_whole_way_and_keeps_nothing(run: Run, toml: Path, tmp_path: Path) -> None:
    strategies = (
        "qlora", "lora --lora.dora true", "full --train.reinit top:1", "prefix --model.quantize nf4",
        "qlora --lora.modules_to_save [lm_head,embed_tokens,norm]",
        "partial --train.layers 1 --train.parameters [\"lm_head\",\"norm\"]",
    )  # fmt: skip
    for flags in (["--train.strategy", *strategy.split()] for strategy in strategies):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = run("train", toml, "--dry-run", *flags)
        assert (status, err) == (0, ""), flags
        assert "nothing was kept" in out
        assert "is answered" in out
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("closed", [True, False])
def test_output_that_goes_nowhere_does_not_end_training(toml: Path, tmp_path: Path, closed: bool) -> None:
    """A reader that has gone, as in `minilora train x.toml | head`, or a full disk."""
    reading, writing = os.pipe() if closed else (os.open("/dev/null", os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    os.close(reading)
    command = [sys.executable, "-m", "minilora", "train", str(toml)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (tmp_path / "run" / "adapter" / "manifest.json").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert (done.returncode, done.stderr.count("\n")) == ((0, 0) if closed else (1, 1)), done.stderr


def test_a_reader_that_goes_away_ends_no_verb_badly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "minilora", "inspect", "demo"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_data_that_cannot_be_trained_on(run: Run, toml: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{oops\n')
    refused(run("train", toml, "--data.train", bad), 1, "bad.jsonl:2", "not JSON")
    refused(run("train", toml, "--data.train", tmp_path / "no.jsonl"), 1, "no.jsonl: cannot be read")
    refused(run("train", toml, "--data.max_seq_len", 2), 1, "train.jsonl:1", "max_seq_len")
    assert run("train", toml)[0] == 0, "the folder is as free as it was"


def test_ctrl_c_before_the_first_step(run: Run, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "set_up", interrupt)
    assert run("train", toml) == (130, "", "minilora train: stopped\n")
    monkeypatch.setattr("minilora.report.inspect.show_facts", interrupt)
    assert run("inspect", "demo") == (130, "", "minilora inspect: stopped\n")


@pytest.mark.parametrize("where", ["_measure", "finish"])
def test_ctrl_c_outside_of_the_steps_of_a_run_that_has_begun(
    run: Run, toml: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, where, interrupt)
        status, _, err = run("train", toml)
    output = tomllib.loads(toml.read_text())["train"]["output"]
    assert (status, err) == (130, f"minilora train: {output}: stopped; go on with --resume\n")
    assert run("train", toml, "--resume")[::2] == (0, "")


# --- Using what was trained -----------------------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("default")
def test_a_text_that_outgrows_the_model_is_one_line(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "short"))
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 4}
    (base / "config.json").write_text(json.dumps(config))
    status, _, err = run("generate", "a in b", "--model.path", base, "--max_new_tokens", 2)
    assert (status, err.count("\n")) == (0, 3), err
    assert err.endswith("warning: the text goes beyond the model's max_position_embeddings, 4\n")


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


def test_merge_writes_what_transformers_reads(run: Run, finished: Path, tmp_path: Path) -> None:
    status, out, err = run("merge", finished / "adapter", tmp_path / "merged")
    assert (status, err) == (0, ""), "the run's own validation file is the text to compare on"
    assert re.search(r"trained .* passed .*\n.*\(base\)", out)
    assert MistralForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 458
    refused(run("merge", finished / "adapter", tmp_path / "merged"), 1, "merged: exists already")
    assert run("merge", finished / "adapter", tmp_path / "merged", "--overwrite")[0] == 0


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


def test_a_run_that_left_a_model_or_nothing_yet_says_so(run: Run, tmp_path: Path) -> None:
    """Where an adapter or a model is looked for in its folder."""
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    for folder in (whole, begun):
        folder.mkdir()
        (folder / "config.toml").touch()
    shutil.copytree(base_folder("demo"), whole / "model")
    lacks = "holds no adapter_config.json;"
    as_adapter, as_model = ["generate", "hi", "--adapter"], ["generate", "hi", "--model.path"]
    refused(run(*as_adapter, whole), 1, f"{whole}: {lacks} this run left a whole model: --model.path {whole}/model\n")
    refused(run(*as_adapter, begun), 1, f"{begun}: {lacks} this run is not finished\n")
    refused(run(*as_model, whole), 1, f"{whole}/model: this is a run's model; name its own folder\n")
    refused(
        run(*as_model, begun), 1, f"{begun}/config.toml: this run is not finished; minilora train --resume goes on\n"
    )
    shutil.copytree(base_folder("demo"), begun / "adapter")
    (begun / "adapter" / "adapter_config.json").touch()
    refused(run(*as_model, begun), 1, f"{begun}/adapter: this is a run's adapter; name its base")


@pytest.mark.parametrize("within", ["", "adapter"])
def test_a_folder_that_may_not_be_read_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    """Not that it holds nothing, nor that the run there has not ended. Whoever runs the tests may read everything, so
    the system is told to refuse."""
    stat, locked = os.stat, tmp_path / "run" / within

    def refuse(path: Any, **how: Any) -> os.stat_result:
        if str(path).startswith(f"{locked}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    locked.mkdir(parents=True)
    (tmp_path / "run" / "config.toml").touch()
    monkeypatch.setattr(os, "stat", refuse)
    said = f"{locked}/adapter_config.json: Permission denied; change its permissions, or name another\n"
    refused(run("generate", "hi", "--adapter", tmp_path / "run"), 1, said)
    if within:
        said = f"{locked}: this is a run's adapter; name its base"
        refused(run("generate", "hi", "--model.path", tmp_path / "run"), 1, said)


def test_export_ignores_no_flag(run: Run) -> None:
    refused(run("export", "a", "b", "--to", "peft", "--dtype", "float16"), 1, "--dtype does nothing with --to peft")
    refused(run("export", "a", "b", "--to", "hf", "--model.path", "c"), 1, "--model.path does nothing with --to hf")
    refused(run("export", "a", "b", "--to", "hf", "--force"), 1, "--force does nothing with --to hf")


def test_merge_without_a_folder_ignores_no_flag(run: Run) -> None:
    refused(run("merge", "a", "--overwrite"), 1, "--overwrite does nothing without OUT")
    refused(run("merge", "a", "--onto", "original"), 1, "--onto does nothing without OUT")


@pytest.mark.parametrize(
    ("args", "where"),
    [
        *((["generate", "a", *flag], "at --temperature 0") for flag in (["--top_k=3"], ["--top_p=.5"], ["--seed=0"])),
        *((["generate", "a", flag], "without --adapter") for flag in ("--force", "--adapter_scaling=5")),
        *((["evaluate", "f", flag], "without --adapter") for flag in ("--force", "--adapter_scaling=5")),
    ],
)
def test_generate_and_evaluate_ignore_no_flag(run: Run, args: list[str], where: str) -> None:
    refused(run(*args), 1, f"{args[2].partition('=')[0]} does nothing {where}; leave it out")


# What a careless command must not cost.


def test_merge_replaces_only_what_it_wrote_and_never_its_sources(run: Run, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    adapter = finished / "adapter"
    refused(run("merge", adapter, tmp_path / "precious", "--overwrite"), 1, "thesis.txt", "did not write")
    refused(run("merge", adapter, adapter, "--overwrite"), 1, "made from")
    refused(run("merge", adapter, finished, "--overwrite"), 1, "made from")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"
    assert (adapter / "adapter_model.safetensors").exists()


def test_the_demo_replaces_only_a_demo(run: Run, finished: Path) -> None:
    before = sorted(path.name for path in finished.iterdir())
    refused(run("demo", "--output", finished), 1, "other than a demo")
    assert sorted(path.name for path in finished.iterdir()) == before


def test_an_adapter_whose_provenance_names_no_base(run: Run, finished: Path, tmp_path: Path) -> None:
    for base in (None, ""):
        adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
        said = json.loads((finished / "adapter/minilora.json").read_text()) | {"base_path": base}
        (adapter / "minilora.json").write_text(json.dumps(said))
        refused(run("generate", "a", "--adapter", adapter), 1, "does not say where its base lies", "--model.path")


def test_a_folder_s_name_need_not_be_utf_8(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minilora", "quantize", "demo", os.fsencode(tmp_path) + b"/bad\xff"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, capture_output=True)
    assert (done.returncode, done.stdout.endswith(b"bad\\udcff\n")) == (0, True), done.stderr


def test_overwrite_does_not_delete_what_the_new_run_is_made_from(run: Run, finished: Path, data_folder: Path) -> None:
    inside = finished / "adapter" / "train.jsonl"
    inside.write_bytes((data_folder / "train.jsonl").read_bytes())
    refused(run("train", finished / "config.toml", "--overwrite", "--data.train", inside), 1, "lies in")
    assert inside.exists()
    inside.unlink()


def test_an_adapter_that_names_no_base_wants_one(run: Run, finished: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((finished / "adapter" / name).read_bytes())
    refused(run("generate", "a", "--adapter", foreign), 1, "--model.path")


def test_a_full_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "minilora", "explain", "--weights", "[1,2]"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("closed", "left"), [(">&-", "stderr"), ("2>&-", "stdout")])
def test_a_closed_stream_is_no_crash(closed: str, left: str) -> None:
    command = f"{sys.executable} -m minilora inspect demo {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert ("model" in done.stdout) == (left == "stdout")


@pytest.mark.parametrize("args", [["--weights", "[]"], ["--weights", "[1]", "--tensor", "norm.weight"]])
def test_explain_ignores_nothing(run: Run, args: list[str]) -> None:
    refused(run("explain", *args), 1, "--weights")


# --- Data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", [chat(f"name {n}", f"it {n}") for n in range(20)])


def test_data_check_alone(run: Run, chats: Path, tmp_path: Path) -> None:
    status, out, err = run("data", "check", chats, "--html", tmp_path / "page.html", "--show", 1)
    assert (status, err) == (0, "")
    assert "0 faults" in out
    assert "20 samples" in out
    for name in ("lengths", "packing", "steps", "time", "memory"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), name
    assert re.search(r"steps +1 to an epoch, .* train\.epochs 1 comes to 1 steps", out)
    _, out_of_steps, _ = run("data", "check", chats, "--train.max_steps", 5)
    assert "train.max_steps 5 comes to 5 epochs" in out_of_steps
    assert "warning: warm-up takes 10 steps, the run has 5: train.lr is never reached" in out_of_steps
    assert "warm-up" not in run("data", "check", chats, "--train.warmup_steps", 1)[1]
    assert "⟦trained on⟧, only seen" in out
    assert "<s>[INST]name 0[/INST]⟦it 0⟧⟦</s>⟧" in out
    assert "name 1[" not in out
    assert "[INST]" in (tmp_path / "page.html").read_text()


def test_data_check_predicts_the_run_that_memory_allows(run: Run, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes again what does not fit."""
    monkeypatch.setattr(ledger, "private_bytes", lambda: 0)
    predicted = []
    for free in (1e15, 0):
        monkeypatch.setattr(ledger, "free_bytes", lambda _, free=free: free)
        said = re.search(r"^memory +([\d.]+) MB predicted", run("data", "check", chats)[1], re.MULTILINE)
        assert said
        predicted.append(float(said[1]))
    assert predicted[1] < 0.9 * predicted[0]


def test_data_check_exits_with_1_and_one_line(run: Run, chats: Path, tmp_path: Path) -> None:
    with chats.open("a") as file:
        file.write('{"x": 1}\nno\n')
    got = run("data", "check", chats)
    refused(got, 1, "chats.jsonl:21: no", "and 1 more")
    assert "chats.jsonl:22: not JSON" in got[1], "all of them are listed"
    leaking = write_jsonl(tmp_path / "test.jsonl", [chat("name 3", "it 3")])
    refused(
        run("data", "check", chats, "--data.bad_lines", "skip", "--data.test", leaking), 1, "chats.jsonl:4", "test.j"
    )
    refused(run("data", "check", tmp_path / "no.jsonl"), 1, "no.jsonl: cannot be read")
    refused(run("data", "check"), 1, "data.train is empty")
    refused(run("data", "chekc", chats), 2, "check")


def test_data_check_and_evaluate_overwrite_nothing(run: Run, chats: Path, tiny_base: Path) -> None:
    before = chats.read_bytes()
    for flag in ("--html", "--fix"):
        refused(run("data", "check", chats, flag, chats), 1, "chats.jsonl: exists already; name another file")
    refused(run("evaluate", chats, "--model.path", tiny_base, "--out", chats), 1, "chats.jsonl: exists already")
    refused(run("evaluate", chats, "--model.path", tiny_base, "--out", ""), 1, "out is empty; name a file")
    assert chats.read_bytes() == before


def test_data_check_writes_two_files(run: Run, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("data", "check", chats, "--fix", "same", "--html", tmp_path / "same"), 1, "same: --fix and --html both")
    assert not (tmp_path / "same").exists()


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


def test_a_stranger_s_file_name_commands_no_terminal(
    capsys: pytest.CaptureFixture[str], tiny_base: Path, tmp_path: Path, run: Run
) -> None:
    def work() -> None:
        raise FileNotFoundError(2, "No such file", "\x1b]0;x\x07\nsecond line")

    assert exit_status("minilora x", work) == 1
    assert capsys.readouterr().err == "minilora x: \\x1b]0;x\\x07 second line: No such file\n"
    save_adapter(add_lora(load_model(tiny_base), LoraConfig(rank=2)), tmp_path / "a", provenance={
        "base_path": str(tiny_base), "tokenizer_path": "\x1b[31m" + "x" * 300,
    })  # fmt: skip
    refused(run("generate", "hi", "--adapter", tmp_path / "a"), 1, "\\x1b[31mxxx", "no such tokenizer file or folder")


@pytest.mark.parametrize(("verb", "more"), [("quantize", ()), ("export", ("--to", "hf"))])
def test_what_the_hub_has_is_fetched_before_signals_are_put_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, more: tuple[str, ...]
) -> None:
    """A fetch tells of no progress at which one could be followed."""
    handlers, own = list[object](), signal.getsignal(signal.SIGINT)

    def fetch(*_: object) -> Path:
        handlers.append(signal.getsignal(signal.SIGINT))
        return base_folder("demo")

    monkeypatch.setattr("minilora.hub._fetch", fetch)
    assert run(verb, "org/tiny", tmp_path / "out", *more)[0] == 0
    assert handlers[0] == own


def test_an_unknown_user_s_home_is_no_crash(run: Run, tmp_path: Path) -> None:
    nobody = "~nobody-of-this-name/x"
    refused(run("quantize", nobody, tmp_path / "out"), 1, f"{nobody}: no such folder")
    refused(run("generate", "hi", "--model.path", nobody), 1, f"{nobody}: no such folder")


def test_the_home_is_found_in_every_path(
    run: Run, tmp_path: Path, toml: Path, chats: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves the ~ of --name=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").symlink_to(finished / "adapter")
    (tmp_path / "tokenizer").symlink_to(TOKENIZER)
    for args in (
        ("train", "~/run.toml", "--train.output=~/of train"),
        ("data", "check", chats, "--fix=~/fixed", "--html=~/page"),
        ("evaluate", "~/chats.jsonl", "--adapter=~/adapter", "--out=~/answers", "--eval.max_new_tokens=2"),
        ("generate", "hi", "--model.tokenizer=~/tokenizer", "--max_new_tokens=2"),
        ("merge", "~/adapter", "~/of merge", "--text=~/chats.jsonl"),
        ("quantize", "demo", "~/of quantize"),
        ("export", "~/adapter", "~/of export", "--to=peft"),
    ):
        assert run(*args)[0] == 0, args
    names = ("of train", "fixed", "page", "answers", "of merge", "of quantize", "of export")
    assert all((tmp_path / name).exists() for name in names)
    assert not (tmp_path / "~").exists()
    refused(run("demo", "--output=~"), 1, f"{tmp_path} holds something other than a demo")
    refused(run("compare", toml, "--output=~"), 1, f"{tmp_path} is not empty")


@pytest.mark.parametrize(
    "args",
    [
        *(["train", "--model.path", ""], ["train", "--train.output="], ["evaluate", "f", "--model.path="]),
        *(["generate", "hi", "--model.path", ""], ["generate", "hi", "--adapter", ""], ["inspect", ""]),
        *(["explain", "--model.path="], ["merge", ""], ["merge", "a", ""], ["export", "", "x", "--to", "hf"]),
        *(["quantize", "", "x"], ["generate", "hi", "--model.tokenizer", ""], ["demo", "--output", ""]),
    ],
)
def test_an_empty_path_is_refused(run: Run, args: list[str]) -> None:
    refused(run(*args), 1, "is empty; name a file or folder, or leave it out")


NO_PATHS = {
    *("prompt", "system", "tensor", "model.device", "lora.targets", "train.reinit"),
    *("config", "recipe", "strategies", "grid", "shares", "rank_by", "host", "name"),
    *(f"data.{key}" for key in FILE_KEYS), "files",  # which may have weights
}  # fmt: skip


def test_every_argument_that_is_text_is_a_path_or_known_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none that is added is forgotten in `arguments.PATHS`."""
    texts = set[str]()

    def look(parser: ArgumentParser, *_: object, **__: object) -> None:
        for action in parser._actions:
            kind = getattr(action, "_typehint", action.type)
            is_text = kind in (None, str) or (get_origin(kind) in (Union, UnionType) and str in get_args(kind))
            is_section = type(action).__name__ == "_ActionConfigLoad"
            if is_text and not is_section and action.nargs != 0 and not action.choices:
                texts.add(action.dest)
        raise UserError("seen enough")

    monkeypatch.setattr(arguments, "parse", look)
    for verb, *args in (*([verb] for verb in VERBS), ["verify", "resume"]):
        with pytest.raises(UserError, match="seen enough"):
            VERBS[verb](args)
    assert texts == NO_PATHS | {*PATHS}
    assert not NO_PATHS & {*PATHS}


def test_a_link_to_itself_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(run("quantize", "demo", tmp_path / "loop"), 1, "loop: is a link or a file")
    refused(run("train", "--data.train", "f", "--overwrite", "--train.output", tmp_path / "loop" / "x"), 1, "loop")


def test_data_check_fix(run: Run, chats: Path, tmp_path: Path) -> None:
    with chats.open("a") as file:
        file.write('no\n{"messages": [{"role": "user", "content": "t"}]}\n')
        file.write(json.dumps(chat("name 0", "it 0")) + "\n")
    before, fixed = chats.read_bytes(), tmp_path / "fixed.jsonl"
    status, out, err = run("data", "check", chats, "--fix", fixed, "--data.validation_share", 0.3)
    assert (status, err) == (0, "")
    assert "20 records; left out: 2 x bad line, 1 x duplicate" in out
    assert chats.read_bytes() == before
    assert run("data", "check", fixed)[0] == 0
    assert (
        "20 records; left out: nothing"
        in run("data", "check", fixed, "--fix", tmp_path / "same", "--data.share", 0.5)[1]
    )
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"x": 1}])
    refused(run("data", "check", bad, "--fix", tmp_path / "none.jsonl"), 1, "nothing can be kept")
    assert not (tmp_path / "none.jsonl").exists()


def test_several_sources_on_the_command_line_and_in_the_file(run: Run, toml: Path, chats: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat("emit", "it")])
    both = [f"{chats}:2", str(other)]
    for given in (f"[{chats}:2, {other}]", json.dumps(both)):
        status, out, err = run("train", toml, "--data.train", given, "--print-config")
        assert (status, err) == (0, "")
        assert tomllib.loads(out)["data"]["train"] == both
    toml.write_text(out)
    assert run("train", toml, "--print-config")[1] == out, "what was printed says the same again"
    assert run("train", toml, "--data.validation", other, "--data.train", f"[{chats}:2]")[0] == 0
    refused(
        run("train", toml, "--overwrite", "--data.train", f"{chats}:0"), 1, "chats.jsonl:0: the weight of a source is 0"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.validation_share", "1"], ["data.validation_share is 1.0"]),
        (["--data.test_share", "-0.1"], ["data.test_share is -0.1"]),
        (["--data.test", "f", "--data.test_share", "0.1"], ["data.test and data.test_share both"]),
        (["--data.replay", "1"], ["data.replay is 1.0"]),
        (["--data.replay", "0.1"], ["name data.replay_from"]),
        (["--data.share", "0"], ["data.share is 0.0"]),
        (["--data.share", "1.5"], ["data.share is 1.5"]),
        (["--data.split_seed", "-1"], ["data.split_seed is -1"]),
        (["--data.train", "[a, ]"], ["data.train holds an empty name"]),
        (["--data.too_long", "cut"], ["too_long"]),
    ],
)
def test_data_keys_out_of_range(run: Run, toml: Path, flags: list[str], words: list[str]) -> None:
    got = run("train", toml, "--data.validation", "v", *flags)
    refused(got, got[0], *words)
    assert got[0] in (1, 2)
