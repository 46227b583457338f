"""The benchmark of loading goes its whole way on a tiny shape, both sides, and ours on a checkpoint that is there."""

import json
from pathlib import Path

import pytest

from benchmarks.load import WORKS, main
from minilora.config import base_folder

FIGURES = {"seconds", "weights_per_s", "peak_private_bytes", "beyond_bytes", "weights_bytes"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_processes")
@pytest.mark.filterwarnings("ignore")
def test_every_work_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    flags = ["--shape", "tiny", "--model", str(base_folder("demo")), "--rounds", "1", "--work", str(tmp_path)]
    assert main([*flags, "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert parts.keys() == {"tiny", "model"}
    assert len(parts["tiny"]["rows"]) == len(parts["model"]["rows"]) == len(WORKS)
    for part, sides in (("tiny", 2), ("model", 1)):
        assert "commit" in parts[part]["machine"]
        for figures in parts[part]["works"].values():
            measured = [side for side in figures.values() if "seconds" in side]
            assert len(measured) == sides
            assert all(side.keys() >= FIGURES for side in measured)
    tiny = parts["tiny"]["works"]["load"]
    ours, theirs = tiny["minilora"]["weights_bytes"], tiny["transformers + bitsandbytes"]["weights_bytes"]
    assert ours == pytest.approx(theirs, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]
