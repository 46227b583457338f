"""Task metrics: how near generated answers are to the expected ones.

    exact_match   share of answers that are, but for white space at the ends, what is expected
    f1            P = common tokens / given tokens, R = common / expected, F1 = 2 P R / (P + R), as SQuAD has it
    bleu          of all answers together, by sacrebleu, from 0 to 100; `bleu_signature` says how
    rouge         ROUGE-1, -2 and -L, the F measures of rouge_score

All but BLEU lie between 0 and 1, and are means over the answers. F1 and ROUGE cut text into tokens alike (`tokens`);
SQuAD would also leave out "a", "an" and "the", which no other language has.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import Any
from unicodedata import category, normalize
from unicodedata import name as name_of

from minilora.errors import need_library
from minilora.evaluate.answers import Answer

ROUGE = ("rouge1", "rouge2", "rougeL")
LIBRARIES = {"bleu": "sacrebleu", "rouge": "rouge_score"}
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA")  # how Unicode begins the names of such letters


def check_libraries(names: Collection[str]) -> None:
    """Raises UserError if a metric needs a library that is not installed."""
    for metric in sorted(LIBRARIES.keys() & names):
        need_library(LIBRARIES[metric], "eval", f'the metric "{metric}"')


def figure_names(names: Collection[str]) -> list[str]:
    """What `score` calls the figures of these metrics."""
    return [figure for name in names for figure in (ROUGE if name == "rouge" else (name,))]


def tokens(text: str) -> list[str]:
    """The tokens of a text, in small letters: each Chinese character or kana is one, of other scripts each run of
    letters, digits and marks.

    What is between them, such as punctuation, separates. Full-width letters and digits are as the usual ones (NFKC).
    """
    text = normalize("NFKC", text).lower()
    return "".join(f" {c} " if _stands_alone(c) else c if category(c)[0] in "LMN" else " " for c in text).split()


def token_f1(given: str, expected: str) -> float:
    """F1 of the tokens of two texts. Where neither has one, such as "?" and "!", 1 if they are the same, else 0."""
    a, b = Counter(tokens(given)), Counter(tokens(expected))
    if not a and not b:
        return float(given.strip() == expected.strip())
    return 2 * (a & b).total() / (a.total() + b.total())


def score(answers: Sequence[Answer], names: Collection[str]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The metrics named, of all answers and of each. `bleu` of one answer is smoothed, and no part of the whole's."""
    each: dict[str, list[float]] = {}
    whole: dict[str, Any] = {}
    if not answers:
        return {}, []
    if "exact_match" in names:
        each["exact_match"] = [float(a.exact) for a in answers]
    if "f1" in names:
        each["f1"] = [token_f1(a.given, a.expected) for a in answers]
    if "bleu" in names:
        each["bleu"], whole = _bleu(answers)
    if "rouge" in names:
        each |= _rouge(answers)
    figures = {key: fmean(values) for key, values in each.items()} | whole
    return figures, [{key: values[i] for key, values in each.items()} for i in range(len(answers))]


def _bleu(answers: Sequence[Answer]) -> tuple[list[float], dict[str, Any]]:
    """BLEU of each answer, and of all together with its signature.

    sacrebleu's tokenization is "zh" where half of the expected tokens or more are Chinese, else "13a".
    """
    from sacrebleu.metrics.bleu import BLEU

    words = [token for a in answers for token in tokens(a.expected)]
    chinese = 2 * sum(map(_stands_alone, words)) >= len(words) > 0
    bleu, one = (BLEU(tokenize="zh" if chinese else "13a", effective_order=effective) for effective in (False, True))
    given, expected = [a.given for a in answers], [a.expected for a in answers]
    each = [one.sentence_score(*pair).score for pair in zip(given, ([text] for text in expected), strict=True)]
    return each, {"bleu": bleu.corpus_score(given, [expected]).score, "bleu_signature": str(bleu.get_signature())}


def _rouge(answers: Sequence[Answer]) -> dict[str, list[float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=SimpleNamespace(tokenize=tokens))
    scores = [scorer.score(a.expected, a.given) for a in answers]
    return {kind: [float(row[kind].fmeasure) for row in scores] for kind in scores[0]}


def _stands_alone(token: str) -> bool:
    """Whether it is a character of a script that puts no spaces between words."""
    return len(token) == 1 and token.isalpha() and name_of(token, "").startswith(WITHOUT_SPACES)
