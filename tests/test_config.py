"""Every bad value is refused by its key's name; derived values; what a TOML file holds."""

import tomllib
from dataclasses import fields, replace
from math import inf, nan
from typing import Any

import pytest

from minilora.config import (
    PROJECTIONS,
    BaseConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    PrefixConfig,
    RunConfig,
    TrainConfig,
    to_dict,
)
from minilora.errors import UserError

MISTRAL_V0_1 = ModelConfig(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, vocab_size=32000,
    sliding_window=4096,
)  # fmt: skip

BAD_SIZES: tuple[Any, ...] = (0, -1, 2**31, 1.5, 4096.0, "4096", None, True, nan)
BAD_POSITIVES: tuple[Any, ...] = (0, -1e-5, nan, inf, -inf, "1e-5", None, True)
MODEL: list[tuple[str, Any]] = [
    *((name, value) for name in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size",
                                 "max_seq_len") for value in BAD_SIZES),
    *((name, value) for name in ("norm_eps", "rope_theta") for value in BAD_POSITIVES),
    *(("sliding_window", value) for value in (0, -1, "4096", 4096.5, True, [4096, None])),
    ("n_kv_heads", 5),  # 32 is no multiple of it
    ("n_heads", 12),
    ("head_dim", 127),
]  # fmt: skip
SECTIONS: list[tuple[type, str, Any]] = [
    *((BaseConfig, "device", value) for value in ("", "gpu", "mps", "cuda:", "cuda:x", "cpu:x", "cuda:²")),
    *((LoraConfig, "rank", value) for value in (0, -4, 2**31, 2.5, "4", True, None)),
    *((LoraConfig, "alpha", value) for value in (0.0, -1.0, nan, inf, "32", None)),
    *((LoraConfig, "dropout", value) for value in (-0.1, 1.0, 2.0, nan)),
    *((LoraConfig, name, value) for name in ("targets", "modules_to_save") for value in (None, 3, (1, 2))),
    *((LoraConfig, name, value) for name in ("rank_pattern", "alpha_pattern") for value in (None, "q_proj", {1: 8})),
    *((PrefixConfig, "n_tokens", value) for value in (0, -1, 2.5, "8", 2**31)),
    (LoraConfig, "targets", ()),
    *((TrainConfig, "reinit", value) for value in ("top:x", "top:0", "top:-1", "top:", "top", "all:1", "", "top:²")),
    *((TrainConfig, "lora_plus_ratio", value) for value in (0.0, 0.5, -1.0, nan, inf)),
    *((TrainConfig, "neftune_alpha", value) for value in (-1.0, nan, inf)),
    *((DataConfig, "max_seq_len", value) for value in (1, 0, -8)),
    *((TrainConfig, name, value) for name in ("batch_size", "accumulate", "checkpoint_every", "keep_checkpoints",
                                              "max_bad_steps", "max_steps", "layers", "prefix_tokens")
      for value in (0, -1, 2**31, 2.5)),
    *((TrainConfig, name, value) for name in ("epochs", "lr") for value in (0.0, -1.0, nan, inf)),
    *((TrainConfig, "warmup_steps", value) for value in (-1, 10**400, 2.5)),
    *((TrainConfig, "min_lr_ratio", value) for value in (-0.1, 1.1, nan)),
    *((TrainConfig, "weight_decay", value) for value in (-0.1, nan, inf)),
    *((TrainConfig, "clip_norm", value) for value in (-1.0, nan, inf)),
    *((TrainConfig, name, value) for name in ("beta1", "beta2") for value in (-0.1, 1.0, nan)),
    *((EvalConfig, name, value) for name in ("every", "batch_size", "max_new_tokens", "general_tokens")
      for value in (0, -1, 2**31)),
    *((EvalConfig, name, value) for name in ("patience", "samples", "answers") for value in (-1, 10**20)),
]  # fmt: skip
SECTION_OF = {
    BaseConfig: "model",
    LoraConfig: "lora",
    PrefixConfig: "prefix",
    DataConfig: "data",
    TrainConfig: "train",
    EvalConfig: "eval",
}


@pytest.mark.parametrize(("name", "value"), MODEL)
def test_a_bad_size_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        replace(MISTRAL_V0_1, **{name: value})


@pytest.mark.parametrize(("section", "name", "value"), SECTIONS)
def test_a_bad_setting_is_refused_by_its_key(section: type, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{SECTION_OF[section]}\.{name} is "):
        section(**{name: value})


def test_the_rank_of_a_layer_is_whole() -> None:
    with pytest.raises(UserError, match=r"^lora.rank_pattern q_proj is '8', but must be .* and whole$"):
        LoraConfig(rank_pattern={"q_proj": "8"})  # type: ignore[dict-item]


@pytest.mark.parametrize(("strategy", "quantize"), [("qlora", "none"), ("full", "nf4"), ("partial", "nf4")])
def test_a_strategy_that_cannot_train_the_storage_is_refused(strategy: Any, quantize: Any) -> None:
    with pytest.raises(UserError, match=r"train\.strategy .*model\.quantize"):
        RunConfig(model=BaseConfig(quantize=quantize), train=TrainConfig(strategy=strategy))


COMBINATIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"strategy": "partial"}, {}, "needs train.layers, train.parameters, or both"),
    *(
        ({"strategy": s, "layers": 1}, {}, f'train.layers and train.parameters are for partial; .*"{s}" has no use')
        for s in ("qlora", "full")
    ),
    *(
        ({"strategy": s, "parameters": ("lm_head",)}, {}, "train.parameters are for partial")
        for s in ("prefix", "full")
    ),
    *(({"strategy": s, "reinit": "top:1"}, {}, "train.reinit would leave") for s in ("lora", "qlora", "prefix")),
    ({"strategy": "partial", "layers": 1, "reinit": "all"}, {}, '"partial" cannot train what train.reinit "all" draws'),
    ({"strategy": "full"}, {"dora": True}, "lora.dora is for lora and qlora"),
    ({"strategy": "partial", "layers": 1}, {"dora": True}, "lora.dora is for lora"),
    ({"strategy": "prefix"}, {"dora": True}, "lora.dora is for lora"),
    *(({"strategy": s, "lora_plus_ratio": 2.0}, {}, "train.lora_plus_ratio is for") for s in ("full", "prefix")),
]


@pytest.mark.parametrize(("train", "lora", "message"), COMBINATIONS)
def test_keys_that_do_not_go_together_are_refused(train: dict[str, Any], lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(lora=LoraConfig(**lora), train=TrainConfig(**train))


def test_what_reinit_draws() -> None:
    assert [TrainConfig(reinit=r).reinit_top for r in ("none", "top:3", "all")] == [0, 3, None]
    RunConfig(train=TrainConfig(strategy="partial", layers=2, reinit="top:2"))
    RunConfig(lora=LoraConfig(dora=True), train=TrainConfig(lora_plus_ratio=16.0, neftune_alpha=5.0))


@pytest.mark.parametrize(
    ("strategy", "quantize", "resolved"),
    [
        ("qlora", "auto", "nf4"),
        ("qlora", "nf4", "nf4"),
        ("lora", "auto", None),
        ("lora", "none", None),
        ("lora", "nf4", "nf4"),
        ("full", "auto", None),
        ("full", "none", None),
        ("prefix", "auto", None),
        ("prefix", "nf4", "nf4"),
    ],
)
def test_auto_quantization_follows_the_strategy(strategy: Any, quantize: Any, resolved: str | None) -> None:
    config = RunConfig(model=BaseConfig(quantize=quantize), train=TrainConfig(strategy=strategy))
    assert config.quantize == resolved


def test_published_parameter_counts() -> None:
    assert MISTRAL_V0_1.n_parameters == 7_241_732_096
    assert replace(MISTRAL_V0_1, vocab_size=32768, sliding_window=None).n_parameters == 7_248_023_552
    nemo = replace(MISTRAL_V0_1, dim=5120, n_layers=40, vocab_size=131072, sliding_window=None)
    assert nemo.n_parameters == 12_247_782_400


def test_good_values_pass() -> None:
    assert MISTRAL_V0_1.rope_theta == 10_000
    replace(MISTRAL_V0_1, rope_theta=1_000_000, sliding_window=1, n_kv_heads=32)
    TrainConfig(max_steps=None, warmup_steps=0, min_lr_ratio=1.0, clip_norm=0.0, beta1=0.0)
    EvalConfig(patience=0, samples=0)
    assert LoraConfig().targets == PROJECTIONS
    one: Any = "lm_head"
    assert LoraConfig(modules_to_save=one).modules_to_save == ("lm_head",)


def test_an_error_is_one_line() -> None:
    assert str(UserError("a\n  b\tc ")) == "a b c"


def test_to_dict_is_toml_that_gives_the_same_configuration_back() -> None:
    config = RunConfig(data=DataConfig(train="a.jsonl"), lora=LoraConfig(targets=("q_proj",)))
    plain = to_dict(config)
    assert plain["lora"]["targets"] == ["q_proj"]
    assert "validation" not in plain["data"]  # TOML has no null
    assert plain["train"]["lr"] == 2e-4
    plain["lora"]["targets"] = tuple(plain["lora"]["targets"])
    plain["eval"]["metrics"] = tuple(plain["eval"]["metrics"])
    plain["train"]["parameters"] = tuple(plain["train"]["parameters"])
    rebuilt = RunConfig(**{f.name: type(getattr(config, f.name))(**plain[f.name]) for f in fields(config)})
    assert rebuilt == config


def test_sections_are_those_of_the_contract() -> None:
    assert [f.name for f in fields(RunConfig)] == ["model", "lora", "data", "train", "eval"]
    assert tomllib.loads("[train]\nlr = 1e-4")["train"]["lr"] == TrainConfig(lr=1e-4).lr


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        TrainConfig().lr = 1.0  # type: ignore[misc]
