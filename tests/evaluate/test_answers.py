"""Questions taken out of conversations, and what counts as the right answer."""

from pathlib import Path

import mistral_common
import pytest
from tiny_runs import TOKENIZER, chat, tiny_model, write_jsonl

from minilora.data.encode import Sample, read_samples
from minilora.evaluate.answers import Answer, _said, answer_samples, has_prompt, split_last_turn
from minilora.tokenizer import load_tokenizer

TOKENIZERS = Path(mistral_common.__file__).parent / "data"


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    chats = [chat("how", "so"), chat("a", "b", "and then what", "c d"), chat("x y z", "tr a m o n t"), {"text": "raw"}]
    return read_samples(write_jsonl(tmp_path / "f.jsonl", chats), load_tokenizer(TOKENIZER), 100)


def test_a_prompt_is_all_before_the_last_answer(samples: list[Sample]) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    prompt, expected = split_last_turn(samples[1])
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, _ = tokenizer.encode_chat([*first, {"role": "user", "content": "and then what"}])
    assert prompt == ids
    assert tokenizer.decode(expected) == "c d"
    assert [*prompt, *expected, tokenizer.eos_id] == samples[1].tokens.tolist()


def test_raw_text_is_no_question(samples: list[Sample]) -> None:
    assert [has_prompt(sample) for sample in samples] == [True, True, True, False]


def test_answers_in_batches_are_answers_one_by_one(samples: list[Sample]) -> None:
    model, tokenizer, chats = tiny_model(), load_tokenizer(TOKENIZER), samples[:3]
    together = answer_samples(model, tokenizer, chats, 10, batch_size=8)
    assert together == [answer_samples(model, tokenizer, [sample], 10)[0] for sample in chats]
    assert [a.expected for a in together] == ["so", "c d", "tr a m o n t"]
    assert "and then what" in together[1].prompt
    assert answer_samples(model, tokenizer, [], 10) == []


def test_the_words_of_a_call_are_no_call() -> None:
    """[TOOL_CALLS] is a piece without text, so the text of both is the same."""
    v3 = load_tokenizer(TOKENIZERS / "mistral_instruct_tokenizer_240323.model.v3")
    words = v3.encode('[{"name": "f"}]')
    call = _said(v3, [5, *words])
    assert v3.decode([5, *words]) == _said(v3, words) == '[{"name": "f"}]'
    assert call == '[TOOL_CALLS] [{"name": "f"}]'
    assert _said(v3, [*words, 33_000]) == _said(v3, words), "nor has what no piece stands for"


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    answers = [
        Answer("p", "yes", " yes\n"),
        Answer("p", "yes", "yes."),
        Answer("p", "y es", "yes"),
        Answer("p", "A", "a"),
    ]
    assert [a.exact for a in answers] == [True, False, False, False]
