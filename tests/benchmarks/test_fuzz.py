"""Hostile files: a short run of every format, and what watches it, on cases whose ends are known."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import watch
from benchmarks.fuzz.__main__ import PAGE, drawn, main, run, table, write_table
from benchmarks.fuzz.formats import FORMATS
from benchmarks.fuzz.mutate import join_protobuf, protobuf_fields, sealed
from benchmarks.harness import RESULTS
from minilora.checkpoint.write import verify_manifest

SHORT = {"run toml": 25}  # cases; a configuration takes long to check


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_spoilt_files_load_right_or_are_refused(name: str, tmp_path: Path) -> None:
    figures = run(name, range(SHORT.get(name, 200)), seed=0, findings=tmp_path)
    said = [json.loads(file.read_text()) for file in tmp_path.rglob("*.finding.json")]
    assert figures["findings"] == {}, said
    assert figures["loaded"] + figures["refused"] == figures["cases"]
    assert figures["loaded"] > 0, "not all of them should be damaged"
    assert figures["reasons"] > 3, "nor all in the same way"


def right(loaded: Any) -> None:
    assert loaded is not None


def test_the_page_has_the_committed_figures(tmp_path: Path) -> None:
    parts, page = json.loads((RESULTS / "fuzz.json").read_text())["parts"], PAGE.read_text()
    (tmp_path / "page.md").write_text(page.replace(table(parts), ""))
    write_table(tmp_path / "page.md", parts)
    assert (tmp_path / "page.md").read_text() == page, "run python -m benchmarks.fuzz"
    assert parts.keys() == FORMATS.keys()
    for name, part in parts.items():
        assert part["cases"] >= 10_000, name
        assert part["findings"] == {}, name
        assert part["slowest_seconds"] < watch.MAX_SECONDS, name
        assert part["most_bytes"] < watch.MAX_BYTES, name


def test_the_page_is_written_by_a_relative_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not with figures that lie elsewhere."""
    monkeypatch.chdir(tmp_path)
    page = Path("page.md")
    for name, value in (("RESULTS", tmp_path / "results"), ("PAGE", tmp_path / page)):
        monkeypatch.setattr(f"benchmarks.fuzz.__main__.{name}", value)
    empty = "<!-- fuzzed: by the command -->\n<!-- end fuzzed -->\n"
    page.write_text(empty)
    assert main(["dispatch", "--cases", "1", "--out", "other.json"]) == 0
    assert page.read_text() == empty
    assert main(["dispatch", "--cases", "1", "--out", "results/fuzz.json"]) == 0
    assert "| dispatch | 1 |" in page.read_text()


def ends(work: Callable[[], Any], check: Callable[[Any], None] = right) -> watch.Outcome:
    """How a case ends that is followed by a good one, which must load whatever happened before it."""
    found = list(watch.outcomes(lambda n: (work, check) if n == 0 else (lambda: 7, right), range(2)))
    assert [(outcome.case, outcome.kind) for outcome in found[1:]] == [(1, "loaded")]
    return found[0]


def refuse(text: str) -> Any:
    raise watch.RefusedError(text)


def wrong(loaded: Any) -> None:
    raise watch.WrongError(f"loaded {loaded}")


def take(megabytes: int) -> int:
    taken = bytearray(b"x") * (megabytes * 1_000_000)
    return len(taken)  # and gives it back


def spin(seconds: float) -> float:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return until


def test_good_ends() -> None:
    assert ends(lambda: 7).kind == "loaded"
    refused = ends(lambda: refuse("file: why"))
    assert (refused.kind, refused.text, refused.is_finding) == ("refused", "file: why", False)
    taken = ends(lambda: take(100))
    assert taken.kind == "loaded"
    assert 95e6 < taken.peak_bytes < 120e6


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda: 1 // 0, "ZeroDivisionError"),
        (lambda: [].pop(), "IndexError"),
        (lambda: bytearray(1 << 40), "MemoryError"),
        (lambda: exec("raise SystemExit(0)"), "SystemExit"),
        (lambda: refuse("two\nlines"), "bad message"),
        (lambda: refuse("\x1b[2J"), "bad message"),
        (lambda: refuse("x" * 2001), "bad message"),
        (lambda: take(250), "too large"),
        (lambda: spin(1.2), "too slow"),
        (lambda: time.sleep(60), "hangs"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died of SIGKILL"),
        (lambda: os._exit(5), "ended with status 5"),
    ],
)
def test_findings(work: Callable[[], Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "hangs":
        monkeypatch.setattr(watch, "GIVE_UP_SECONDS", 1.5)
    assert (found := ends(work)).kind == kind
    assert found.is_finding


def test_a_load_that_is_wrong() -> None:
    assert (found := ends(lambda: 8, wrong)).kind == "wrong"
    assert found.text == "loaded 8"


def test_a_case_is_a_function_of_its_number() -> None:
    corpus = FORMATS["dispatch"].corpus()
    assert [drawn("dispatch", corpus, 1, n) for n in range(20)] == [drawn("dispatch", corpus, 1, n) for n in range(20)]
    assert len({drawn("dispatch", corpus, 1, n).labels for n in range(20)}) > 10
    assert drawn("dispatch", corpus, 2, 0) != drawn("dispatch", corpus, 1, 0)


def test_a_manifest_made_to_fit_passes_ours(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "manifest.json").write_bytes(sealed({"a": b"abc", "manifest.json": b"", "link": "a"}))
    assert verify_manifest(tmp_path)["files"].keys() == {"a"}


def test_messages_are_taken_apart_and_put_together() -> None:
    for folder in FORMATS["tokenizer"].corpus().values():
        data = folder["tokenizer.model"]
        assert isinstance(data, bytes)
        assert join_protobuf(list(protobuf_fields(data))) == data


def test_the_command_writes_figures_and_reproducers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a reader that fails where there is a zero."""
    good = FORMATS["dispatch"]

    def fails(path: Path) -> Any:
        if (path / "dispatch.json").is_file() and b"0" in (path / "dispatch.json").read_bytes():
            raise LookupError("at 0x12")
        return good.read(path)

    out, findings = tmp_path / "fuzz.json", tmp_path / "findings"
    args = ["dispatch", "--cases", "30", "--out", str(out), "--findings", str(findings)]
    assert main(args) == 0
    corpus = good.corpus()
    monkeypatch.setitem(FORMATS, "dispatch", type(good)(lambda: {}, fails, good.check))
    monkeypatch.setattr("benchmarks.fuzz.__main__.drawn", lambda name, _, seed, n: drawn(name, corpus, seed, n))
    assert main(args) == 1
    part = json.loads(out.read_text())["parts"]["dispatch"]
    assert (part["cases"], "cpu" in part["machine"]) == (30, True)
    assert part["findings"].pop("LookupError  at #x#") > 3
    assert part["findings"] == {}
    kept = sorted((findings / "dispatch").glob("*.finding.json"))
    assert len(kept) == 3
    facts = json.loads(kept[0].read_text())
    assert facts["kind"] == "LookupError"
    assert (kept[0].with_name(kept[0].name.partition(".")[0]) / "dispatch.json").exists()
    assert "LookupError" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nothing"])
