"""Makes the demo's texts and its tokenizer from the dictionary: `python -m benchmarks.demo_base.prepare OUT_DIR`.

    pretrain.jsonl                              raw lines, {"text": ...}: what the base reads (9 MB, not committed)
    heldout.jsonl                               raw lines of words it never reads: its own perplexity, before and after
    replay.jsonl                                raw lines that it has read, of words in no chat: to remember by
    chat_train.jsonl chat_validation.jsonl chat_test.jsonl      {"messages": [...]}: the question, answered in IPA
    tokenizer.model                             sentencepiece, with the control tokens of Mistral's v3

All but the first lie in the package (`minilora/demo/`, `data/` and `base/`); made again they are the same bytes.
"""

import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from benchmarks.demo_base import dictionary
from benchmarks.demo_base.arpabet import CONSONANTS, REDUCED_VOWELS, STRESS_MARKS, VOWELS

# In the order of Mistral's v3 tokenizer, where they hold the ids 3 to 13.
CONTROL_TOKENS = [
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
]  # fmt: skip
N_REPLAY = 1000  # words, two lines each
N_SPECIAL = 3 + len(CONTROL_TOKENS) + 256  # <unk> <s> </s>, control tokens, bytes

CHUNK_END = "|"  # no piece crosses it: keeps a training text apart from the "▁" that sentencepiece puts before it


# --- Texts --------------------------------------------------------------------------------------------------------


def raw_texts(words: Iterable[str], sounds: dict[str, str]) -> list[dict[str, str]]:
    """The raw lines of the words, shuffled, so that the two spellings of a word do not stand side by side."""
    lines = [line for word in words for line in dictionary.raw_lines(word, sounds[word])]
    return [{"text": line} for line in sorted(lines, key=dictionary.by_hash)]


def conversations(words: Iterable[str], sounds: dict[str, str]) -> list[dict[str, Any]]:
    """One question and its answer a word."""
    return [
        {
            "messages": [
                {"role": "user", "content": dictionary.question(word)},
                {"role": "assistant", "content": dictionary.to_ipa(sounds[word])},
            ]
        }
        for word in words
    ]


def all_texts() -> dict[str, list[dict[str, Any]]]:
    """File name -> its records."""
    sounds = dictionary.read_dictionary()
    split = dictionary.split_words(sounds)
    return {
        "pretrain.jsonl": raw_texts(split.pretraining, sounds),
        "heldout.jsonl": raw_texts(split.held_out, sounds),
        "replay.jsonl": raw_texts(split.pretraining[len(split.chat) :][:N_REPLAY], sounds),
        "chat_train.jsonl": conversations(split.chat, sounds),
        "chat_validation.jsonl": conversations(split.validation, sounds),
        "chat_test.jsonl": conversations(split.test, sounds),
    }


def to_jsonl(records: Iterable[dict[str, Any]]) -> str:
    """One record a line, IPA as it is written."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# --- Tokenizer ----------------------------------------------------------------------------------------------------
#
# A spelling is read letter by letter, so the tokenizer must not learn pieces such as "str", which any training on real
# text would. BPE builds a piece by merging two that it has; it is trained here on nothing but the pieces we want, each
# as the chain that builds it: ▁A, ▁AH, ▁AH0. A link that occurred in a spelling or in IPA would tear it apart, so every
# chain begins with a capital or a quotation mark, or ends with a question mark; "is" can do neither and stays three
# tokens.


def tokenizer_model() -> bytes:
    """A sentencepiece model: bytes for everything unforeseen, single characters, and the pieces of the chains."""
    characters = {*"abcdefghijklmnopqrstuvwxyz", *"".join(_ipa_symbols())}
    pieces = {*chains(), *characters.union(*chains())}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(CHUNK_END + piece for piece in chains()),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_SPECIAL + len(pieces),
        required_chars="".join(sorted(characters)),
        pretokenization_delimiter=CHUNK_END,
        control_symbols=CONTROL_TOKENS,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        # Text stays as it is: Mistral's settings.
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        # Only the chains decide what is merged.
        character_coverage=1.0,
        split_by_whitespace=False,
        split_by_number=False,
        split_by_unicode_script=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def chains() -> list[str]:
    """Every piece we want, after the shorter ones that it is built from, "▁" written as a space.

    A piece that begins several words stands here several times: so the beginnings outnumber every other pair, and BPE
    merges nothing else.
    """
    diphthongs_and_affricates = [symbol for symbol in _ipa_symbols() if len(symbol) == 2]
    beginnings = [word[:end] for word in [*_arpabet_words(), ' "', " How"] for end in range(2, len(word) + 1)]
    endings = [" pronounced?"[start:] for start in reversed(range(len(" pronounced?") - 1))]
    return [*diphthongs_and_affricates, *beginnings, *endings]


def _arpabet_words() -> list[str]:
    vowels = [vowel + stress for vowel in VOWELS for stress in STRESS_MARKS]
    return [" " + code for code in [*CONSONANTS, *vowels]]


def _ipa_symbols() -> list[str]:
    tables = (CONSONANTS, VOWELS, REDUCED_VOWELS, STRESS_MARKS)
    return [symbol for table in tables for symbol in table.values()]


# --- Command ------------------------------------------------------------------------------------------------------


def prepare(out: Path) -> None:
    """Writes every file into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, records in all_texts().items():
        (out / name).write_text(to_jsonl(records), encoding="utf-8", newline="\n")
    (out / "tokenizer.model").write_bytes(tokenizer_model())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.demo_base.prepare OUT_DIR")
    prepare(Path(sys.argv[1]))
