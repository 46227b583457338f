"""The benchmark of merging goes its whole way on a tiny shape."""

import json
import sys
from pathlib import Path

import pytest
from tiny_runs import TOKENIZER

from benchmarks.merge import main
from minilora.config import base_folder


def test_a_merge_is_measured_and_its_files_go(tmp_path: Path) -> None:
    out, common = tmp_path / "merge.json", ["--tokens", "70", "--length", "32", "--work", str(tmp_path)]
    assert main([*common, "--model", str(base_folder("demo")), "--out", str(out)]) == 0
    part = json.loads(out.read_text())["parts"]["5 layers of base, 64 tokens"]
    private = part["minilora"]["peak_private_bytes"]
    assert part["rows"][0]["ours"].endswith(f" s, {private / 1e9:.2f} GB of private memory in all")
    assert private > part["minilora"]["rest_private_bytes"] > 0
    assert part["minilora"]["audit"]["merged"]["n_tokens"] == 64
    assert part["minilora"]["audit"]["merged"]["mean_kl"] < 0.1 * part["minilora"]["audit"]["base"]["mean_kl"]
    assert part["rows"][0]["what"] == "merge with audit on 64 tokens, 0.0035 billion weights"
    assert [path.name for path in tmp_path.iterdir()] == ["merge.json"]


def test_what_cannot_be_merged_is_one_line(tmp_path: Path) -> None:
    flags = ["--shape", "tiny", "--tokens", "64", "--length", "32", "--tokenizer", str(TOKENIZER)]
    assert main([*flags, "--work", str(tmp_path), "--out", str(tmp_path / "merge.json")]) == 1
    part = json.loads((tmp_path / "merge.json").read_text())["parts"]["2 layers of tiny, 64 tokens"]
    error = part["minilora"]["error"]
    assert "a v3 tokenizer of 458 pieces, but the model's vocabulary has 32,768" in error


def test_what_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--shape", "tiny", "--out", str(tmp_path / "merge.json")]
    assert main([*flags, "--tokenizer", str(TOKENIZER), "--work", str(tmp_path / "none")]) == 1
    monkeypatch.setitem(sys.modules, "mistral_common", None)  # which importing then fails
    assert main([*flags, "--work", str(tmp_path)]) == 1
    place, library = capsys.readouterr().err.splitlines()
    assert "No such file or directory" in place
    assert library.startswith("merge: mistral-common, which holds the tokenizer, is missing")


@pytest.mark.parametrize("layers", ["0", "-1"])
def test_a_model_has_layers(layers: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--shape", "tiny", "--layers", layers])
