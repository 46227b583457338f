"""The verbs that train, and the data that they train on."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_runs import Run, chat, refused, write_jsonl

from minilora.train import ledger, loop


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


def test_what_is_shown_first_is_called_the_base_s_where_an_adapter_learns_on(
    run: Run, toml: Path, finished: Path
) -> None:
    status, out, err = run("train", toml, "--train.adapter", finished)
    assert (status, err) == (0, "")
    assert re.search(r"^base   loss .*\nafter  loss ", out, re.MULTILINE), out


def test_a_folder_that_holds_a_run(run: Run, finished: Path) -> None:
    refused(run("train", finished / "config.toml"), 1, str(finished), "--resume", "--overwrite")
    refused(run("train", finished / "config.toml", "--resume", "--overwrite"), 2, "give one of them")
    status, _, err = run("train", finished / "config.toml", "--resume")
    assert (status, err) == (0, "")
    status, out, err = run("train", finished / "config.toml", "--resume", "--dry-run")
    assert (status, err) == (0, "")
    assert "the checkpoint to go on from was not looked at; nothing was kept" in out


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
        assert "a step, save, reload, generate all work; nothing was kept" in out
        assert "is answered" in out
        assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_on_raw_text_does_not_say_that_it_generated(run: Run, toml: Path, data_folder: Path) -> None:
    status, out, err = run("train", toml, "--dry-run", "--data.train", data_folder / "text.jsonl")
    assert (status, err) == (0, "")
    assert "a step, save, reload all work; nothing was kept" in out


def test_a_dry_run_refuses_what_the_run_would(run: Run, toml: Path, tmp_path: Path) -> None:
    """Also where only its answers, which a dry run does not give, need it."""
    too_many = ["--data.validation=null", "--eval.batch_size", 10**9]
    for flags, words in ((["--eval.probes", tmp_path / "no.txt"], "no.txt: cannot be read"), (too_many, "of memory")):
        for dry in ([], ["--dry-run"]):
            refused(run("train", toml, *flags, *dry), 1, words)
    assert run("train", toml, *too_many, "--eval.samples", 0, "--eval.answers", 0, "--dry-run")[0] == 0


@pytest.mark.slow
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

    output = tomllib.loads(toml.read_text())["train"]["output"]
    for flags in ([], ["--overwrite"]):
        with monkeypatch.context() as patch:
            patch.setattr(loop, where, interrupt)
            status, _, err = run("train", toml, *flags)
        assert (status, err) == (130, f"minilora train: {output}: stopped; go on with --resume\n")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "set_up", interrupt)
        assert run("train", toml, "--overwrite") == (130, "", "minilora train: stopped\n"), "the old run lies there"
        assert run("train", toml, "--resume")[2] == err
    assert run("train", toml, "--resume")[::2] == (0, "")


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
    refused(run("data", "check", ""), 2, "the name of a FILE is empty; name one, or leave it out for data.train")
    refused(run("data", "check", chats, ""), 2, "the name of a FILE is empty")
    refused(run("data", "chekc", chats), 2, "check")


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
    for ending in ("txt", "csv", "Parquet"):
        refused(run("data", "check", chats, "--fix", tmp_path / f"x.{ending}"), 2, f"x.{ending}: --fix writes JSONL")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"x": 1}])
    refused(run("data", "check", bad, "--fix", tmp_path / "none.jsonl"), 1, "nothing can be kept")
    assert not (tmp_path / "none.jsonl").exists()
