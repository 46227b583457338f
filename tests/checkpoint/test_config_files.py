"""config.json and params.json: what is read, what a missing key means, what is refused and how."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import PUBLISHED, config_in, edit_json, write_json
from transformers import MistralConfig

from minilora.checkpoint.config_files import config_to_hf, config_to_params
from minilora.config import ModelConfig
from minilora.errors import UserError

TINY = ModelConfig(
    dim=128,
    n_layers=2,
    head_dim=64,
    hidden_dim=192,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=320,
    norm_eps=1e-5,
    rope_theta=5e4,
    sliding_window=7,
    max_seq_len=64,
)


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_both_files_say_the_same(originals: Path, layout: str) -> None:
    assert config_in(originals / layout) == TINY


MINISTRAL = {"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
HF_READ: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"head_dim": ...}, {"head_dim": 32}),
    ({"head_dim": None}, {"head_dim": 32}),
    ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
    ({"num_key_value_heads": ..., "num_attention_heads": 16}, {"n_heads": 16, "n_kv_heads": 8}),
    (LLAMA | {"num_key_value_heads": ...}, {"n_kv_heads": 4, "sliding_window": None}),
    ({"sliding_window": None}, {"sliding_window": None}),
    ({"sliding_window": ...}, {"sliding_window": 4096}),
    ({"rms_norm_eps": ...}, {"norm_eps": 1e-6}),
    ({"rope_parameters": ...}, {"rope_theta": 1e4}),
    ({"rope_parameters": ..., "rope_theta": 1_000_000}, {"rope_theta": 1e6}),
    ({"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": {"type": "default"}}, {"rope_theta": 1e6}),
    ({"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": None}, {"rope_theta": 1e6}),
    ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
    ({"tie_word_embeddings": ...}, {}),
    ({"architectures": None, "eos_token_id": [2, 3], "some_new_key": 1}, {}),
    ({"layer_types": ["full_attention"] * 2, "sliding_window": None}, {"sliding_window": None}),
    ({"layer_types": ["sliding_attention"] * 2}, {}),
    ({"sliding_window": [4, 8]}, {"sliding_window": (4, 8)}),
    ({"max_position_embeddings": ...}, {"max_seq_len": 131_072}),
    (MINISTRAL | {"layer_types": ["full_attention", "sliding_attention"]}, {"sliding_window": (None, 7)}),
    (
        MINISTRAL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": ...},
        {"sliding_window": (4096, None)},
    ),
    (MINISTRAL | {"layer_types": None}, {}),
    (LLAMA, {"sliding_window": None}),
    (LLAMA | {"sliding_window": ..., "pretraining_tp": 1, "mlp_bias": False}, {"sliding_window": None}),
    (LLAMA | {"max_position_embeddings": ..., "rope_scaling": None}, {"sliding_window": None, "max_seq_len": 2048}),
]


@pytest.mark.parametrize(("changes", "result"), HF_READ)
def test_config_json_reads(hf_folder: Path, changes: dict[str, Any], result: dict[str, Any]) -> None:
    edit_json(hf_folder / "config.json", **changes)
    assert asdict(config_in(hf_folder)) == {**asdict(TINY), **result}


PARAMS_READ: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_theta": ...}, {"rope_theta": 1e4}),
    ({"rope_theta": ..., "sliding_window": ...}, {"rope_theta": 1e6, "sliding_window": None}),
    ({"rope_theta": ..., "sliding_window": None}, {"rope_theta": 1e6, "sliding_window": None}),
    ({"sliding_window": "4096"}, {"sliding_window": 4096}),
    ({"sliding_window": ..., "_sliding_window": "4096"}, {"sliding_window": 4096}),
    ({"sliding_window": [5, 5]}, {"sliding_window": 5}),
    ({"sliding_window": [None, "8"]}, {"sliding_window": (None, 8)}),
    ({"sliding_window": [None, 8, None, 8], "n_layers": 8}, {"sliding_window": (None, 8), "n_layers": 8}),
    (
        {"sliding_window": [None, 8, 8], "_sliding_window": [None, 8, 8], "n_layers": 6, "rope_theta": ...},
        {"sliding_window": (None, 8, 8), "n_layers": 6, "rope_theta": 1e4},
    ),
    ({"sliding_window": [None]}, {"sliding_window": None}),
    ({"n_kv_heads": None}, {"n_kv_heads": 4}),
    ({"max_seq_len": ...}, {"max_seq_len": 32768}),
    ({"tied_embeddings": True}, {"tied_embeddings": True}),
    ({"moe": None, "model_type": "transformer", "causal": True}, {}),
]


@pytest.mark.parametrize(("changes", "result"), PARAMS_READ)
def test_params_json_reads(mistral_folder: Path, changes: dict[str, Any], result: dict[str, Any]) -> None:
    edit_json(mistral_folder / "params.json", **changes)
    assert asdict(config_in(mistral_folder)) == {**asdict(TINY), **result}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_number_of_weights(
    name: str, hf_folder: Path, mistral_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By both of their files; params.json of v0.1 has no rope_theta, but a window, and that says it."""
    sizes, params, n_parameters = PUBLISHED[name]
    write_json(hf_folder / "config.json", sizes)
    write_json(mistral_folder / "params.json", params)
    for folder in (hf_folder, mistral_folder):
        config = config_in(folder)
        assert (config.n_parameters, config.head_dim) == (n_parameters, 128)
        assert (config.sliding_window, config.rope_theta) == (sizes["sliding_window"], sizes["rope_theta"])
    assert asdict(config_in(hf_folder)) == asdict(config_in(mistral_folder))
    assert ("no rope_theta; 10000 is taken" in caplog.text) == (name == "7B v0.1")


def test_windows_of_two_sizes_have_no_config_json() -> None:
    with pytest.raises(UserError, match=r"one size of window, and this model \[3, 9\]"):
        config_to_hf(replace(TINY, sliding_window=(3, 9)), "bfloat16")


def test_a_chosen_theta_is_reported(mistral_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config_in(mistral_folder)
        assert not caplog.records
        edit_json(mistral_folder / "params.json", rope_theta=...)
        config_in(mistral_folder)
    assert "params.json: no rope_theta; 10000 is taken, since sliding_window is 7" in caplog.text


NAN, INF = float("nan"), float("inf")
HF_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ({"model_type": "mistral3", "vision_config": {}, "text_config": {}}, "model_type is 'mistral3'"),
    ({"model_type": "ministral3"}, "model_type is 'ministral3'; supported is 'mistral' or 'ministral' or 'llama'"),
    ({"model_type": "ministral"}, "architectures is .*; supported is ..MinistralForCausalLM"),
    ({"model_type": ["mistral"]}, "model_type is ..mistral"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is of type 'llama3'"),
    (LLAMA | {"attention_bias": True}, "attention_bias is True"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
    (MINISTRAL | {"layer_types": ["full_attention"]}, "layer_types is .*an entry for each layer"),
    (MINISTRAL | {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types names 'chunked_attention'"),
    (
        MINISTRAL | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": [3, 4]},
        "sliding_window and layer_types both say",
    ),
    ({"model_type": ...}, "model_type is missing"),
    ({"architectures": ["MistralForSequenceClassification"]}, "architectures is"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, but must be a whole number above 0"),
    ({"num_local_experts": 8}, "num_local_experts is 8"),
    ({"moe": {"num_experts": 8}}, "moe is"),
    ({"yarn": {"beta": 32}}, "yarn is"),
    ({"vision_config": {"hidden_size": 1}}, "vision_config is"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is of type 'linear'"),
    ({"rope_scaling": "default"}, "rope_scaling is of type 'default'"),
    ({"rope_scaling": "yarn"}, "rope_scaling is of type 'yarn'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters is of type 'yarn'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters holds 'full_attention'"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'"),
    ({"rope_parameters": {"rope_theta": NAN}}, "rope_theta is nan"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has layers of full_attention, which only"),
    (
        {"layer_types": ["full_attention"] * 2, "sliding_window": ...},
        "layer_types .* set that to null if no layer has one",
    ),
    ({"layer_types": ["linear_attention"] * 2}, "layer_types names 'linear_attention'"),
    ({"sliding_window": [4, True]}, r"sliding_window is \[4, True\], but must be"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_window": True}, "sliding_window is True"),
    ({"sliding_window": 7.5}, "sliding_window is 7.5"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "n_heads 3 is not a multiple of n_kv_heads 2"),
    ({"head_dim": None, "num_attention_heads": 3}, "head_dim is not given, and 3 heads do not divide hidden_size 128"),
    ({"head_dim": 63}, "head_dim 63 is odd"),
    ({"hidden_size": "128"}, "hidden_size is '128'"),
    ({"hidden_size": 128.0}, "hidden_size is 128.0"),
    ({"hidden_size": ...}, "hidden_size is missing"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"rms_norm_eps": NAN}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": INF}, "rms_norm_eps is inf"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ({"tie_word_embeddings": 1.0}, "tie_word_embeddings is 1.0"),
]


@pytest.mark.parametrize(("changes", "message"), HF_REFUSED)
def test_config_json_refuses(hf_folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(hf_folder / "config.json", **changes)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        config_in(hf_folder)


PARAMS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"moe": {"num_experts": 8}}, "moe is"),
    ({"yarn": {"beta": 32}}, "yarn is"),
    ({"vision_config": {"hidden_size": 1}}, "vision_config is"),
    ({"vision_encoder": {"hidden_size": 1}}, "vision_encoder is"),
    ({"multimodal": {"whisper_model_args": {}}}, "multimodal is"),
    ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling is"),
    ({"model_type": "mamba"}, "model_type is 'mamba'"),
    ({"causal": False}, "causal is False"),
    ({"sliding_window": "wide"}, "sliding_window is 'wide'"),
    ({"sliding_window": [4, 4, 4]}, "sliding_window has 3 entries, which cannot be repeated over 2 layers"),
    ({"sliding_window": []}, "sliding_window has 0 entries"),
    ({"sliding_window": [None, -8]}, "sliding_window is .*must be a whole number above 0"),
    ({"_sliding_window": 9}, "sliding_window and _sliding_window differ"),
    ({"rope_theta": NAN}, "rope_theta is nan"),
    ({"head_dim": ...}, "head_dim is missing"),
    ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
]


@pytest.mark.parametrize(("changes", "message"), PARAMS_REFUSED)
def test_params_json_refuses(mistral_folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(mistral_folder / "params.json", **changes)
    with pytest.raises(UserError, match=rf"params\.json: {message}"):
        config_in(mistral_folder)


DAMAGED: list[tuple[bytes, str]] = [
    (b"[" * 100_000, "nested too deeply"),
    (b"[1]", "a JSON object was expected, not a list"),
    (b"{", "Expecting property name"),
    (b"", "Expecting value"),
    (b"\xff\xfe{}", "utf-8"),
    (b'{"hidden_size": 1, "hidden_size": 2}', "the key 'hidden_size' stands twice"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_damaged_json_is_one_line(hf_folder: Path, content: bytes, message: str) -> None:
    (hf_folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: not a readable JSON file: .*{message}") as caught:
        config_in(hf_folder)
    assert len(str(caught.value)) < 500


def test_a_huge_config_is_not_parsed(hf_folder: Path) -> None:
    with (hf_folder / "config.json").open("wb") as file:
        file.truncate(101_000_000)  # sparse: takes no space
    with pytest.raises(UserError, match=r"config\.json: .*101,000,000 bytes, more than"):
        config_in(hf_folder)
    # Objects take thirty times the bytes of their text.
    (hf_folder / "config.json").write_bytes(b'{"a": [' + b"[]," * 700_000 + b"0]}")
    with pytest.raises(UserError, match=r"config\.json: .*2,100,010 bytes, more than the 2,000,000"):
        config_in(hf_folder)


def test_windows_for_a_million_layers_are_not_gone_through(hf_folder: Path, mistral_folder: Path) -> None:
    edit_json(mistral_folder / "params.json", sliding_window=[None] * 300_000, n_layers=300_000)
    kinds = ["full_attention"] * 90_000
    edit_json(hf_folder / "config.json", **MINISTRAL | {"layer_types": kinds, "num_hidden_layers": len(kinds)})
    for folder, says in ((mistral_folder, "sliding_window has 300000 entries"), (hf_folder, "layer_types is")):
        with pytest.raises(UserError, match=says):
            config_in(folder)


def test_a_long_value_does_not_flood_the_terminal(hf_folder: Path) -> None:
    edit_json(hf_folder / "config.json", model_type="x" * 100_000)
    with pytest.raises(UserError, match="model_type is 'xxx") as caught:
        config_in(hf_folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_written_configs_read_back(hf_folder: Path, mistral_folder: Path, window: int | None, tied: bool) -> None:
    config = ModelConfig(**{**asdict(TINY), "sliding_window": window, "tied_embeddings": tied})
    write_json(hf_folder / "config.json", config_to_hf(config, "bfloat16"))
    write_json(mistral_folder / "params.json", config_to_params(config))
    assert config_in(hf_folder) == config
    assert config_in(mistral_folder) == config


def test_transformers_reads_our_config(hf_folder: Path) -> None:
    write_json(hf_folder / "config.json", config_to_hf(TINY, "bfloat16"))
    theirs = MistralConfig.from_pretrained(hf_folder)
    assert theirs.rope_parameters == {"rope_theta": 5e4, "rope_type": "default"}
    assert (theirs.sliding_window, theirs.head_dim, theirs.rms_norm_eps) == (7, 64, 1e-5)
    assert str(theirs.dtype) == "torch.bfloat16"
