"""The verbs of weights as they lie on a disk."""

import re
from pathlib import Path

import pytest
from tiny_runs import Run, refused
from transformers import MistralForCausalLM


def test_merge_writes_what_transformers_reads(run: Run, finished: Path, tmp_path: Path) -> None:
    status, out, err = run("merge", finished / "adapter", tmp_path / "merged")
    assert (status, err) == (0, ""), "the run's own validation file is the text to compare on"
    assert re.search(r"trained .* passed .*\n.*\(base\)", out)
    assert MistralForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 458
    refused(run("merge", finished / "adapter", tmp_path / "merged"), 1, "merged: exists already")
    assert run("merge", finished / "adapter", tmp_path / "merged", "--overwrite")[0] == 0


def test_merge_without_a_folder_ignores_no_flag(run: Run) -> None:
    refused(run("merge", "a", "--overwrite"), 2, "--overwrite does nothing without OUT")
    refused(run("merge", "a", "--onto", "original"), 2, "--onto does nothing without OUT")


def test_the_adapter_of_a_run_is_not_replaced_by_its_own_export(run: Run, finished: Path) -> None:
    before = sorted(file.name for file in (finished / "adapter").iterdir())
    command = ("export", finished, finished / "adapter", "--to", "mistral-finetune", "--overwrite")
    refused(run(*command), 1, "adapter: ")
    assert sorted(file.name for file in (finished / "adapter").iterdir()) == before


def test_export_ignores_no_flag(run: Run) -> None:
    refused(run("export", "a", "b", "--to", "peft", "--dtype", "float16"), 2, "--dtype does nothing with --to peft")
    refused(run("export", "a", "b", "--to", "hf", "--model.path", "c"), 2, "--model.path does nothing with --to hf")
    refused(run("export", "a", "b", "--to", "hf", "--force"), 2, "--force does nothing with --to hf")


@pytest.mark.parametrize("args", [["--weights", "[]"], ["--weights", "[1]", "--tensor", "norm.weight"]])
def test_explain_ignores_nothing(run: Run, args: list[str]) -> None:
    refused(run("explain", *args), 2, "--weights")


@pytest.mark.parametrize("given", [[], ["--weights", "[1]"]])
def test_explain_ignores_no_flag(run: Run, given: list[str]) -> None:
    refused(
        run("explain", *given, "--model.path", "/no"), 2, "--model.path does nothing without --tensor; leave it out"
    )
