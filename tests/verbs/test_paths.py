"""The files and folders that verbs are given."""

import os
import shutil
import signal
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from jsonargparse import ArgumentParser
from tiny_runs import TOKENIZER, Run, refused

from minilora import arguments
from minilora.arguments import PATHS
from minilora.cli import VERBS
from minilora.config import base_folder
from minilora.data.sources import FILE_KEYS
from minilora.errors import UserError


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
    (whole / "config.toml").unlink()  # then it is not a run's
    refused(run(*as_adapter, whole), 1, f"{whole}: {lacks} name the folder of an adapter, such as RUN/adapter\n")
    refused(run(*as_model, whole), 1, f"{whole}: no checkpoint here;")
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


def test_data_check_and_evaluate_overwrite_nothing(run: Run, chats: Path, tiny_base: Path) -> None:
    before = chats.read_bytes()
    for flag in ("--html", "--fix"):
        refused(run("data", "check", chats, flag, chats), 1, "chats.jsonl: exists already; name another file")
    refused(run("evaluate", chats, "--model.path", tiny_base, "--out", chats), 1, "chats.jsonl: exists already")
    refused(run("evaluate", chats, "--model.path", tiny_base, "--out", ""), 2, "out is empty; name a file")
    assert chats.read_bytes() == before


def test_data_check_writes_two_files(run: Run, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("data", "check", chats, "--fix", "same", "--html", tmp_path / "same"), 2, "same: --fix and --html both")
    assert not (tmp_path / "same").exists()


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


@pytest.mark.slow
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
    refused(run(*args), 2, "is empty; name a file or folder, or leave it out")


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


def test_the_demo_replaces_only_a_demo(run: Run, finished: Path) -> None:
    before = sorted(path.name for path in finished.iterdir())
    refused(run("demo", "--output", finished), 1, "other than a demo")
    assert sorted(path.name for path in finished.iterdir()) == before


def test_overwrite_does_not_delete_what_the_new_run_is_made_from(run: Run, finished: Path, data_folder: Path) -> None:
    inside = finished / "adapter" / "train.jsonl"
    inside.write_bytes((data_folder / "train.jsonl").read_bytes())
    refused(run("train", finished / "config.toml", "--overwrite", "--data.train", inside), 1, "lies in")
    assert inside.exists()
    inside.unlink()


def test_merge_replaces_only_what_it_wrote_and_never_its_sources(run: Run, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    adapter = finished / "adapter"
    refused(run("merge", adapter, tmp_path / "precious", "--overwrite"), 1, "thesis.txt", "did not write")
    refused(run("merge", adapter, adapter, "--overwrite"), 1, "made from")
    refused(run("merge", adapter, finished, "--overwrite"), 1, "made from")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"
    assert (adapter / "adapter_model.safetensors").exists()
