"""Names of sources, fingerprints, and the split that stays where it is."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from minilora.config import DataConfig, EvalConfig, RunConfig
from minilora.data.records import Record, TextRecord, parse_row
from minilora.data.sources import Source, fingerprints, normal_form, read_source, side, sources
from minilora.errors import UserError

TEXTS: list[Record] = [TextRecord(f"text number {n}", f"f:{n}") for n in range(2000)]


def test_names_and_weights(tmp_path: Path) -> None:
    assert sources(None) == sources("") == []
    assert sources("a.jsonl") == [Source("a.jsonl")]
    named = ("a.jsonl:2", "/x/b.csv:0.5", "c.jsonl:1e-3", "odd:name.jsonl", "d.jsonl")
    expected = [("a.jsonl", 2.0), ("/x/b.csv", 0.5), ("c.jsonl", 1e-3), ("odd:name.jsonl", None), ("d.jsonl", None)]
    assert sources(named) == [Source(*pair) for pair in expected]
    there = tmp_path / "data:2"
    there.touch()
    assert sources(str(there)) == [Source(str(there))]
    assert sources(f"{there}:3") == [Source(str(there), 3.0)]
    assert sources("~nobody-of-this-name/x:2") == [Source("~nobody-of-this-name/x", 2.0)]
    for weight in ("0", "-1", "1e20"):
        with pytest.raises(UserError, match=rf"a.jsonl:{weight}: the weight of a source is {weight}, but must be"):
            sources(f"a.jsonl:{weight}")


def test_fingerprints_know_each_file_and_its_weight(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    a, b = (str(tmp_path / name) for name in "ab")
    digests = [sha256(name).hexdigest() for name in (b"a", b"b")]
    assert fingerprints(RunConfig(data=DataConfig(a, b))) == {"train": digests[0], "validation": digests[1]}
    replayed = RunConfig(data=DataConfig(a, replay_from=b, replay=0.5))
    assert fingerprints(replayed) == {"train": digests[0], "replay_from": digests[1]}
    unread = replace(replayed, data=replace(replayed.data, replay=0.0, replay_from=str(tmp_path / "gone")))
    assert fingerprints(unread) == {"train": digests[0]}
    several = fingerprints(RunConfig(data=DataConfig((a, f"{b}:3"))))["train"]
    assert several == {"1": {"sha256": digests[0], "weight": None}, "2": {"sha256": digests[1], "weight": 3.0}}


def test_fingerprints_know_how_each_file_is_read(tmp_path: Path) -> None:
    same = [tmp_path / name for name in ("d.jsonl", "d.json", "d.txt", "d.CSV", "e.csv")]
    for path in same:
        path.write_text("{}")
    jsonl, json_, txt, upper, csv = (fingerprints(RunConfig(data=DataConfig(str(path))))["train"] for path in same)
    assert jsonl == json_ == sha256(b"{}").hexdigest()
    assert (txt, upper, csv) == (f"{jsonl}.txt", f"{jsonl}.csv", f"{jsonl}.csv")
    assert fingerprints(RunConfig(data=DataConfig(f"{same[2]}:2")))["train"]["1"]["sha256"] == txt
    probes = EvalConfig(probes=str(same[2]))
    assert fingerprints(RunConfig(eval=probes)) == {"probes": jsonl}, "they are read by lines anyway"
    assert fingerprints(RunConfig(eval=replace(probes, samples=0))) == {}, "nobody asks them"


def test_a_source_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nno\n{"text": ""}\n{"text": "b"}\n')
    records, bad = read_source(str(path))
    assert [record.where for record in records] == [f"{path}:1", f"{path}:4"]
    assert [line.partition(": ")[0] for line in bad] == [f"{path}:2", f"{path}:3"]


def test_the_split_has_its_shares_and_a_seed() -> None:
    config = DataConfig("f", validation_share=0.2, test_share=0.1)
    sides = [side(record, config) for record in TEXTS]
    assert sides.count("validation") == pytest.approx(400, abs=60)
    assert sides.count("test") == pytest.approx(200, abs=45)
    assert sides != [
        side(record, DataConfig("f", validation_share=0.2, test_share=0.1, split_seed=1)) for record in TEXTS
    ]
    assert {side(record, DataConfig("f")) for record in TEXTS} == {"train"}


def test_a_record_moves_for_no_other_and_not_for_more_white_space() -> None:
    config = DataConfig("f", validation_share=0.5)
    for n, record in enumerate(TEXTS[:50]):
        again = TextRecord(f" text  number\n{n} ", "g:1")
        assert side(again, config) == side(record, config)
    wider = DataConfig("f", validation_share=0.6)
    moved = [(side(r, config), side(r, wider)) for r in TEXTS]
    assert ("validation", "train") not in moved, "a larger share takes none back"


def test_records_are_equal_by_what_is_said() -> None:
    def form(row: str) -> str:
        return normal_form(parse_row(json.loads(row), "f:1"))

    pair = form('{"prompt": "Hi  there", "response": "Yo"}')
    assert pair == form(
        '{"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yo"}]}'
    )
    assert pair != form('{"prompt": "hi there", "response": "Yo"}')
    assert pair != form('{"prompt": "Hi there Yo", "response": "Yo"}')
