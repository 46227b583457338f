"""The formats: what each corpus holds, the reader that is asked, and, apart from it, what spoilt files honestly say.

The corpus is written by the package itself when it is asked for; `corpus/` holds what only others write (configs of
transformers and PEFT). The checks read the files again by the libraries that own the formats, or byte by byte, and
never by the package's readers: safetensors, json, tomllib, csv, sentencepiece.
"""

import csv
import hashlib
import io
import json
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.fuzz.mutate import Folder, join_safetensors, split_safetensors
from benchmarks.fuzz.watch import MAX_TEXT, RefusedError, WrongError
from minilora import dispatch
from minilora.adamw import FlatAdamW
from minilora.arguments import parse_run, run_parser
from minilora.checkpoint import save
from minilora.checkpoint.adapter import read_adapter, save_adapter
from minilora.checkpoint.adapter_parts import Adapter
from minilora.checkpoint.gguf_file import gguf_keys, read_gguf, write_gguf
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.provenance import check_origin, read_provenance
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.checkpoint.save import model_weights, save_hf, save_mistral
from minilora.checkpoint.write import verify_manifest
from minilora.config import LoraConfig, ModelConfig, PrefixConfig, RunConfig, base_folder, to_dict
from minilora.data.encode import encode_record
from minilora.data.pack import RowSampler
from minilora.data.records import TextRecord
from minilora.data.sources import read_source
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.lora import add_lora
from minilora.model import Mistral
from minilora.prefix import add_prefix
from minilora.recipes import recipe_file, recipe_names
from minilora.tokenizer import load_tokenizer
from minilora.toml import config_toml
from minilora.train.state import RunState, load_weights
from minilora.train.step import LossScale
from minilora.verbs.training import train

CORPUS = Path(__file__).parent / "corpus"
TOKENIZER = base_folder("demo") / "tokenizer.model"
# Each size differs from the others.
SIZES = ModelConfig(
    dim=16,
    n_layers=2,
    head_dim=4,
    hidden_dim=24,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=40,
    sliding_window=5,
    max_seq_len=64,
)
TEXT = "It's 3 o'clock:\tnaïve [INST] 日本 </s>\n"
_OTHER_DECODERS = (
    "attention_bias", "attention_dropout", "mlp_bias", "moe", "multimodal", "num_local_experts", "text_config",
    "use_biases", "vision_config", "vision_encoder", "yarn",
)  # fmt: skip
_LENGTHS = [3, 9, 5, 7, 2, 8, 4]


@dataclass(frozen=True)
class Format:
    """corpus: its folders by name; read: what is watched; check: raises WrongError unless it is what the files say.

    seals: a manifest of the corpus is made to fit what was spoilt, see `mutated`
    """

    corpus: Callable[[], dict[str, Folder]]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None]
    seals: bool = True


def folder_of(path: Path) -> Folder:
    """A folder of files in memory."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def _made(write: Callable[[Path], Any]) -> Folder:
    """What `write` writes at the path that it is given."""
    with tempfile.TemporaryDirectory() as temp:
        write(Path(temp) / "made")
        return folder_of(Path(temp) / "made")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise WrongError(what)


def _equal(what: str, got: Any, expected: Any) -> None:
    _require(
        type(got) is type(expected) and got == expected, f"{what} is {got!r:.200}, the file says {expected!r:.200}"
    )


def _close(what: str, got: Tensor, expected: Tensor) -> None:
    """Equal, and finite; for float32 that was computed in another order, to its last digits."""
    _require(got.shape == expected.shape, f"{what} has shape {tuple(got.shape)}, the file's {tuple(expected.shape)}")
    _require(bool(got.isfinite().all()), f"{what} is not finite")
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    _require(
        torch.allclose(got, expected, rtol=0, atol=2e-6 * scale, equal_nan=True),
        f"{what} differs from the file's numbers",
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def tiny(config: ModelConfig = SIZES) -> Mistral:
    """A Mistral of random weights."""
    model = Mistral(config)
    model.init_weights(0)
    return model


def _hf_corpus() -> dict[str, Folder]:
    tied, plain = replace(SIZES, tied_embeddings=True, sliding_window=None), replace(SIZES, sliding_window=None)
    pattern = replace(SIZES, sliding_window=(5, None))
    made = {
        "bf16": _made(lambda path: save_hf(tiny(), path)),
        "tied": _made(lambda path: save_hf(tiny(tied), path, dtype=torch.float16)),
        "windows": _made(lambda path: save_hf(tiny(pattern), path, dtype=torch.float32)),
    }
    weights = _made(lambda path: save_hf(tiny(plain), path, dtype=torch.float32))
    for file in sorted(CORPUS.glob("*_config.json")):  # as transformers writes them
        made[file.stem] = weights | {"config.json": file.read_bytes()}
    return made


def _sharded_corpus() -> dict[str, Folder]:
    with patch.object(save, "MAX_SHARD_BYTES", 4000):
        sharded = _made(lambda path: save_hf(tiny(), path))
    return {"sharded": sharded, "both": sharded | _made(lambda path: save_mistral(tiny(), path))}


def _mistral_corpus() -> dict[str, Folder]:
    pattern = replace(SIZES, sliding_window=(None, 5), tied_embeddings=True)
    return {
        "bf16": _made(lambda path: save_mistral(tiny(), path)),
        "windows": _made(lambda path: save_mistral(tiny(pattern), path, dtype=torch.float32)),
    }


def _nf4_corpus() -> dict[str, Folder]:
    with tempfile.TemporaryDirectory() as temp:
        save_hf(tiny(), source := Path(temp) / "source")
        made = {
            name: _made(lambda path, nested=nested: quantize_checkpoint(source, path, double_quant=nested))  # type: ignore[misc]
            for name, nested in (("nested", True), ("plain", False))
        }
    header, body = split_safetensors(_bytes(made["nested"], "model.safetensors"))
    for line in header.values():
        if line.get("dtype") == "U8" and line["shape"][1:] == [1]:  # packed bytes under the name of a float type
            line |= {"dtype": "BF16", "shape": [line["shape"][0] // 2, 1]}
    return made | {"stored as BF16": made["nested"] | {"model.safetensors": join_safetensors(header, body)}}


def _bytes(folder: Mapping[str, bytes | str | None], name: str) -> bytes:
    held = folder[name]
    assert isinstance(held, bytes)
    return held


def _load(path: Path) -> Mistral:
    return load_model(path, dtype=torch.float32, device="cpu")


def _check_model(path: Path, model: Mistral) -> None:
    is_hf = any((path / f"model.safetensors{index}").exists() for index in ("", ".index.json"))
    is_hf = is_hf and (path / "config.json").exists()
    values = json.loads((path / ("config.json" if is_hf else "params.json")).read_text("utf-8"))
    _require(not any(values.get(key) for key in _OTHER_DECODERS), "a config of another decoder passed")
    _require(values.get("hidden_act") in (None, "silu"), "another activation passed")
    for name, value in (_hf_sizes if is_hf else _params_sizes)(values).items():
        _equal(name, getattr(model.config, name), value)
    held = _stored(path, "model" if is_hf else "consolidated")
    for spec in tensor_specs(model.config):
        layer = model.get_submodule(spec.module)
        key = spec.key("hf" if is_hf else "mistral")
        if isinstance(layer, NF4Linear):
            got, expected = layer.weight.dequantize(torch.float32), _dequantized(key, held, spec.shape)
        else:
            got, expected = layer.weight, held[key].float()  # type: ignore[assignment]
        if not is_hf and spec.rope_heads:  # the pairs of a head stand side by side in the file
            heads = expected.view(spec.rope_heads, -1, 2, expected.shape[1])
            expected = torch.cat([heads[:, :, 0], heads[:, :, 1]], dim=1).reshape(expected.shape)
        _close(key, got, expected)


def _stored(path: Path, stem: str) -> dict[str, Tensor]:
    """All tensors that the folder holds for this layout, read by the format's own library."""
    index, names = path / f"{stem}.safetensors.index.json", {f"{stem}.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    held = dict[str, Tensor]()
    for name in names:
        held |= safetensors.torch.load((path / name).read_bytes())
    return held


def _dequantized(key: str, held: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """bitsandbytes' weight by the definition: level * absmax, where the absmax may be levels themselves."""
    state = json.loads(bytes(held[f"{key}.quant_state.bitsandbytes__nf4"].numpy()))
    packed = held[key].view(-1).view(torch.uint8).long()
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: prod(shape)]
    absmax = held[f"{key}.absmax"]
    if absmax.dtype == torch.uint8:
        nested = held[f"{key}.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        absmax = held[f"{key}.nested_quant_map"][absmax.long()] * nested + state["nested_offset"]
    absmax = absmax.repeat_interleave(state["blocksize"])[: len(codes)]
    return (held[f"{key}.quant_map"][codes] * absmax).view(shape)


def _hf_sizes(values: dict[str, Any]) -> dict[str, Any]:
    heads, window = values["num_attention_heads"], values.get("sliding_window", 4096)
    kinds = values.get("layer_types") or ["sliding_attention"] * values["num_hidden_layers"]
    if values["model_type"] == "llama":  # its class knows neither
        window, kinds = None, [""]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = next((t for t in (rope.get("rope_theta"), values.get("rope_theta")) if t is not None), 1e4)
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    eps = values.get("rms_norm_eps")
    return {
        "dim": values["hidden_size"],
        "n_layers": values["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": heads if values.get("num_key_value_heads") is None else values["num_key_value_heads"],
        "head_dim": values["hidden_size"] // heads if values.get("head_dim") is None else values["head_dim"],
        "hidden_dim": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "norm_eps": 1e-6 if eps is None else float(eps),
        "rope_theta": float(theta),
        "tied_embeddings": values.get("tie_word_embeddings") is True,
    } | ({} if isinstance(window, list | str) else {"sliding_window": _folded(windows)})


def _params_sizes(values: dict[str, Any]) -> dict[str, Any]:
    window = values.get("sliding_window", values.get("_sliding_window"))
    n_layers, heads = values["n_layers"], values["n_heads"]
    windows = tuple(window * (n_layers // len(window))) if isinstance(window, list) else (window,) * n_layers
    windows = tuple(int(w) if isinstance(w, str) else w for w in windows)
    names = ("dim", "n_layers", "n_heads", "head_dim", "hidden_dim", "vocab_size")
    theta = values.get("rope_theta")
    return {name: values[name] for name in names} | {
        "n_kv_heads": heads if values.get("n_kv_heads") is None else values["n_kv_heads"],
        "norm_eps": float(values["norm_eps"]),
        "rope_theta": float(theta if theta is not None else 1e6 if not any(windows) else 1e4),
        "sliding_window": _folded(windows),
        "tied_embeddings": values.get("tied_embeddings") is True,
    }


def _folded(windows: tuple[int | None, ...]) -> Any:
    """The shortest pattern whose repetition they are; one for all is no tuple."""
    n = len(windows)
    short = next(windows[:p] for p in range(1, n + 1) if n % p == 0 and windows[:p] * (n // p) == windows)
    return short[0] if len(short) == 1 else short


# -- adapters ----------------------------------------------------------------------------------------------------------


def _adapted(config: LoraConfig | PrefixConfig) -> Mistral:
    torch.manual_seed(0)
    model = add_lora(tiny(), config) if isinstance(config, LoraConfig) else add_prefix(tiny(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prefix" in name:
                parameter.uniform_(0.1, 1)
    return model


def _peft_corpus() -> dict[str, Folder]:
    patterns = LoraConfig(
        3,
        6,
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\.mlp\.(up|down)_proj": 9.5},
        modules_to_save=("lm_head",),
    )
    configs: dict[str, LoraConfig | PrefixConfig] = {
        "lora": LoraConfig(2, 4),
        "patterns": patterns,
        "dora": LoraConfig(2, 4, targets=("q_proj", "down_proj"), dora=True, rslora=True),
        "expression": LoraConfig(2, 4, targets=r"model\.layers\.\d+\.self_attn\.[qk]_proj"),
        "prefix": PrefixConfig(3),
    }
    provenance = {"base_path": "demo", "tokenizer": {"sha256": "0" * 64, "template": "v3"}}
    made = {
        name: _made(lambda path, config=config: save_adapter(_adapted(config), path, provenance=provenance))  # type: ignore[misc]
        for name, config in configs.items()
    }
    for kind in ("lora", "prefix"):  # as PEFT writes it, of the same sizes
        weights = "adapter_model.safetensors"
        made[f"peft's {kind}"] = {
            "adapter_config.json": (CORPUS / f"peft_{kind}.json").read_bytes(),
            weights: made["patterns" if kind == "lora" else "prefix"][weights],
        }
    return made


def _mistral_adapter_corpus() -> dict[str, Folder]:
    def write(path: Path) -> None:
        save_adapter(_adapted(LoraConfig(2, 6, targets=("q_proj", "v_proj", "up_proj"))), path.with_name("peft"))
        save_mistral_adapter(read_adapter(path.with_name("peft"), SIZES), SIZES, path)

    return {"ours": _made(write)}


def _check_adapter(path: Path, adapter: Adapter) -> None:
    is_peft = (path / "adapter_config.json").is_file()
    held = safetensors.torch.load(
        (path / ("adapter_model" if is_peft else "lora")).with_suffix(".safetensors").read_bytes()
    )
    _equal("the number of tensors", len(adapter.tensors), len(held))
    values = json.loads((path / "adapter_config.json").read_text("utf-8")) if is_peft else {}
    if isinstance(adapter.config, PrefixConfig):
        _equal("num_virtual_tokens", adapter.config.n_tokens, values["num_virtual_tokens"])
        _close("the prefix", adapter.tensors["prompt_embeddings"], held["prompt_embeddings"].float())
        return
    heads = {"self_attn.q_proj": SIZES.n_heads, "self_attn.k_proj": SIZES.n_kv_heads}
    for spec in tensor_specs(SIZES):
        config, end = adapter.config, spec.module.partition(".")[2].partition(".")[2]
        for part in ("lora_A", "lora_B", "lora_magnitude_vector", "weight"):
            if (tensor := adapter.tensors.get(f"{spec.module}.{part}")) is None:
                continue
            suffix = ".weight" if part in ("lora_A", "lora_B") else ""
            inner = spec.module if spec.module == "lm_head" else f"model.{spec.module}"
            key = f"base_model.model.{inner}.{part}{suffix}" if is_peft else f"{spec.mistral_module}.{part}{suffix}"
            expected = held[key].float()
            if not is_peft and part == "lora_B" and end in heads:
                pairs = expected.view(heads[end], -1, 2, expected.shape[1])
                expected = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(expected.shape)
            _close(key, tensor, expected)
            if part == "lora_A":
                _equal(f"the rank of {key}", config.rank_of(spec.module), tensor.shape[0])
    if is_peft:
        for ours, theirs in {"rank": "r", "alpha": "lora_alpha"}.items():
            _equal(theirs, float(getattr(adapter.config, ours)), float(values[theirs]))
        for ours in ("rslora", "dora"):
            _equal(f"use_{ours}", getattr(adapter.config, ours), bool(values.get(f"use_{ours}")))
        for name in ("rank_pattern", "alpha_pattern"):
            _equal(name, getattr(adapter.config, name), values.get(name) or {})
    elif (path / "params.json").is_file():
        scaling = json.loads((path / "params.json").read_text("utf-8"))["lora"]["scaling"]
        _require(abs(adapter.config.scale_of("") - scaling) <= 1e-6 * abs(scaling), "the scale is another one")


def _origin(path: Path) -> list[str]:
    here = {"base_fingerprint": "0" * 64, "quantization": {"type": "nf4"}, "tokenizer": {"template": "v3"}}
    return check_origin(path, read_provenance(path), here, force=False)


def _check_origin(path: Path, said: list[str]) -> None:
    _require(all(text.isprintable() for text in said), f"it is said {said!r}")
    if not (path / "minilora.json").is_file():
        return
    values = json.loads((path / "minilora.json").read_bytes())
    _require(values.get("base_fingerprint") in (None, "", "0" * 64), "another base passed")
    _require((values.get("tokenizer") or {}).get("template") in (None, "v3"), "another template passed")
    if (path / "manifest.json").is_file():
        _check_manifest(path, json.loads((path / "manifest.json").read_bytes()))


def _origin_corpus() -> dict[str, Folder]:
    provenance = {"tokenizer": {"sha256": "0" * 64, "template": "v3"}, "data": {}, "versions": {}}
    model = _adapted(LoraConfig(2, 4, targets=("q_proj",)))
    model.base_fingerprint = "0" * 64
    return {"ours": _made(lambda path: save_adapter(model, path, provenance=provenance))}


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    for name, facts in manifest["files"].items():
        data = (path / name).read_bytes()
        _equal(name, facts, {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})


# -- a run -------------------------------------------------------------------------------------------------------------


def _fresh_state() -> RunState:
    torch.manual_seed(1)
    weights = {f"layers.{i}.q_proj.lora_{part}": torch.nn.Parameter(torch.randn(3, 4)) for i in (0, 1) for part in "AB"}
    optimizer = FlatAdamW({(0.01, 1.0): list(weights.values())})
    return RunState(
        weights,
        optimizer,
        RowSampler(_LENGTHS, 12, 0),
        LossScale.of(torch.float32),
        {"config": {"seed": 0}, "base": "abc"},
    )


def _step(state: RunState) -> None:
    for parameter in state.weights.values():
        assert parameter.grad is not None
        parameter.grad.fill_(1)
    state.optimizer.step(1e-3)


def _state_corpus() -> dict[str, Folder]:
    def write(path: Path) -> None:
        state = _fresh_state()
        state.sampler.take(2)
        _step(state)
        state.counters.step, state.counters.best_loss = 3, 1 / 3
        state.save(path)

    return {"ours": _made(write)}


def _resume(path: Path) -> RunState:
    state = _fresh_state()
    before = {name: weight.detach().clone() for name, weight in state.weights.items()}
    try:
        state.load(path)
    except UserError:
        changed = not all(torch.equal(state.weights[name], weight) for name, weight in before.items())
        moments = [moment for of_one in state.optimizer.state.values() for moment in of_one.values()]
        changed = changed or state.optimizer.steps > 0 or any(bool(moment.any()) for moment in moments)
        _require(not changed, "it is refused, but some of it was loaded")
        raise
    load_weights(state.weights, path)
    state.sampler.take(3)
    _step(state)  # what was loaded can be gone on from
    return state


def _check_state(path: Path, state: RunState) -> None:
    document, fresh = json.loads((path / "state.json").read_bytes()), _fresh_state()
    _equal("the counters", asdict(state.counters), asdict(state.counters) | document["counters"])
    _equal("the loss scale", asdict(state.loss_scale), asdict(state.loss_scale) | document["loss_scale"])
    held = safetensors.torch.load((path / "state.safetensors").read_bytes())
    weights = {name: torch.nn.Parameter(held[f"weight.{name}"]) for name in fresh.weights}
    by_torch = torch.optim.AdamW(weights.values(), lr=1e-3)
    for name, weight in weights.items():  # the step, taken by torch from the file's own numbers
        keys = [key for key in held if key.startswith(f"optimizer.{name}.")]
        by_torch.state[weight] = {key.rpartition(".")[2]: held[key].clone() for key in keys}
        weight.grad = torch.ones_like(weight)
    by_torch.step()
    for name, weight in weights.items():  # infinite, where the file has a moment too small for the other
        same = torch.allclose(state.weights[name], weight, rtol=1e-6, equal_nan=True)
        _require(same, f"after a step {name} is not what it was to be")


def _toml_corpus() -> dict[str, Folder]:
    made: dict[str, Folder] = {name: {"config.toml": recipe_file(name).read_bytes()} for name in recipe_names()}
    lora = LoraConfig(4, 8, rank_pattern={"q_proj": 2}, targets="all-linear")
    return made | {"complete": {"config.toml": config_toml(RunConfig(lora=lora)).encode()}}


def _read_toml(path: Path) -> RunConfig:
    return parse_run(run_parser(train), [str(path / "config.toml")])[0]


def _check_toml(path: Path, config: RunConfig) -> None:
    said = tomllib.loads((path / "config.toml").read_text("utf-8"))
    for section, values in to_dict(RunConfig()).items():
        expected = values | said.get(section, {})
        for key, got in to_dict(getattr(config, section)).items():
            same = got == expected[key] and isinstance(got, bool) == isinstance(expected[key], bool)
            same = same or (type(got) in (int, float) and str(got) == expected[key])  # "4096" is taken for 4096
            _require(same, f"{section}.{key} is {got!r}, the file says {expected[key]!r}")


def _dispatch(path: Path) -> tuple[dispatch.Entry, ...]:
    ours, dispatch.TABLE = dispatch.TABLE, path / "dispatch.json"
    dispatch.table.cache_clear()
    try:
        return dispatch.table()
    finally:
        dispatch.TABLE = ours
        dispatch.table.cache_clear()


def _check_dispatch(path: Path, entries: tuple[dispatch.Entry, ...]) -> None:
    found = sorted(json.loads((path / "dispatch.json").read_bytes()), key=lambda entry: entry["arch"])
    _equal("the table", json.loads(json.dumps([asdict(entry) for entry in entries])), found)
    way = entries[-1].way(3, 4096, 4096, torch.float16)
    _require(way in ("matvec", "matmul", "dequantize"), f"a product is taken by {way}")


# -- tokenizer, data, GGUF ---------------------------------------------------------------------------------------------


def _tokenize(path: Path) -> tuple[list[int], str, list[int], int]:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    chat, _ = tokenizer.encode_chat([{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}])
    controls = [i for i in ids if tokenizer.control_name(i) is not None]
    _require(not controls, f"text became the control pieces {controls}")
    return ids, tokenizer.decode(ids), chat, tokenizer.vocab_size


def _check_tokens(path: Path, read: tuple[list[int], str, list[int], int]) -> None:
    from sentencepiece import SentencePieceProcessor

    ids, text, chat, n = read
    file = next((path / name for name in ("tokenizer.model", "tokenizer.model.v3") if (path / name).is_file()), None)
    model = SentencePieceProcessor(model_proto=(file or next(path.glob("*tokenizer*.model*"))).read_bytes())
    _equal("the vocabulary", n, model.vocab_size())
    _equal("the ids", ids, model.encode(TEXT))
    _equal("the text", text, model.decode(ids))
    _require(all(0 <= i < n for i in (*ids, *chat)), "an id lies outside of the vocabulary")


def _jsonl_corpus() -> dict[str, Folder]:
    call = {"id": "abcdefghi", "function": {"name": "add", "arguments": '{"a": 1}'}}
    add = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
    chats: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "Be kind."}, *_chat("one", "two", "three", "four")]},
        {"messages": _chat("one", [{"type": "text", "text": "two"}])},
        {
            "interactions": [
                {"role": "user", "text": "one"},
                {"role": "assistant", "text": "two", "weight": 0},
                *_chat("a", "b"),
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"},
                {"role": "assistant", "content": "2"},
            ],
            "tools": [add],
        },
    ]
    pairs: list[dict[str, Any]] = [
        {"text": "A document.\n\nOf two paragraphs."},
        {"instruction": "Say it.", "input": "this", "output": "It is said."},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}], "system": "Be kind."},
        {"content": "asked", "summary": "said", "history": [["before", "answer"]]},
        {"prompt": "é" * 20, "response": "日本", "only_last": True},
    ]
    lines = {"chats": chats, "pairs": pairs}
    made = {
        name: Folder({"data.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode()})
        for name, rows in lines.items()
    }
    return made | {"array": {"data.json": json.dumps([*chats, *pairs], indent=1).encode()}}


def _chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _table_corpus() -> dict[str, Folder]:
    rows = [["prompt", "response"], ["one, two", 'said "so"'], ["é\n日本", "x"], ["a", "b"]]
    csv.writer(text := io.StringIO()).writerows(rows)
    return {"csv": {"data.csv": text.getvalue().encode()}, "text": {"data.txt": "One.\n\nTwo: é.\n".encode()}}


def _parquet_corpus() -> dict[str, Folder]:
    import pyarrow
    from pyarrow.parquet import write_table

    tables = {
        "pairs": pyarrow.table({"prompt": ["one", "two"] * 20, "response": ["é", "said"] * 20}),
        "chats": pyarrow.table({"messages": [_chat("one", "two"), _chat("three", "four")]}),
    }
    made = dict[str, Folder]()
    for name, table in tables.items():
        write_table(table, buffer := io.BytesIO())
        made[name] = {"data.parquet": buffer.getvalue()}
    return made


def _read_data(path: Path) -> tuple[list[Any], int]:
    """Records, and how many rows there were. They are encoded, too."""
    file = next((f for f in sorted(path.iterdir()) if f.name.startswith("data")), path / "data.jsonl")
    records, bad = read_source(str(file))
    n_rows = len(records) + len(bad)
    for record in records:
        try:
            samples, _ = encode_record(record, _tokenizer(), 64, "truncate")
            _require(all(sample.n_targets and sample.length <= 64 for sample in samples), "a sample too long or empty")
        except UserError as error:
            bad.append(str(error))
    for text in bad:
        _require(text.isprintable() and len(text) <= MAX_TEXT, f"a message of {len(text):,} characters: {text[:300]!r}")
    return records, n_rows


def _tokenizer() -> Any:
    if not _HELD:
        _HELD.append(load_tokenizer(TOKENIZER))
    return _HELD[0]


_HELD: list[Any] = []


def _check_data(path: Path, read: tuple[list[Any], int]) -> None:
    """Each text that is trained on stands in its row, by Python's own reader."""
    records, n_rows = read
    file = next(f for f in sorted(path.iterdir()) if f.name.startswith("data"))
    rows, data = list[Any](), b"" if file.suffix == ".parquet" else file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if file.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))
    elif file.suffix == ".txt":
        rows = [data.decode().replace("\r\n", "\n")]
    elif file.suffix == ".parquet":
        from pyarrow.parquet import read_table

        rows = read_table(file).to_pylist()
    elif data.lstrip().startswith(b"["):
        rows = json.loads(data)
    else:
        rows = [_json_or_none(line) for line in data.split(b"\n") if line.strip()]
        _equal("the number of rows", n_rows, len(rows))
    texts = {text for row in rows for text in _texts(row)}
    for record in records:
        said = [record.text] if isinstance(record, TextRecord) else [m["content"] for m in record.messages]
        for text in said:
            # Alpaca's input goes under its instruction, and parts of a content are joined.
            found = text in texts or all(part in texts or not part for part in (*text.split("\n\n"),))
            _require(
                found or all(any(line in t for t in texts) for line in text.split("\n")), f"{text!r:.100} is in no row"
            )


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _gguf_corpus() -> dict[str, Folder]:
    sizes = replace(SIZES, vocab_size=_tokenizer().vocab_size, dim=32, sliding_window=None)
    model, keys = tiny(sizes), gguf_keys(sizes, _tokenizer(), "F16", "tiny", eos=2)
    for name in ("tokens", "scores", "token_type"):
        keys[f"tokenizer.ggml.{name}"] = keys[f"tokenizer.ggml.{name}"][:20]

    def write(path: Path, kind: Any) -> None:
        path.mkdir()
        weights = ((spec, weight) for spec, (_, weight) in zip(tensor_specs(sizes), model_weights(model), strict=True))
        write_gguf(path / "model.gguf", keys, sizes, weights, kind)

    return {kind: _made(lambda path, kind=kind: write(path, kind)) for kind in ("F16", "Q8_0")}  # type: ignore[misc]


def _check_gguf(path: Path, read: tuple[dict[str, Any], list[tuple[str, tuple[int, ...], str, int]]]) -> None:
    import gguf

    theirs = gguf.GGUFReader(path / "model.gguf")
    keys = {name: field.contents() for name, field in theirs.fields.items()}
    del keys["GGUF.tensor_count"], keys["GGUF.kv_count"]
    _equal("the keys", sorted(map(repr, read[0].items())), sorted(map(repr, keys.items())))  # NaN is not itself
    tensors = [(t.name, tuple(t.shape[::-1].tolist()), t.tensor_type.name, t.n_bytes) for t in theirs.tensors]
    _equal("the tensors", read[1], tensors)


def refusing(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader whose UserError is a RefusedError."""

    def tried(path: Path) -> Any:
        try:
            return read(path)
        except UserError as error:
            raise RefusedError(str(error)) from None

    return tried


def _adapter(path: Path) -> Adapter:
    return read_adapter(path, SIZES)


FORMATS: dict[str, Format] = {
    "hf": Format(_hf_corpus, _load, _check_model),
    "hf sharded": Format(_sharded_corpus, _load, _check_model),
    "mistral": Format(_mistral_corpus, _load, _check_model),
    "bitsandbytes nf4": Format(_nf4_corpus, _load, _check_model),
    "peft adapter": Format(_peft_corpus, _adapter, _check_adapter),
    "mistral-finetune adapter": Format(_mistral_adapter_corpus, _adapter, _check_adapter),
    "provenance": Format(_origin_corpus, _origin, _check_origin),
    "manifest": Format(_state_corpus, verify_manifest, _check_manifest, seals=False),
    "run state": Format(_state_corpus, _resume, _check_state),
    "run toml": Format(_toml_corpus, _read_toml, _check_toml),
    "tokenizer": Format(lambda: {"demo": {"tokenizer.model": TOKENIZER.read_bytes()}}, _tokenize, _check_tokens),
    "jsonl": Format(_jsonl_corpus, _read_data, _check_data),
    "csv and text": Format(_table_corpus, _read_data, _check_data),
    "parquet": Format(_parquet_corpus, _read_data, _check_data),
    "gguf": Format(_gguf_corpus, lambda path: read_gguf(path / "model.gguf"), _check_gguf),
    "dispatch": Format(lambda: {"ours": {"dispatch.json": dispatch.TABLE.read_bytes()}}, _dispatch, _check_dispatch),
}
