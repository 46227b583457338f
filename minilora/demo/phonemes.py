"""IPA as sounds, and how far an answer is from the expected ones: what the demo's task is measured by.

A sound is one symbol, or two that are one sound in English; a stress mark is one of its own. The words are of the CMU
Pronouncing Dictionary (`benchmarks/demo_base/` made the data from it, and the base).
"""

import re
from pathlib import Path

DATA = Path(__file__).parent / "data"

# Longest first: a diphthong or an affricate is one sound. Anything else counts as one, character by character.
_PHONEME = re.compile("tʃ|dʒ|aʊ|aɪ|eɪ|oʊ|ɔɪ|.", re.DOTALL)


def phonemes(ipa: str) -> list[str]:
    """The sounds of an IPA string. A stress mark is one of them, so that no errors means an exact match."""
    return _PHONEME.findall(ipa)


def phoneme_errors(answer: str, expected: str) -> tuple[int, int]:
    """(edits that turn answer into expected, phonemes expected): the phoneme error rate is the ratio of their sums.

    The edits are Levenshtein's: a sound inserted, left out or taken for another costs one.
    """
    wanted = phonemes(expected)
    costs = list(range(len(wanted) + 1))  # of turning the answer so far into each prefix of `wanted`
    for n_heard, heard in enumerate(phonemes(answer), start=1):
        diagonal, costs[0] = costs[0], n_heard
        for i, sound in enumerate(wanted, start=1):
            diagonal, costs[i] = costs[i], min(costs[i] + 1, costs[i - 1] + 1, diagonal + (sound != heard))
    return costs[-1], len(wanted)


def raw_prompt(word: str) -> str:
    """The beginning of a raw line that the base goes on with in IPA.

    The space at its end chooses the alphabet: it is the token "▁", where ARPAbet goes on with "▁M" or "▁IH1".
    """
    return f'"{word}" '
