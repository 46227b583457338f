"""What is wrong with data is found, with its line, and what is not wrong passes."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from tiny_runs import TINY, chat, write_jsonl

from minilora.config import DataConfig, ModelConfig
from minilora.data import check
from minilora.data.check import Data, figures, load_data, mended
from minilora.data.encode import Sample, encode_record
from minilora.data.pack import epoch_rows
from minilora.data.records import ChatRecord, TextRecord
from minilora.data.sources import FILE_KEYS
from minilora.errors import UserError
from minilora.tokenizer import Tokenizer, load_tokenizer

TOKENIZERS = Path(mistral_common.__file__).parent / "data"
V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
GOOD = [chat(f"question {n} about {'abcdefgh'[n % 8] * 9}", f"answer {n * 7919}") for n in range(40)]


@cache
def tokenizer(name: str = V3) -> Tokenizer:
    return load_tokenizer(TOKENIZERS / name)


def model(vocab_size: int = 32_768) -> ModelConfig:
    return replace(TINY, vocab_size=vocab_size)


def load(tmp_path: Path, rows: list[Any], name: str = V3, **changes: Any) -> Data:
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(str(train), max_seq_len=60)
    return load_data(replace(config, **changes), tokenizer(name), model(tokenizer(name).vocab_size))


def said(data: Data) -> list[tuple[str, str, bool]]:
    """(kind, "file:line" without the folder, whether it is a fault)."""
    return [(f.kind, f.where.rpartition("/")[2], f.fault) for f in data.findings]


def test_good_data_have_no_findings(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [chat("something else", "altogether")])
    data = load(tmp_path, [*GOOD, {"text": "some words"}], validation=str(held_out))
    assert data.findings == []
    data.refuse_faults()
    assert [len(data.samples[part]) for part in FILE_KEYS] == [41, 1, 0, 0, 0]
    assert data.mix is None


def test_every_bad_line_is_listed(tmp_path: Path) -> None:
    rows = [GOOD[0], {"messages": []}, {"prompt": "a", "response": ""}, GOOD[1], {"x": 1}]
    data = load(tmp_path, rows)
    assert said(data) == [("bad line", f"train.jsonl:{n}", True) for n in (2, 3, 5)]
    with pytest.raises(UserError, match=r"train.jsonl:2: its messages are empty; .* \(and 2 more: `minilora"):
        data.refuse_faults()


def test_bad_lines_are_skipped_up_to_a_cap(tmp_path: Path) -> None:
    data = load(tmp_path, [*GOOD, *[{"x": 1}] * 10], bad_lines="skip")
    assert data.faults == []
    assert list(data.warnings()) == [
        f"warning: 10 x bad line, the first: {tmp_path}/train.jsonl:41: "
        'no "messages", "text", or pair such as "prompt" and "response" in it; its keys are: x'
    ]
    assert len(load(tmp_path, [*GOOD, *[{"x": 1}] * 11], bad_lines="skip").faults) == 11


def test_a_line_is_bad_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    """It cannot be read, or the tokenizer refuses it, or its tokens are wrong; but for one that is too long."""
    refused = {"messages": [*chat("a", "b")["messages"], {"role": "tool", "content": "c"}, *chat("a", "b")["messages"]]}
    rows = [{"x": 1}, refused, chat("[INST] Hi", "Yo </s>"), {"text": "<s>a"}, chat("q", "z " * 80)]
    found = [("bad line", 41), ("not encoded", 42), ("template", 43), ("template", 44)]
    data = load(tmp_path, [*GOOD, *rows[:-1]], bad_lines="skip")
    assert said(data) == [(kind, f"train.jsonl:{n}", False) for kind, n in found]
    assert [line.split(", the first")[0] for line in data.warnings()] == [
        *("warning: 1 x bad line", "warning: 1 x not encoded", "warning: 2 x template")
    ]
    assert len(data.records["train"]) == len(data.samples["train"]) == len(GOOD)
    assert mended(data) == mended(load(tmp_path, [*GOOD, *rows[:-1]]))
    assert said(load(tmp_path, [*GOOD, *rows], bad_lines="skip"))[0] == ("not encoded", "train.jsonl:45", True)
    assert len(load(tmp_path, [*GOOD, *rows[:-1] * 3], bad_lines="skip").faults) == 12, "beyond ten"
    with pytest.raises(UserError, match=r"nothing to train on: every line is lost, the first: .*:1: no \"messages\""):
        load(tmp_path, rows[:-1], bad_lines="skip").refuse_faults()


def test_what_is_too_long(tmp_path: Path) -> None:
    short, long = [f"word {'x y ' * 4}{n}" for n in range(8)], "z " * 80
    rows = [chat(*short), chat("q", long)]
    assert said(load(tmp_path, rows)) == [("not encoded", f"train.jsonl:{n}", True) for n in (1, 2)]
    left_out = load(tmp_path, [*rows, GOOD[0]], too_long="skip")
    assert said(left_out) == [("too long", f"train.jsonl:{n}", False) for n in (1, 2)]
    shortened = load(tmp_path, rows, too_long="truncate")
    assert said(shortened) == [("shortened", "train.jsonl:1", False), ("too long", "train.jsonl:2", False)]
    assert [len(data.records["train"]) for data in (left_out, shortened)] == [1, 1], "those that gave samples"
    assert shortened.samples["train"][0].tokens[-1] == tokenizer().eos_id
    assert ("too long", "1 left out, 1 shortened") in figures(shortened, 60)
    with pytest.raises(UserError, match=r"every line is lost, the first: .*:1: left out, .* more than .* 60 pos"):
        load(tmp_path, rows[1:], too_long="skip").refuse_faults()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "<s>Once upon a time"}, "two bos"),
        ({"text": "<s>[INST] Hi [/INST] Yo</s>"}, "two bos"),
        ({"text": " [INST] Hi [/INST] Yo"}, r'the v3 template puts one there by itself; give "messages"'),
        (chat("[INST] Hi [/INST]", "Yo"), r"a written .\[INST\]."),
        (chat("Hi", "Yo</s>"), "ends with a written .</s>., which is not the token"),
        (chat("<s>Hi", "Yo"), "two bos"),
        ({"text": " " * 10**6 + "<s>" + " " * 10**6 + "[INST]"}, "two bos"),  # in a moment, not in hours
        ({"text": "\n" * 10**6 + "[INST]"}, r"a written .\[INST\]."),
    ],
)
def test_a_template_that_was_written_into_the_text(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    data = load(tmp_path, [GOOD[0], row])
    assert said(data) == [("template", "train.jsonl:2", True)]
    with pytest.raises(UserError, match=rf"train.jsonl:2: .*{says}"):
        data.refuse_faults()


@pytest.mark.parametrize(
    "row",
    [
        {"text": "In HTML, <s>this</s> is struck out"},
        chat("<s>old</s> new: what is struck out?", "old"),
        chat("What does Mistral's [INST] do?", "It begins [INST] a user's turn [/INST], and </s> ends yours."),
        {"text": "<s>" + " " * 10**6 + "x </s> y" + "\n" * 10**6},
    ],
)
def test_to_talk_about_a_template_is_no_fault(tmp_path: Path, row: dict[str, Any]) -> None:
    assert load(tmp_path, [row]).findings == []


TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *chat("a", "b", "c", "d")["messages"]]}


@pytest.mark.parametrize(
    ("row", "file", "says"),
    [
        (SYSTEM, V3, "the v3 template shows the system text to the last of 2 answers alone"),
        (SYSTEM | {"only_last": True}, V3, None),
        (SYSTEM | {"tools": [TOOL]}, V3, None),  # each answer is the last one of a sample
        (SYSTEM, V1, None),
        (SYSTEM | {"tools": [TOOL]}, V1, "the v1 template shows no tools; they are left out"),
    ],
)
def test_what_a_template_does_not_show_is_told(
    tmp_path: Path, row: dict[str, Any], file: Path, says: str | None
) -> None:
    train, tokens = str(write_jsonl(tmp_path / "train.jsonl", [row])), tokenizer(file)
    data = load_data(DataConfig(train), tokens, model(tokens.vocab_size))
    told = [f"{train}:1: {says}"] if says else []
    assert [(found.text, found.fault) for found in data.findings] == [(text, False) for text in told]


def test_template_and_model_of_unlike_versions(tmp_path: Path) -> None:
    raw = [{"text": "[INST] Hi [/INST] Yo"}]
    train = str(write_jsonl(tmp_path / "raw.jsonl", raw))
    assert load_data(DataConfig(train), tokenizer(V1), model(32_000)).findings == [], "that is v1's own template"
    for written in ("<s>[INST] Hi [/INST] Yo</s>", "<s>[INST] a [/INST] b</s> [INST] c [/INST] d</s>"):
        write_jsonl(tmp_path / "raw.jsonl", [{"text": written}])
        with pytest.raises(UserError, match="two bos"):
            load_data(DataConfig(train), tokenizer(V1), model(32_000)).refuse_faults()
    write_jsonl(tmp_path / "raw.jsonl", raw)
    with pytest.raises(
        UserError, match=r"v1: a v1 tokenizer of 32,000 pieces, but the model's vocabulary has 32,768; "
    ):
        load_data(DataConfig(train), tokenizer(V1), model()).refuse_faults()
    with pytest.raises(
        UserError, match=r"v3: a v3 tokenizer of 32,768 pieces, but the model's vocabulary has 32,000; "
    ):
        load_data(DataConfig(train), tokenizer(), model(32_000)).refuse_faults()


def test_a_padded_vocabulary_is_told(tmp_path: Path) -> None:
    train = str(write_jsonl(tmp_path / "chats.jsonl", [chat("Hi", "Yo")]))
    data = load_data(DataConfig(train), tokenizer(V1), model(32_002))
    data.refuse_faults()
    (warning,) = data.warnings()
    assert f"{V1}: the model's vocabulary has 2 more, padding or added tokens" in warning


def test_samples_that_would_teach_the_wrong_thing() -> None:
    """Our own encoding makes none of these; the check is what holds it to that."""
    [good], _ = encode_record(ChatRecord(chat("Hi", "Yo")["messages"], None, "f:1"), tokenizer(), 60)
    tokens, mask = good.tokens, good.target_mask

    def faults(tokens: Any, mask: Any) -> str:
        return " ".join(check._sample_faults(Sample(np.array(tokens), np.array(mask), "f:1"), tokenizer()))

    assert faults(tokens, mask) == ""
    assert "cut, or its end is masked" in faults(tokens[:-1], mask[:-1])
    assert "cut, or its end is masked" in faults(tokens, [*mask[:-1], False])
    assert "no token to train on" in faults(tokens, mask & False)
    assert "two bos" in faults([1, *tokens], [False, *mask])
    [text], _ = encode_record(TextRecord("some words", "f:1"), tokenizer(), 60)
    assert faults(text.tokens[:-1], text.target_mask[:-1]) == "", "a piece of a document has no end"


def test_leaks_and_duplicates_name_both_lines(tmp_path: Path) -> None:
    essay = " ".join(f"word{n}" for n in range(40))
    near, nearer = {"text": essay + " one"}, {"text": essay + " two"}
    held_out = write_jsonl(tmp_path / "test.jsonl", [GOOD[3], nearer, chat("new", "one")])
    data = load(tmp_path, [*GOOD[:5], GOOD[1], near], test=str(held_out), max_seq_len=500)
    assert sorted(said(data)) == [
        ("duplicate", "train.jsonl:6", False),
        ("leak", "train.jsonl:4", True),
        ("near leak", "train.jsonl:7", False),
    ]
    leak, near_leak = (next(f.text for f in data.findings if f.kind == kind) for kind in ("leak", "near leak"))
    assert ": nearly the same text, answers and all, as " in near_leak, "which is what is compared"
    assert leak == (
        f"{tmp_path}/train.jsonl:4: the same record as {tmp_path}/test.jsonl:1, "
        "which data.test measures on; drop it here"
    )


def test_each_record_that_is_near_a_held_out_one_is_told(tmp_path: Path) -> None:
    """However many they are, and near each other."""
    essay = " ".join(f"word{n}" for n in range(40))
    held_out = write_jsonl(tmp_path / "test.jsonl", [{"text": f"{essay} test"}])
    data = load(tmp_path, [{"text": f"{essay} {n}"} for n in range(10, 20)], test=str(held_out), max_seq_len=500)
    leaks = [finding for finding in data.findings if finding.kind == "near leak"]
    assert [finding.where for finding in leaks] == [f"{tmp_path}/train.jsonl:{n}" for n in range(1, 11)]
    assert "--fix keeps it" in leaks[0].text
    assert mended(data)[0].count("\n") == 10


def test_what_validation_and_test_share_is_told(tmp_path: Path) -> None:
    for name in ("validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [chat("the same", "in both")])
    parts = {name: str(tmp_path / f"{name}.jsonl") for name in ("validation", "test")}
    assert said(load(tmp_path, GOOD, **parts)) == [("duplicate", "validation.jsonl:1", False)]


def test_answers_that_are_left_out_are_told(tmp_path: Path) -> None:
    row = chat("One?", "1", "Two?", "word " * 60) | {"tools": [TOOL]}
    data = load(tmp_path, [row], too_long="truncate")
    assert [finding.text for finding in data.findings] == [
        f"{tmp_path}/train.jsonl:1: too long, 1 answers are left out"
    ]
    assert ("too long", "0 left out, 1 shortened") in figures(data, 60)


def test_general_text_that_is_empty_is_a_fault(tmp_path: Path) -> None:
    general = str(write_jsonl(tmp_path / "general.jsonl", [{"x": 1}]))
    with pytest.raises(UserError, match=r"data.general has no sample; name another file$"):
        load(tmp_path, GOOD, general=general, bad_lines="skip").refuse_faults()


@pytest.mark.parametrize("part", ["validation", "test", "general"])
def test_only_what_is_trained_on_has_a_weight(tmp_path: Path, part: str) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [chat("new", "one")])
    with pytest.raises(UserError, match=rf"data.{part}: .*other.jsonl has the weight 3, but only the sources"):
        load(tmp_path, GOOD, **{part: f"{other}:3"})


def test_replayed_text_leaks_too(tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "general words"}])
    data = load(tmp_path, GOOD, test=str(other), replay=0.1, replay_from=str(other))
    assert said(data) == [("leak", "other.jsonl:1", True)]


def test_a_split_takes_each_record_once_and_equal_ones_together(tmp_path: Path) -> None:
    data = load(tmp_path, [*GOOD, *GOOD], validation_share=0.3, test_share=0.2)
    assert data.faults == [], "nothing leaks"
    sizes = [len(data.records[part]) for part in ("train", "validation", "test")]
    assert sum(sizes) == 80
    assert min(sizes) > 0
    assert all(size % 2 == 0 for size in sizes)
    with pytest.raises(UserError, match=r"data.test has no sample; name another file, or a larger data.test_share"):
        load(tmp_path, GOOD[:3], test_share=1e-6).refuse_faults()


def test_weights_and_replay_become_a_mix(tmp_path: Path) -> None:
    a, b, general = (
        str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        for name, rows in {"a": GOOD[:10], "b": GOOD[10:15], "g": [{"text": "words " * 90}]}.items()
    )
    data = load(tmp_path, [], train=(f"{a}:1", f"{b}:3"), replay=0.2, replay_from=general)
    n_pieces = len(data.samples["replay_from"])
    assert n_pieces > 1
    assert data.mix == check.Mix((10, 5, n_pieces), (1.0, 3.0), 0.2)
    assert [s.where.rpartition("/")[2][:1] for s in data.learnt] == [*"a" * 10, *"b" * 5, *"g" * n_pieces]
    assert load(tmp_path, [], train=(a, b)).mix is None
    assert load(tmp_path, [], train=(a, f"{b}:3")).mix == check.Mix((10, 5), (1.0, 3.0))
    twice = load(tmp_path, [], train=(a, b), replay=0.2, replay_from=(general, general))
    assert twice.mix == check.Mix((10, 5, 2 * n_pieces), None, 0.2)


def test_the_mended_copy_passes(tmp_path: Path) -> None:
    damaged = {"messages": [*chat("keep", "this")["messages"], {"role": "user", "content": ""}]}
    alpaca = {"instruction": "Add.", "input": "1", "output": "2"}
    rows = [GOOD[0], GOOD[0], damaged, alpaca, {"prompt": "a", "response": ""}, chat("b", "c </s>"), GOOD[1]]
    held_out = str(write_jsonl(tmp_path / "test.jsonl", [GOOD[1]]))
    path = tmp_path / "train.jsonl"
    write_jsonl(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"half a l")
    config = DataConfig(str(path), test=held_out)
    assert Counter(f.kind for f in load_data(config, tokenizer(), model()).faults) == {
        "bad line": 3, "template": 1, "leak": 1,
    }  # fmt: skip
    text, left_out = mended(load_data(config, tokenizer(), model(), mend=True))
    assert [json.loads(line)["messages"] for line in text.splitlines()] == [
        GOOD[0]["messages"], chat("keep", "this")["messages"], chat("Add.\n1", "2")["messages"],
    ]  # fmt: skip
    assert left_out == {"duplicate": 1, "bad line": 2, "template": 1, "leak": 1}
    (tmp_path / "fixed.jsonl").write_text(text)
    again = load_data(replace(config, train=str(tmp_path / "fixed.jsonl")), tokenizer(), model())
    assert again.findings == []


def test_a_mended_copy_keeps_what_differs_in_what_is_learned(tmp_path: Path) -> None:
    """One chat may stand in two rows, with another answer to be learned in each."""
    rows = [{"messages": [dict(m) for m in chat("a", "b", "c", "d")["messages"]]} for _ in range(3)]
    for row, at in zip(rows, (1, 3, 3), strict=True):
        row["messages"][at]["weight"] = 0
    text, left_out = mended(load(tmp_path, rows))
    assert [json.loads(line) for line in text.splitlines()] == rows[:2]
    assert left_out == {"duplicate": 1}


def test_what_a_mended_copy_lacks_is_counted(tmp_path: Path) -> None:
    """Of a file that is named twice one copy stays, of a leak none, and duplicates in other files do not count."""
    long = chat("q", "z " * 80)
    path = str(write_jsonl(tmp_path / "train.jsonl", [*GOOD[:3], GOOD[2], {"x": 1}, long]))
    held_out = str(write_jsonl(tmp_path / "test.jsonl", [GOOD[2], chat("new", "one"), chat("new", "one")]))
    config = DataConfig((path, path), test=held_out, bad_lines="skip", too_long="skip", max_seq_len=60)
    text, left_out = mended(load_data(config, tokenizer(), model()))
    assert [json.loads(line) for line in text.splitlines()] == GOOD[:2]
    assert left_out == {"bad line": 1, "too long": 1, "leak": 1, "duplicate": 2 + 2}


def test_figures_by_hand(tmp_path: Path) -> None:
    data = load(tmp_path, [chat("Hi", "Yo"), chat("Hi there", "Yo ho")])
    lengths = [sample.length for sample in data.samples["train"]]
    n_targets = sum(sample.n_targets for sample in data.samples["train"])
    held_out = str(write_jsonl(tmp_path / "test.jsonl", [chat("new", "one")]))
    found = dict(figures(load(tmp_path, [chat("Hi", "Yo"), chat("Hi there", "Yo ho")], test=held_out), 60))
    assert " of them measured on (" in found["test"]
    assert found["train"] == (
        f"2 samples, {sum(lengths)} tokens, {n_targets} of them trained on ({n_targets / sum(lengths):.1%})"
    )
    assert found["lengths"].startswith(f"min {min(lengths)}, median {max(lengths)}")
    assert found["packing"] == f"1 rows of 60 in an epoch, {sum(lengths) / 60:.1%} of the slots are tokens"


def test_an_epoch_is_packed_by_its_seed(tmp_path: Path) -> None:
    rows = [chat("ab" * (n % 19 + 1), "c") for n in range(40)]
    more = write_jsonl(tmp_path / "more.jsonl", [chat("x" * 40, f"{n}") for n in range(9)])
    data = load(tmp_path, rows, train=(f"{tmp_path}/train.jsonl:1", f"{more}:1"))
    lengths = [sample.length for sample in data.learnt]
    packed = [len(epoch_rows(lengths, 60, seed, epoch=0, mix=data.mix)) for seed in range(8)]
    assert len(set(packed)) > 1
    said = [dict(figures(data, 60, seed))["packing"] for seed in range(8)]
    assert [int(text.partition(" ")[0]) for text in said] == packed


def test_a_sample_beyond_the_models_positions_is_told_once(tmp_path: Path) -> None:
    load(tmp_path, [chat("a", "b"), chat("a", "b c " * 9), chat("d", "e " * 12)])
    config, longest = DataConfig(f"{tmp_path}/train.jsonl", max_seq_len=60), 0
    for known in (60, 10):
        data = load_data(config, tokenizer(), replace(model(), max_seq_len=known))
        longest = max(sample.length for sample in data.learnt)
        warned = [f"warning: 1 x long sample, the first: {tmp_path}/train.jsonl:2: the longest sample takes {longest}"]
        assert [line.partition(" positions")[0] for line in data.warnings()] == (warned if known < longest else [])
    assert 10 < longest < 60
