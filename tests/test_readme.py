"""The README's commands run as they stand (its first two by .ci/run), in a folder that has what they speak of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import lora_layers
from tiny_runs import Run

import minilora
from minilora.checkpoint.save import save_hf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TWO_LINES = re.compile(r"<!-- two lines -->.*?<!-- end -->", re.DOTALL)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TWO_LINES.sub("", README), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a Mistral folder, chats, an adapter where the demo leaves it, and the first of the demo's chats."""
    home = tmp_path_factory.mktemp("readme")
    data = home / "minilora/demo/data"
    data.mkdir(parents=True)
    for name in ("chat_test", "chat_validation"):
        lines = (ROOT / f"minilora/demo/data/{name}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(lines[:30]))
    (home / "chats.jsonl").write_bytes((data / "chat_validation.jsonl").read_bytes())
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/activate").touch()  # the package is on PATH already
    model = minilora.load_model("demo", quantize="nf4", dtype=torch.float32)
    save_hf(model, home / "Mistral-7B-v0.3", tokenizer=ROOT / "minilora/demo/base/tokenizer.model")
    minilora.add_lora(model, minilora.LoraConfig(rank=2))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    validation = str(data / "chat_validation.jsonl")
    provenance = {"base_path": "demo", "quantize": "nf4", "double_quant": True, "validation_path": validation}
    minilora.save_adapter(model, home / "runs/demo/adapter", provenance=provenance)
    return home


def shell(line: str, home: Path) -> str:
    """What a line prints in a shell that finds the installed `minilora`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HOME": str(home), "PATH": path}
    done = subprocess.run(["bash", "-euc", line], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_shell_command_of_the_readme_runs(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell says what it hands to `minilora`, which runs here: to begin one takes longer than most of them. What the
    shell redirects, it runs itself."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(lines) >= 7
    assert Path(shell("command -v minilora", folder).strip()).parent == Path(sys.executable).parent, "not installed"
    for line in lines:
        if ">" in line or not line.startswith("minilora "):
            shell(line, folder)
            continue
        words = shell(f'minilora() {{ printf "%s\\0" "$@"; }}\n{line}', folder).split("\0")[:-1]
        status, out, err = run(*words)
        assert status == 0, f"{line}\n{out[-2000:]}\n{err[-2000:]}"


def test_the_python_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    [block] = blocks("python")
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["answer"], torch.Tensor)


def test_the_two_lines_are_two() -> None:
    [two] = TWO_LINES.findall(README)
    commands = [line for line in two.splitlines() if line and not line.startswith(("<!--", "```"))]
    assert len(commands) == 2
    assert commands[0].endswith("minilora demo")
    assert "pytest" in commands[1]


def test_the_chinese_readme_has_the_same_two_lines_and_options() -> None:
    [two] = TWO_LINES.findall(README)
    [block] = re.findall(r"```sh\n(.*?)```", two, re.DOTALL)
    chinese = (ROOT / "README.zh.md").read_text()
    assert block in chinese
    options, known = (set(re.findall(r"--[a-z][\w.]+", text)) for text in (chinese, README))
    assert options <= known


def test_every_verb_stands_in_the_readme() -> None:
    from minilora.cli import VERBS

    assert set(re.findall(r"\| `minilora (\w+)", README)) == set(VERBS)


def test_every_file_named_in_the_readme_exists() -> None:
    rows = re.findall(r"^\| ((?:`[\w/]+(?:\.py|/)` ?)+)\|", README, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) >= 15
    missing = [name for name in named if not (ROOT / "minilora" / name).exists()]
    assert missing == []
