"""The benchmark of the optimizer's state goes its whole way, in two steps."""

import json
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.optimizer_state import BEGIN, KINDS, PAGE, main, table
from benchmarks.table import between


def test_both_states_are_trained_with_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "optimizer_state.json"
    assert main(["--seeds", "1", "--max_steps", "2", "--out", str(out)]) == 0
    [part] = json.loads(out.read_text())["parts"].values()
    assert part["runs"].keys() == KINDS.keys()
    for [run] in part["runs"].values():
        assert len(run["training_losses"]) == 2
        assert run["validation_loss"] < 3.2
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
