"""What PEFT's users write for names of layers is taken; what would keep `re` busy is refused before it is tried."""

import re
import time

import pytest

from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.patterns import check_pattern, first_match

NAME = "model.layers.31.post_attention_layernorm.x.q_proj"
TAKEN = [
    r".*\.(q_proj|v_proj)", "model.layers.0.self_attn.q_proj", r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|gate)_proj",
    r".*layers\.(2[0-9]|3[01])\..*(q|k|v)_proj", r"^.*?layers\.[0-9]+\..*_proj$",
    r"(?:model\.)layers\.1?2\.mlp\.up_proj",
    r"model\.layers\.(" + "|".join(map(str, range(32))) + r")\.self_attn\.(q_proj|k_proj|v_proj|o_proj)", r"[\]()*+]|x",
]  # fmt: skip
REFUSED = [
    "(.+)+y", "(a|a)*y", "((a?)?)?", "(.*.*)*", r"(\w+\.)+z", "(?=x).*", "(?!lm_head).*", "(?i)Q_PROJ", "(?P<a>x)",
    "x" * 2001,
    ".*" * 12 + "y", ".?" * 30 + "y", "(.|.)" * 25 + "y", "(.|..|...)" * 20,
    ".{0,40}" * 8 + "y", "(" * 300 + ")" * 300 + "+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", TAKEN)
def test_what_users_write_is_taken_and_matched_at_once(pattern: str) -> None:
    check_pattern(pattern, "lora.targets")
    began = time.process_time()
    re.fullmatch(pattern, NAME)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_may_take_too_long_is_refused_at_once(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(UserError, match=r"lora\.targets is '.*may take too long to match; write it with fewer"):
        LoraConfig(targets=pattern)
    with pytest.raises(UserError, match=r"lora\.rank_pattern is '"):
        LoraConfig(rank_pattern={pattern: 4})
    assert time.process_time() - began < 1


@pytest.mark.parametrize("pattern", ["(", "[a", "*", r"\1", "[[a]"])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="is no regular expression"):
        check_pattern(pattern, "lora.targets")


def test_too_many_names_are_refused() -> None:
    for key, value in (("rank_pattern", {f"{i}": 4 for i in range(5000)}), ("targets", tuple(map(str, range(5000))))):
        with pytest.raises(UserError, match=f"lora.{key} holds more than 1024"):
            LoraConfig(**{key: value})
    with pytest.raises(UserError, match=r"lora.rank_pattern holds .* far too long ones"):
        LoraConfig(rank_pattern={f"{'x' * 1900}{i}": 4 for i in range(100)})


def test_many_patterns_have_few_ways_together() -> None:
    """One after another they take as long as a single one of all their ways."""
    LoraConfig(rank_pattern={rf"layers.{i}.self_attn.[qk]_proj": 4 for i in range(1000)})
    LoraConfig(alpha_pattern={rf"layers.{i}.*_proj": 4 for i in range(80)})
    began = time.process_time()
    with pytest.raises(UserError, match=r"lora.alpha_pattern is .*may take too long to match"):
        LoraConfig(alpha_pattern={rf"layers.{i}.*_proj": 4 for i in range(90)})
    with pytest.raises(UserError, match=r"lora.rank_pattern is .*may take too long to match"):
        LoraConfig(rank_pattern={rf"(a|b|c|d|x{i})\.(q|k)_proj": 4 for i in range(1000)})
    assert time.process_time() - began < 1


def test_the_first_pattern_that_matches_an_end_counts() -> None:
    patterns = {"layers.1.self_attn.q_proj": 1, r"layers\.\d\.mlp\.(up|down)_proj": 2, "q_proj": 3, "proj": 4}
    names = ("layers.1.self_attn.q_proj", "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.0.mlp.gate_proj")
    assert [first_match(patterns, name, 9) for name in names] == [1, 3, 2, 9]


def test_the_examples_beside_lora_s_settings() -> None:
    name = "layers.0.mlp.up_proj"
    meant = [LoraConfig(targets=(end,)).adapts(name) for end in ("up_proj", "0.mlp.up_proj", "proj")]
    assert meant == [True, True, False]
    assert [LoraConfig(targets=whole).adapts(name) for whole in (".*up_proj", "up_proj")] == [True, False]
    ranks = [LoraConfig(rank_pattern={p: 4}).rank_of(name) for p in ("up_proj", "(up|down)_proj", "proj")]
    assert ranks == [4, 4, 16]
    assert all(map(LoraConfig(modules_to_save=("norm",)).saves, ("norm", "layers.0.input_layernorm")))


def test_an_empty_pattern_hides_no_rank() -> None:
    with pytest.raises(UserError, match=r"lora\.rank is 0, but must be above 0"):
        LoraConfig(rank=0, rank_pattern={"": 4})
