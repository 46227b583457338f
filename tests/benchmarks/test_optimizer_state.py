"""The benchmark of the optimizer's state goes its whole way, in two steps."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import optimizer_state
from benchmarks.harness import RESULTS
from benchmarks.optimizer_state import BEGIN, KINDS, PAGE, main, table
from benchmarks.table import between
from minilora.checkpoint.load import load_model
from minilora.data.encode import read_samples
from minilora.evaluate.perplexity import mean_loss
from minilora.tokenizer import load_tokenizer


@pytest.mark.slow
def test_both_states_are_trained_with_and_timed(
    tmp_path: Path, little_demo_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_state, "TURNS", 1)
    samples = read_samples(little_demo_data / "chat_validation.jsonl", load_tokenizer("demo"), 256)
    before = mean_loss(load_model("demo", dtype=torch.float32), samples, 256)
    out = tmp_path / "optimizer_state.json"
    assert main(["--seeds", "1", "--max_steps", "2", "--out", str(out)]) == 0
    [part] = json.loads(out.read_text())["parts"].values()
    assert part["runs"].keys() == KINDS.keys()
    for [run] in part["runs"].values():
        assert len(run["training_losses"]) == 2
        assert run["validation_loss"] < before - 0.1
    first = [run["training_losses"][0] for [run] in part["runs"].values()]
    assert first[0] == first[1], "the first step is before any update"
    assert all(ms > 0 for ms in part["update_ms"].values())


def test_the_chapter_has_the_result_s_figures() -> None:
    [part] = json.loads((RESULTS / "optimizer_state.json").read_text())["parts"].values()
    page = PAGE.read_text()
    assert table(part) in page
    assert between(page, table(part), BEGIN) == page


def test_the_chapter_says_what_a_gpu_has_timed() -> None:
    timed = any("8bit" in name for name in json.loads((RESULTS / "gpu.json").read_text())["parts"]["adamw"]["cases"])
    assert ("has not been timed yet" in PAGE.read_text()) == (not timed)


SMOKE = (["--max_steps", "5"], ["--seeds", "1"])


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--max_steps", "0", "--out", "x.json"], *SMOKE])
def test_wrong_usage(wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a smoke run replace the chapter's figures."""
    for name in ("learnt", "update_times", "write_result"):
        monkeypatch.setattr(optimizer_state, name, lambda *_: pytest.fail("measured or written"))
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    assert ("need --out" in capsys.readouterr().err.splitlines()[-1]) == (wrong in SMOKE)


def test_a_file_that_no_result_is_added_to_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "list.json"
    out.write_text("[]")
    assert main(["--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"optimizer_state: {out}: ")
    assert err.count("\n") == 1
