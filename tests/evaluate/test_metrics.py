"""Task metrics against the libraries that own them, and against naive loops."""

import sys
from collections import Counter

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from minilora.config import EvalConfig
from minilora.errors import UserError
from minilora.evaluate.answers import Answer
from minilora.evaluate.metrics import check_libraries, figure_names, score, token_f1, tokens

ENGLISH = [
    ("the cat sat on the mat", "The cat sat on a mat."),
    ("a quick brown fox", "the quick brown fox jumps over the lazy dog"),
    ("nothing in common", "something else entirely here"),
    ("It costs 3.50 dollars, he said", "It costs 3.50 dollars, he said"),
]
CHINESE = [
    ("今天天气很好,我们去公园", "今天天气不错,我们一起去公园玩"),
    ("这条裙子很美", "这条裙子采用蕾丝设计,很美"),
    ("版型显瘦", "版型显瘦"),
]


def answers(pairs: list[tuple[str, str]]) -> list[Answer]:
    return [Answer("?", expected, given) for given, expected in pairs]


@pytest.mark.parametrize(("pairs", "tokenize"), [(ENGLISH, "13a"), (CHINESE, "zh"), ([("?", "!")], "13a")])
def test_bleu_is_sacrebleu_s(pairs: list[tuple[str, str]], tokenize: str) -> None:
    given, expected = zip(*pairs, strict=True)
    figures, each = score(answers(pairs), ["bleu"])
    theirs = sacrebleu.corpus_bleu(given, [expected], tokenize=tokenize)
    assert figures["bleu"] == theirs.score
    assert f"tok:{tokenize}" in figures["bleu_signature"]
    for row, (g, e) in zip(each, pairs, strict=True):
        assert row["bleu"] == sacrebleu.sentence_bleu(g, [e], tokenize=tokenize).score


def test_rouge_is_rouge_score_s_where_words_are_words() -> None:
    """Its own tokenizer keeps a to z and digits, which is all that these have."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    figures, each = score(answers(ENGLISH), ["rouge"])
    for row, (given, expected) in zip(each, ENGLISH, strict=True):
        theirs = scorer.score(expected, given)
        assert row == {kind: theirs[kind].fmeasure for kind in theirs}
    assert figures["rougeL"] == pytest.approx(sum(row["rougeL"] for row in each) / len(each))


def test_rouge_of_chinese_is_of_its_characters() -> None:
    """Written with spaces between the characters, the library sees the same words; its own tokenizer would see none."""

    class BySpace:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=BySpace())
    _, each = score(answers(CHINESE), ["rouge"])
    for row, (given, expected) in zip(each, CHINESE, strict=True):
        spaced = [" ".join(c for c in text if c not in ",,") for text in (expected, given)]
        assert row == {kind: value.fmeasure for kind, value in scorer.score(*spaced).items()}
    assert each[1]["rouge1"] > 0.5


def test_f1_by_a_naive_loop() -> None:
    for given, expected in ENGLISH + CHINESE:
        left, common = tokens(expected), 0
        for token in tokens(given):
            if token in left:
                left.remove(token)
                common += 1
        precision, recall = common / len(tokens(given)), common / len(tokens(expected))
        wanted = 2 * precision * recall / (precision + recall) if common else 0.0
        assert token_f1(given, expected) == pytest.approx(wanted)


def test_f1_where_there_are_no_tokens() -> None:
    assert token_f1("", "word") == token_f1("word", "") == 0.0
    assert token_f1(" ? ", "?") == 1.0
    assert token_f1("?", "!") == 0.0


def test_tokens() -> None:
    assert tokens("Don't 3.5 naïve Ärger") == ["don", "t", "3", "5", "naïve", "ärger"]
    assert tokens("我是Bob,你好!ＡＢ") == ["我", "是", "bob", "你", "好", "ab"]
    assert tokens("カタ ひら") == ["カ", "タ", "ひ", "ら"]
    assert tokens("한국어 हिन्दी") == ["한국어", "हिन्दी"]  # written with spaces; vowel signs belong to their word
    assert Counter(tokens("...")) == Counter()


def test_all_of_them_at_once_and_none() -> None:
    figures, each = score(answers(ENGLISH), ["exact_match", "f1", "bleu", "rouge"])
    assert list(figures) == ["exact_match", "f1", "bleu", "rouge1", "rouge2", "rougeL", "bleu_signature"]
    assert figure_names(["exact_match", "f1", "bleu", "rouge"]) == list(figures)[:-1]
    assert figures["exact_match"] == 0.25
    assert [row["exact_match"] for row in each] == [0, 0, 0, 1]
    assert score([], ["f1", "bleu"]) == ({}, [])
    assert score(answers(ENGLISH), []) == ({}, [{}] * 4)


def test_a_library_that_is_missing_and_a_metric_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    check_libraries(["bleu", "rouge"])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr("minilora.errors.find_spec", lambda name: None if name == "sacrebleu" else object())
    with pytest.raises(UserError, match=r'"bleu" needs sacrebleu.*pip install .minilora\[eval\]'):
        check_libraries(["exact_match", "bleu"])
    check_libraries(["exact_match", "f1", "rouge"])
    with pytest.raises(UserError, match=r"eval\.metrics names 'blue'; there are exact_match, f1, bleu, rouge"):
        EvalConfig(metrics=("blue",))
