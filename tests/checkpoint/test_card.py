"""The model card: what is known stands in it, what is not is said to be unknown, and no text of a file is markup."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_runs import TINY

from minilora.checkpoint.card import license_of, write_card
from minilora.checkpoint.export import FORMATS
from minilora.errors import UserError

UNKNOWN = "Unknown: the files that this was made from do not say."
KNOWN: dict[str, Any] = {
    "license": "apache-2.0",
    "base_path": "mistralai/Mistral-7B-v0.3",
    "base_fingerprint": "f" * 64,
    "quantization": {"type": "nf4", "double_quant": True},
    "data": {"train": "a" * 64},
    "config": {"lora": {"rank": 16}, "train": {"lr": 1e-4}},
    "metrics": {"after": {"loss": 1.25}},
    "audit": {"route": "trained", "merged": {"mean_kl": 1e-6}},
    "versions": {"torch": "2.13.0"},
    "export": {"to": "hf", "from": "merged"},
}


def model_card(
    name: str, kind: str, facts: dict[str, Any], tokenizer: str | None = None, notes: Sequence[str] = ()
) -> str:
    with TemporaryDirectory() as folder:
        write_card(Path(folder), name, kind, TINY, facts, tokenizer, notes)
        return (Path(folder) / "README.md").read_text("utf-8")


def sections(card: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", card, flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def test_all_that_is_known_stands_in_it() -> None:
    card = model_card("out", "hf", KNOWN, tokenizer="v3", notes=["A note."])
    found = sections(card)
    for section, keys in {
        "Base": ("base_fingerprint", "quantization"), "Made from": ("export",), "Data": ("data",),
        "Recipe": ("config",), "Metrics": ("metrics", "audit"), "Made with": ("versions",),
    }.items():  # fmt: skip
        written = json.loads(found[section])
        expected = {key: KNOWN[key] for key in keys} if len(keys) > 1 else KNOWN[keys[0]]
        assert expected.items() <= written.items(), section
    assert json.loads(found["Base"])["base_path"] == "Mistral-7B-v0.3"
    assert json.loads(found["Sizes"])["sliding_window"] == 12
    assert found["Limits"].endswith("- A note.")
    assert "50,976 weights in the format hf" in card
    assert UNKNOWN not in card


def test_what_is_not_known_is_said() -> None:
    card = model_card("out", "hf", {})
    assert [name for name, text in sections(card).items() if text == UNKNOWN] == [
        "Base", "Made from", "Data", "Recipe", "Metrics", "Made with"
    ]  # fmt: skip
    assert 'license: "unknown"\n' in card
    assert "base_model" not in card
    assert "- No tokenizer lies with it.\n" in card


@pytest.mark.parametrize("kind", FORMATS)
def test_it_says_how_to_use_each_format(kind: str) -> None:
    usage = sections(model_card("out", kind, KNOWN, tokenizer="v3"))["How to use it"]
    for program in ("vLLM", "llama.cpp", "transformers", "minilora"):
        assert program in usage
    commands = {"hf": "vllm serve out\n", "mistral": "--load-format mistral", "bnb-4bit": "vllm serve out\n"}
    assert commands.get(kind, f"llama-server -m out/model-{kind.partition('-')[2]}.gguf --jinja") in usage
    assert "$" not in usage


@pytest.mark.parametrize("pinned", ["", "@" + 40 * "a"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_hub_reads_its_head(kind: str, pinned: str) -> None:
    """By the hub's own library. Its model is named without the commit, which is no part of the name there."""
    facts = KNOWN | {"base_path": KNOWN["base_path"] + pinned}
    head = ModelCard(model_card("out", kind, facts, tokenizer="v3"), ignore_metadata_errors=False).data
    assert (head.license, head.base_model) == ("apache-2.0", "mistralai/Mistral-7B-v0.3")
    assert kind in (head.tags or [])


NASTY = "x\n---\n# Owned\n```sh\nrm -rf ~\n```\n<script>alert(1)</script> $name ${usage} {{ y }}"


def test_no_text_of_a_file_is_markup() -> None:
    """Names and values of a stranger's minilora.json, in every place."""
    facts = {key: {NASTY: NASTY} for key in KNOWN} | {"license": NASTY, "base_path": NASTY}
    card = model_card(NASTY, "hf", facts, tokenizer="v3")
    head = ModelCard(card, ignore_metadata_errors=False)
    assert set(head.data.to_dict()) == {"license", "library_name", "pipeline_tag", "tags"}
    assert re.fullmatch(r"[\w.-]+", head.data.license or "")
    outside = [line for line in card.splitlines() if not line.startswith("    ")]
    for word in ("Owned\n", "rm -rf", "<script>", "${"):
        assert not any(word in line for line in outside), word
    assert card.splitlines().count("---") == 2
    assert sections(card).keys() == sections(model_card("out", "hf", {})).keys()


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\ntags:\n- a\nlicense: "apache-2.0"\nx: y\n---\n', "apache-2.0"),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("# No head\nlicense: mit\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_of_another_card(tmp_path: Path, card: str, found: str | None) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == found


def test_a_card_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").symlink_to("/proc/self/mem")  # which opens, and cannot be read
    with pytest.raises(UserError, match=r"README\.md: cannot be read: Input/output error"):
        license_of(tmp_path)


def test_our_own_card_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card("out", "hf", {"license": "cc-by-4.0"}))
    assert license_of(tmp_path) == "cc-by-4.0"
