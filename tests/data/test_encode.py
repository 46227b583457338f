"""Samples: which tokens they hold, which of them are targets, and what does not fit."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest

from minilora.data.encode import Sample, encode_record, read_samples
from minilora.data.records import ChatRecord, TextRecord, as_jsonl
from minilora.errors import UserError
from minilora.tokenizer import Tokenizer, load_tokenizer

V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(V3)


def chat(*contents: str, where: str = "f:1", **more: Any) -> ChatRecord:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return ChatRecord(messages, more.get("tools"), where)


def learned(sample: Sample) -> str:
    return tokenizer().decode(sample.tokens[sample.target_mask])


def test_a_conversation_is_encode_chat() -> None:
    record = chat("What is 2+2?", "4", "And 3+3?", "6")
    samples, _ = encode_record(record, tokenizer(), 100)
    ids, targets = tokenizer().encode_chat(record.messages)
    assert (samples[0].tokens.tolist(), samples[0].target_mask.tolist()) == (ids, targets)
    assert (samples[0].length, samples[0].n_targets) == (len(ids) - 1, sum(targets))
    assert samples[0].where == "f:1"
    assert samples[0].tokens.dtype == np.int32
    assert samples[0].target_mask.dtype == np.bool_


@pytest.mark.parametrize("max_seq_len", [2, 3, 7, 16, 17, 18, 100])
def test_text_is_cut_so_that_every_token_is_a_target_once(max_seq_len: int) -> None:
    text = "The quick brown fox.\nJumps over 12 dogs."
    ids = tokenizer().encode_text(text)
    assert len(ids) == 17
    samples, _ = encode_record(TextRecord(text, "f:9"), tokenizer(), max_seq_len)
    targets = [i for sample in samples for i in sample.tokens[sample.target_mask].tolist()]
    assert targets == ids[1:]
    assert [sample.tokens[0] for sample in samples] == ids[:-1][::max_seq_len]
    assert not any(sample.target_mask[0] for sample in samples)
    assert all(sample.length == max_seq_len for sample in samples[:-1])
    assert 1 <= samples[-1].length <= max_seq_len


def test_a_conversation_that_just_fits_and_one_that_does_not() -> None:
    record = chat("Hello", "Hi there!", where="data.jsonl:7")
    length = len(tokenizer().encode_chat(record.messages)[0]) - 1
    assert len(encode_record(record, tokenizer(), length)[0]) == 1
    with pytest.raises(UserError, match=rf"data.jsonl:7: .* takes {length} positions, .* is {length - 1};"):
        encode_record(record, tokenizer(), length - 1)[0]


def test_a_conversation_too_long_is_left_out_whole(tmp_path: Path) -> None:
    records = [chat("a", "b" * 60 * n, where=f"f:{n}") for n in range(1, 5)]
    lengths = [len(tokenizer().encode_chat(record.messages)[0]) - 1 for record in records]
    counts = [(1, 0) if length <= 80 else (0, 1) for length in lengths]
    made = [encode_record(record, tokenizer(), 80, too_long="skip") for record in records]
    assert [(len(samples), n_left_out) for samples, n_left_out in made] == counts
    assert set(counts) == {(1, 0), (0, 1)}
    kept = [sample.where for samples, _ in made for sample in samples]
    (file := tmp_path / "f").write_text(as_jsonl(records))
    assert [sample.where for sample in read_samples(file, tokenizer(), 80, "skip")] == [f"{tmp_path}/{w}" for w in kept]
    with pytest.raises(UserError, match=r"/f:1: left out, as all that follow: .* 5 positions; raise it"):
        read_samples(file, tokenizer(), 5, "skip")


def test_what_the_tokenizer_refuses_has_its_line() -> None:
    record = ChatRecord([{"role": "tool", "content": "x"}] * 2, None, "data.jsonl:2")
    with pytest.raises(UserError, match=r"^data.jsonl:2: message 2: a tool result"):
        encode_record(record, tokenizer(), 100)
    with pytest.raises(UserError, match=r"^data.jsonl:3: .*surrogate"):
        encode_record(TextRecord("\ud800", "data.jsonl:3"), tokenizer(), 100)[0]


def test_with_tools_every_answer_is_a_sample_of_its_own() -> None:
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "weight": 0},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "content": "Two"},
        {"role": "assistant", "content": "again"},
    ]
    samples, _ = encode_record(ChatRecord(messages, [TOOL], "f:1"), tokenizer(), 200)
    assert [learned(sample) for sample in samples] == ['[{"name": "f", "arguments": {}}]', "Two\n\nagain"]
    whole, _ = tokenizer().encode_chat(messages, [TOOL])
    assert samples[-1].tokens.tolist() == whole
    assert all((sample.tokens == 6).sum() == 1 for sample in samples), "each has [AVAILABLE_TOOLS]"
    without, _ = encode_record(ChatRecord(messages, None, "f:1"), tokenizer(), 200)
    assert [sample.n_targets for sample in without] == [sum(tokenizer().encode_chat(messages)[1])]


def test_where_the_template_shows_no_tools_a_conversation_is_one_sample() -> None:
    v1 = load_tokenizer(V3.with_name("tokenizer.model.v1"))
    [sample], _ = encode_record(chat("One?", "1", "Two?", "2", tools=[TOOL]), v1, 200)
    [without], _ = encode_record(chat("One?", "1", "Two?", "2"), v1, 200)
    assert (sample.tokens.tolist(), sample.target_mask.tolist()) == (
        without.tokens.tolist(),
        without.target_mask.tolist(),
    )


def test_an_answer_behind_another_is_learned_alone() -> None:
    """Neighbours of unlike weights are two answers: each has its own </s>."""
    record = chat("One?", "first", tools=[TOOL])
    record.messages[-1]["weight"] = 1
    record.messages.append({"role": "assistant", "content": "second"})
    samples, _ = encode_record(record, tokenizer(), 200)
    assert [learned(sample) for sample in samples] == ["first", "second"]
    assert all(sample.tokens[-1] == tokenizer().eos_id and sample.target_mask[-1] for sample in samples)


def test_what_is_measured_has_a_target(tmp_path: Path) -> None:
    """v2 forgets calls before the last user's message, here all that could be learned."""
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "f"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c", "weight": 0},
    ]
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    v2 = load_tokenizer(V3.with_name("mistral_instruct_tokenizer_240216.model.v2"))
    with pytest.raises(UserError, match=r"f\.jsonl:1: no token to measure; drop the line"):
        read_samples(file, v2, 200)


def test_the_ids_of_last_calls_are_not_learned() -> None:
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}
    record = chat("Go")
    record.messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    samples, _ = encode_record(record, tokenizer(), 200)
    assert learned(samples[0]) == '[{"name": "f", "arguments": {}}]'


def test_an_answer_of_weight_0_at_the_end() -> None:
    record = chat("One?", "1", tools=[TOOL])
    record.messages.append({"role": "assistant", "content": "2", "weight": 0})
    samples, _ = encode_record(record, tokenizer(), 200)
    assert [learned(sample) for sample in samples] == ["1"]


def long_chat(*extra: dict[str, Any]) -> ChatRecord:
    system = {"role": "system", "content": "Be brief."}
    turns = chat(*(f"{'question' if i % 2 == 0 else 'answer'} {i // 2} {'word ' * 10}" for i in range(8))).messages
    return ChatRecord([system, *turns, *extra], None, "f:1")


def test_truncation_drops_the_oldest_exchanges_whole() -> None:
    record = long_chat()
    system, turns = record.messages[0], record.messages[1:]
    for kept in range(4, 0, -1):
        expected, _ = tokenizer().encode_chat([system, *turns[-2 * kept :]])
        more = len(tokenizer().encode_chat([system, *turns[-2 * kept - 2 :]])[0]) - 1 if kept < 4 else 500
        for room in (len(expected) - 1, more - 1):
            [sample], n_left_out = encode_record(record, tokenizer(), room, too_long="truncate")
            assert n_left_out == 0
            assert (sample.tokens.tolist(), sample.dropped) == (expected, 8 - 2 * kept)
    too_little = len(tokenizer().encode_chat([system, *turns[-2:]])[0]) - 2
    assert encode_record(record, tokenizer(), too_little, too_long="truncate") == ([], 1)


def test_truncation_keeps_calls_with_their_results_and_leaves_out_what_teaches_nothing() -> None:
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}"}}
    tail = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "content": "Done"},
    ]
    record = long_chat(*tail)
    expected, _ = tokenizer().encode_chat([record.messages[0], *tail])
    samples, _ = encode_record(record, tokenizer(), len(expected) + 10, too_long="truncate")
    assert samples[0].tokens.tolist() == expected
    masked = long_chat({"role": "user", "content": "Go"}, {"role": "assistant", "content": "No", "weight": 0})
    assert encode_record(masked, tokenizer(), 30, too_long="truncate") == ([], 1)


def test_truncation_lets_a_system_message_in_the_middle_be() -> None:
    record = long_chat()
    record.messages.insert(2, {"role": "system", "content": "Be kind."})
    samples, _ = encode_record(record, tokenizer(), 45, too_long="truncate")
    last = [m for i, m in enumerate(record.messages) if m["role"] == "system" or i >= 8]
    assert samples[0].tokens.tolist() == tokenizer().encode_chat(last)[0]


def test_answers_that_do_not_fit_are_counted() -> None:
    """With tools each answer is a sample: the first fits, the second does not even alone."""
    record = chat("One?", "1", "Two?", "word " * 60, tools=[TOOL])
    for too_long, kept in (("truncate", 1), ("skip", 0)):
        samples, n_left_out = encode_record(record, tokenizer(), 60, too_long)  # type: ignore[arg-type]
        assert (len(samples), n_left_out) == (kept, 2 - kept)
