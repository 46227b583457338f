"""The command line: which verbs there are, how they end, and nothing heavy before it is needed."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny_runs import Run, refused

from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.load import load_model
from minilora.cli import VERBS, exit_status
from minilora.config import LoraConfig
from minilora.lora import add_lora


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


def test_an_unknown_verb(run: Run) -> None:
    refused(run("tarin"), 2, "no verb 'tarin'", "train")


def test_help_settings_and_usage_errors_import_no_torch() -> None:
    code = """
import sys
from minilora.cli import main
for args in ("--help", "no", "train --help", "train --print-config", "train --nonsense", "train no.toml",
             "evaluate --help", "generate --help", "generate x --top_p 2", "merge", "demo --help"):
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


def test_a_reader_that_goes_away_ends_no_verb_badly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "minilora", "inspect", "demo"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_full_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "minilora", "explain", "--weights", "[1,2]"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "left"), [(">&-", "stderr"), ("2>&-", "stdout")])
def test_a_closed_stream_is_no_crash(closed: str, left: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m minilora inspect demo {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert ("model" in done.stdout) == (left == "stdout")


@pytest.mark.slow
def test_a_folder_s_name_need_not_be_utf_8(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minilora", "quantize", "demo", os.fsencode(tmp_path) + b"/bad\xff"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, capture_output=True)
    assert (done.returncode, done.stdout.endswith(b"bad\\udcff\n")) == (0, True), done.stderr


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
