"""IPA as sounds, and how far an answer is from the expected ones: what the demo's task is measured by.

A sound is one symbol of the table below, a stress mark one of its own. The table goes from ARPAbet, the alphabet of the
CMU Pronouncing Dictionary, whose words the demo's data are (`benchmarks/demo_base/` made them, and the base).
"""

import re
from pathlib import Path

DATA = Path(__file__).parent / "data"

CONSONANTS = {
    "B": "b", "CH": "tʃ", "D": "d", "DH": "ð", "F": "f", "G": "ɡ", "HH": "h", "JH": "dʒ",
    "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ", "P": "p", "R": "ɹ", "S": "s",
    "SH": "ʃ", "T": "t", "TH": "θ", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ",
}  # fmt: skip

VOWELS = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "AW": "aʊ", "AY": "aɪ", "EH": "ɛ", "ER": "ɝ", "EY": "eɪ",
    "IH": "ɪ", "IY": "i", "OW": "oʊ", "OY": "ɔɪ", "UH": "ʊ", "UW": "u",
}  # fmt: skip

# Two vowels lose their colour without stress: "about" begins with AH0, "butter" ends in ER0.
REDUCED_VOWELS = {"AH0": "ə", "ER0": "ɚ"}

STRESS_MARKS = {"0": "", "1": "ˈ", "2": "ˌ"}

# Longest first: a diphthong or an affricate is one sound. Anything unknown counts as one, character by character.
_PHONEME = re.compile("|".join([s for s in (CONSONANTS | VOWELS).values() if len(s) > 1] + ["."]), re.DOTALL)


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
