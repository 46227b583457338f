"""The page of the comparison holds what its committed result says."""

import json
from pathlib import Path

from benchmarks.compare import DOCS, compared, write_table

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_committed_figures(tmp_path: Path) -> None:
    result = json.loads((ROOT / "benchmarks/results/compare.json").read_text())
    page = (DOCS / "strategies.md").read_text()
    (tmp_path / "page.md").write_text(page.replace(compared(result["comparison"]), ""))
    write_table(tmp_path / "page.md", result["comparison"])
    assert (tmp_path / "page.md").read_text() == page
    assert compared(result["comparison"]) in page
    assert "tokens/s" not in compared(result["comparison"]), "of one run each, without a spread"
    assert result["seconds"] < 15 * 60
    assert (DOCS / "compare.png").exists()


def test_forgetting_rises_without_replay_and_shrinks_with_it() -> None:
    """What the comparison is to show, of every strategy, in the committed figures."""
    result = json.loads((ROOT / "benchmarks/results/compare.json").read_text())["comparison"]
    rows = {row["name"]: row["forgetting"] for row in result["rows"]}
    strategies = [name.removesuffix("-replay=0") for name in rows if name.endswith("-replay=0")]
    assert strategies == ["full", "partial", "lora", "qlora", "dora", "prefix"]
    for name in strategies:
        without, replayed = rows[f"{name}-replay=0"], rows[f"{name}-replay=0.2"]
        assert without["after"]["perplexity"] > without["before"]["perplexity"], name
        assert replayed["after"]["perplexity"] < without["after"]["perplexity"], name
        assert replayed["kl"] < without["kl"], name
