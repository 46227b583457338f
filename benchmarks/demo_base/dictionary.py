"""How English words sound: the CMU Pronouncing Dictionary, in ARPAbet and in IPA, split into read and unseen words.

The dictionary spells sounds in ARPAbet, one code a sound, with the stress as a digit on each vowel:

    mistral  M IH1 S T R AH0 L      becomes      ˈmɪstɹəl

Here the sounds become IPA, and the digits the marks ˈ (primary, 1) and ˌ (secondary, 2). A mark stands where its
syllable begins: before as many of the consonants in front of the vowel as can open an English syllable (maximal
onset). So the IPA is a function of the ARPAbet, and on this dictionary it loses nothing.

Data: https://github.com/cmusphinx/cmudict, unchanged but for xz, its licence (BSD) beside it.
"""

import hashlib
import lzma
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo_base.arpabet import CONSONANTS, REDUCED_VOWELS, STRESS_MARKS, VOWELS
from minilora.demo.phonemes import raw_prompt

DICTIONARY = Path(__file__).parent / "cmudict.dict.xz"

# The pairs and triples of consonants that open English syllables, names from German included ("Schmidt").
ONSETS = {
    "bj", "bl", "bɹ", "dw", "dɹ", "fj", "fl", "fɹ", "hj", "kj", "kl", "kw", "kɹ", "mj", "nj", "pj", "pl", "pɹ",
    "sf", "sk", "skj", "skl", "skw", "skɹ", "sl", "sm", "sn", "sp", "spj", "spl", "spɹ", "st", "stɹ", "sw",
    "tw", "tɹ", "vj", "ɡl", "ɡw", "ɡɹ", "ʃl", "ʃm", "ʃn", "ʃw", "ʃɹ", "θw", "θɹ",
}  # fmt: skip

# Plain words only: no possessives, no abbreviations with dots, no second pronunciations ("word(2)").
_PLAIN_WORD = re.compile("[a-z]{3,14}")

N_CHAT, N_VALIDATION, N_TEST, N_HELD_OUT = 2000, 300, 300, 1000


# --- The dictionary -----------------------------------------------------------------------------------------------


def read_dictionary(path: Path = DICTIONARY) -> dict[str, str]:
    """word -> its first pronunciation in ARPAbet, for the plain words of 3 to 14 letters, in alphabetical order."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        entries = (line.split("#")[0].split(maxsplit=1) for line in file)
        return {word: sounds.strip() for word, sounds in sorted(entries) if _PLAIN_WORD.fullmatch(word)}


def to_ipa(arpabet: str) -> str:
    """The same sounds in IPA: "M IH1 S T R AH0 L" -> "ˈmɪstɹəl"."""
    ipa: list[str] = []
    onset = 0  # where in `ipa` the consonants since the last vowel begin
    for code in arpabet.split():
        if code in CONSONANTS:
            ipa.append(CONSONANTS[code])
            continue
        vowel, stress = code[:-1], code[-1]
        if mark := STRESS_MARKS[stress]:
            ipa.insert(_syllable_start(ipa, onset), mark)
        ipa.append(REDUCED_VOWELS.get(code, VOWELS[vowel]))
        onset = len(ipa)
    return "".join(ipa)


def _syllable_start(ipa: list[str], onset: int) -> int:
    """First index from `onset` on whose consonants, all up to the end, can open a syllable."""
    if onset == 0:
        return 0  # a word's own beginning is its first syllable's, however odd
    return next(i for i in range(onset, len(ipa) + 1) if _opens_syllable(ipa[i:]))


def _opens_syllable(consonants: list[str]) -> bool:
    if len(consonants) > 1:
        return "".join(consonants) in ONSETS
    return consonants != ["ŋ"]


# --- Which words stand where --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Words by what is done with them.

    pretraining: the base reads them
    chat: those of them that the demo asks about in training, to bring out what the base knows
    validation, test: asked about to measure, never read
    held_out: the base's own perplexity is measured on their raw lines; never read
    """

    pretraining: list[str]
    chat: list[str]
    validation: list[str]
    test: list[str]
    held_out: list[str]


def split_words(words: Iterable[str]) -> Split:
    """The one split of the dictionary: the order of the words' hashes decides, on every machine and Python alike."""
    order = sorted(words, key=by_hash)
    n_unseen = N_VALIDATION + N_TEST + N_HELD_OUT
    unseen, rest = order[:n_unseen], order[n_unseen:]
    hidden = frozenset(unseen)
    pretraining = [word for word in rest if not _is_plural(word, hidden)]
    return Split(
        pretraining=pretraining,
        chat=pretraining[:N_CHAT],
        validation=unseen[:N_VALIDATION],
        test=unseen[N_VALIDATION : N_VALIDATION + N_TEST],
        held_out=unseen[N_VALIDATION + N_TEST :],
    )


def by_hash(text: str) -> bytes:
    """Sort key of a shuffle that needs no random numbers."""
    return hashlib.sha256(text.encode()).digest()


def _is_plural(word: str, of: frozenset[str]) -> bool:
    """A plural tells its singular's whole pronunciation, so a singular that is hidden takes its plural with it."""
    stems = {word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
    return not of.isdisjoint(stems)


# --- The two ways of asking ---------------------------------------------------------------------------------------


def raw_lines(word: str, arpabet: str) -> list[str]:
    """What the base reads about a word, each line a text of its own."""
    return [f'"{word}" {arpabet}', raw_prompt(word) + to_ipa(arpabet)]


def question(word: str) -> str:
    """The chat's one question; the answer is the IPA alone."""
    return f'How is "{word}" pronounced?'
