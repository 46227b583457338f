"""The demo's data: the words' IPA, who reads which word, the tokenizer; and the packaged files can be made again."""

import json
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from benchmarks.demo_base import prepare
from benchmarks.demo_base.arpabet import CONSONANTS, VOWELS
from benchmarks.demo_base.dictionary import (
    DICTIONARY,
    Split,
    question,
    raw_lines,
    read_dictionary,
    split_words,
    to_ipa,
)
from minilora.demo.phonemes import DATA, phoneme_errors, phonemes, raw_prompt

TOKENIZER = DATA.parent / "base" / "tokenizer.model"
CHAT_FILES = ("chat_train.jsonl", "chat_validation.jsonl", "chat_test.jsonl")
SLIDING_WINDOW = 16


@cache
def sounds() -> dict[str, str]:
    return read_dictionary()


@cache
def split() -> Split:
    return split_words(sounds())


@cache
def texts() -> dict[str, list[dict[str, Any]]]:
    return prepare.all_texts()


@cache
def tokenizer() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(TOKENIZER))


def pieces(text: str) -> list[str]:
    return list(tokenizer().encode(text, out_type=str))


def contents(record: dict[str, Any]) -> list[str]:
    return [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]


# --- IPA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "ipa"),
    [
        ("mistral", "ˈmɪstɹəl"),
        ("about", "əˈbaʊt"),
        ("astray", "əˈstɹeɪ"),  # three consonants that open a syllable
        ("employee", "ɛmˈplɔɪi"),  # m does not open one with pl
        ("obscure", "əbˈskjʊɹ"),
        ("singer", "ˈsɪŋɚ"),  # ŋ opens none
        ("finger", "ˈfɪŋɡɚ"),
        ("nutshell", "ˈnʌtˌʃɛl"),  # the mark keeps t and ʃ from becoming tʃ
        ("schmidt", "ˈʃmɪt"),
        ("computer", "kəmˈpjutɚ"),
        ("language", "ˈlæŋɡwədʒ"),
        ("church", "ˈtʃɝtʃ"),
    ],
)
def test_ipa_of_known_words(word: str, ipa: str) -> None:
    assert to_ipa(sounds()[word]) == ipa


def test_the_beginning_of_a_word_is_a_syllable_however_odd() -> None:
    assert to_ipa("V L AE1 D") == "ˈvlæd"
    assert to_ipa("AH0 V L AE1 D") == "əvˈlæd"


def test_a_mark_for_every_stress() -> None:
    for arpabet in sounds().values():
        ipa = to_ipa(arpabet)
        assert (ipa.count("ˈ"), ipa.count("ˌ")) == (arpabet.count("1"), arpabet.count("2"))


def test_ipa_loses_nothing_on_the_dictionary() -> None:
    arpabets = set(sounds().values())
    assert len({to_ipa(arpabet) for arpabet in arpabets}) == len(arpabets)


# --- Phoneme errors -----------------------------------------------------------------------------------------------


def test_one_phoneme_a_sound() -> None:
    assert phonemes("ˈlæŋɡwədʒ") == ["ˈ", "l", "æ", "ŋ", "ɡ", "w", "ə", "dʒ"]
    assert phonemes("xa\naɪ") == ["x", "a", "\n", "aɪ"]
    for arpabet in list(sounds().values())[::20]:
        ipa = to_ipa(arpabet)
        assert "".join(phonemes(ipa)) == ipa


def test_as_many_phonemes_as_codes_and_marks() -> None:
    for code in [*CONSONANTS, *(vowel + "0" for vowel in VOWELS)]:
        assert len(phonemes(to_ipa(code))) == 1
        assert len(phonemes(to_ipa(f"{code} AA1"))) == 3


@pytest.mark.parametrize(
    ("answer", "expected", "edits"),
    [
        ("ˈmɪstɹəl", "ˈmɪstɹəl", 0),
        ("mɪstɹəl", "ˈmɪstɹəl", 1),  # stress left out
        ("ˌmɪstɹəl", "ˈmɪstɹəl", 1),  # the wrong stress
        ("ˈmɪsɹələ", "ˈmɪstɹəl", 2),
        ("ˈtʃaɪ", "ˈdʒɔɪ", 2),  # an affricate and a diphthong are one sound each
        ("", "ˈmɪstɹəl", 8),
        ("ab", "", 2),
    ],
)
def test_phoneme_errors(answer: str, expected: str, edits: int) -> None:
    assert phoneme_errors(answer, expected) == (edits, len(phonemes(expected)))


def test_phoneme_errors_equal_the_recursive_definition() -> None:
    @cache
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    strings = ["".join(letters) for n in range(4) for letters in product("ab", repeat=n)]
    for a, b in product(strings, repeat=2):
        assert phoneme_errors(a, b) == (distance(a, b), len(b))


# --- The split ----------------------------------------------------------------------------------------------------


def test_plain_words_only() -> None:
    assert len(sounds()) >= 110_000
    assert all(word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 14 for word in sounds())
    assert list(sounds()) == sorted(sounds())


def test_sizes() -> None:
    assert {name: len(words) for name, words in vars(split()).items()} == {
        "pretraining": 114_860,
        "chat": 2000,
        "validation": 300,
        "test": 300,
        "held_out": 1000,
    }


def test_unseen_words_stand_nowhere_else() -> None:
    parts = [set(part) for part in (split().pretraining, split().validation, split().test, split().held_out)]
    assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert set(split().chat) <= parts[0]


def test_no_plural_of_an_unseen_word_is_read() -> None:
    unseen = [*split().validation, *split().test, *split().held_out]
    plurals = {word + ending for word in unseen for ending in ("s", "es")}
    plurals |= {word[:-1] + "ies" for word in unseen if word.endswith("y")}
    assert plurals.isdisjoint(split().pretraining)


def test_the_split_does_not_depend_on_the_order_of_the_words() -> None:
    assert split_words(reversed(sounds())) == split()


def test_the_base_reads_no_line_of_an_unseen_word() -> None:
    unseen = {*split().validation, *split().test, *split().held_out}
    read = {record["text"].split('"')[1] for record in texts()["pretrain.jsonl"]}
    assert read == set(split().pretraining)
    assert read.isdisjoint(unseen)


# --- The packaged files -------------------------------------------------------------------------------------------


def test_the_packaged_texts_are_what_prepare_makes() -> None:
    for name, records in texts().items():
        if name != "pretrain.jsonl":
            assert (DATA / name).read_text(encoding="utf-8") == prepare.to_jsonl(records), name


def test_the_packaged_tokenizer_is_what_prepare_makes() -> None:
    # Compared by what it holds: another release of sentencepiece may write other bytes around the same pieces.
    again = SentencePieceProcessor(model_proto=prepare.tokenizer_model())
    assert again.get_piece_size() == tokenizer().get_piece_size()
    for i in range(again.get_piece_size()):
        assert (again.id_to_piece(i), again.get_score(i)) == (tokenizer().id_to_piece(i), tokenizer().get_score(i))


def test_prepare_writes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "all_texts", lambda: {"one.jsonl": [{"text": "ˈwʌn"}]})
    prepare.prepare(tmp_path / "new")
    assert (tmp_path / "new" / "one.jsonl").read_bytes() == '{"text": "ˈwʌn"}\n'.encode()
    assert (tmp_path / "new" / "tokenizer.model").stat().st_size > 0


def test_the_dictionary_is_small_and_its_licence_lies_beside_it_and_beside_what_was_made_of_it() -> None:
    assert DICTIONARY.stat().st_size < 1_000_000
    for folder in (DATA, DICTIONARY.parent):
        assert "Carnegie Mellon" in (folder / "LICENSE.cmudict").read_text(encoding="utf-8")


def test_a_conversation_is_the_question_and_the_ipa_alone() -> None:
    word = split().chat[0]
    first = json.loads((DATA / "chat_train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first["messages"] == [
        {"role": "user", "content": f'How is "{word}" pronounced?'},
        {"role": "assistant", "content": to_ipa(sounds()[word])},
    ]


def test_what_is_replayed_tells_nothing_of_what_is_asked() -> None:
    """Its words were read before, and no chat or measure has one of them."""
    words = {contents(record)[0].split('"')[1] for record in texts()["replay.jsonl"]}
    asked = {contents(record)[0].split('"')[1] for name in CHAT_FILES for record in texts()[name]}
    measured = {contents(record)[0].split('"')[1] for record in texts()["heldout.jsonl"]}
    assert len(words) == 1000
    assert words <= set(split().pretraining)
    assert not words & (asked | measured)


def test_raw_lines_begin_with_the_raw_prompt() -> None:
    assert raw_lines("mistral", sounds()["mistral"]) == ['"mistral" M IH1 S T R AH0 L', '"mistral" ˈmɪstɹəl']
    assert raw_prompt("mistral") + to_ipa(sounds()["mistral"]) == raw_lines("mistral", sounds()["mistral"])[1]


# --- The tokenizer ------------------------------------------------------------------------------------------------


def test_special_tokens_are_those_of_v3() -> None:
    v3 = [
        "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    ]  # fmt: skip
    assert [tokenizer().id_to_piece(i) for i in range(14)] == v3
    assert (tokenizer().unk_id(), tokenizer().bos_id(), tokenizer().eos_id(), tokenizer().pad_id()) == (0, 1, 2, -1)
    assert all(tokenizer().is_control(i) for i in range(1, 14))
    assert [tokenizer().id_to_piece(14 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert all(tokenizer().is_byte(14 + byte) for byte in range(256))


def test_no_text_encodes_to_a_control_token() -> None:
    assert min(tokenizer().encode("<s>[INST] hi [/INST]</s>")) > 13


def test_the_tokens_of_every_kind_of_text() -> None:
    assert pieces('"mistral" M IH1 S T R AH0 L') == [
        '▁"', *"mistral", '"', "▁M", "▁IH1", "▁S", "▁T", "▁R", "▁AH0", "▁L"
    ]  # fmt: skip
    assert pieces('"mistral" ˈmɪstɹəl') == ['▁"', *"mistral", '"', "▁", *"ˈmɪstɹəl"]
    assert pieces(question("mistral")) == ["▁How", "▁", "i", "s", '▁"', *"mistral", '"', "▁pronounced?"]
    assert pieces("pəˈteɪtoʊ") == ["▁", "p", "ə", "ˈ", "t", "eɪ", "t", "oʊ"]


def test_one_token_a_letter_and_a_sound() -> None:
    for word, arpabet in list(sounds().items())[::20]:
        ipa = to_ipa(arpabet)
        assert pieces(f'"{word}" {arpabet}') == ['▁"', *word, '"', *("▁" + code for code in arpabet.split())]
        assert pieces(f'"{word}" {ipa}') == ['▁"', *word, '"', "▁", *phonemes(ipa)]
        assert pieces(ipa) == ["▁", *phonemes(ipa)]


def test_the_raw_prompt_ends_where_a_token_ends() -> None:
    """So the prompt's ids are the beginning of the line's ids, and the base goes on as it has read."""
    for word in split().test:
        line = raw_lines(word, sounds()[word])[1]
        prompt_ids = tokenizer().encode(raw_prompt(word))
        assert tokenizer().encode(line)[: len(prompt_ids)] == prompt_ids


def test_every_packaged_text_comes_back() -> None:
    for name in (*CHAT_FILES, "heldout.jsonl", "replay.jsonl"):
        for record in texts()[name]:
            for text in contents(record):
                ids = tokenizer().encode(text)
                assert tokenizer().decode(ids) == text
                assert not any(tokenizer().is_byte(i) or tokenizer().is_unknown(i) for i in ids)


def test_foreign_text_comes_back_through_bytes() -> None:
    text = "What, héllo 世界 🙂\n  x"
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_every_conversation_is_longer_than_the_sliding_window() -> None:
    for name in CHAT_FILES:
        for record in texts()[name]:
            asked, answered = contents(record)
            n_special = 4  # <s> [INST] [/INST] </s>
            assert len(pieces(asked)) + len(pieces(answered)) + n_special > SLIDING_WINDOW
