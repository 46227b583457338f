"""bitsandbytes' 4-bit folders, ours and theirs, byte for byte in both directions; and every way to spoil one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, hf_model, tokens
from torch import Tensor
from transformers import BitsAndBytesConfig, MistralForCausalLM

from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.quantize import quantize_checkpoint
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.model import Mistral
from minilora.nf4 import levels

F32 = torch.float32
STORAGES = ("uint8", "bfloat16", "int8", "float16", "float32", "float64")
UP = "model.layers.1.mlp.up_proj.weight"  # (192, 128): 384 blocks
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
NESTED_STATE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float32",
    "shape": [192, 128],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.05,
}


def load_theirs(folder: Path, **options: Any) -> MistralForCausalLM:
    """In training mode: in evaluation, bitsandbytes repacks the weights on some CPUs and rounds them anew."""
    model, report = MistralForCausalLM.from_pretrained(
        folder, dtype=F32, attn_implementation="eager", output_loading_info=True, device_map="cpu", **options
    )
    assert not any(report.values()), report
    return model.train()


def bnb_config(nested: bool, **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=F32,
        **options,
    )


@pytest.fixture(scope="session")
def packed(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders quantized by us (ours-False, ours-True: nested) and by transformers (theirs-False-uint8, ...)."""
    root = tmp_path_factory.mktemp("packed")
    for nested in (False, True):
        quantize_checkpoint(originals / "hf", root / f"ours-{nested}", double_quant=nested)
        for storage in STORAGES if nested else STORAGES[:2]:
            config = bnb_config(nested, bnb_4bit_quant_storage=storage)
            model = load_theirs(originals / "hf", quantization_config=config)
            model.save_pretrained(root / f"theirs-{nested}-{storage}")
    return root


def assert_same_model(ours: Mistral, theirs: MistralForCausalLM) -> None:
    """Every stored byte, every dequantized weight, and the logits."""
    n_packed = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, NF4Linear):
            n_packed += 1
            weight = theirs.model.get_submodule(name).weight
            assert torch.equal(layer.packed, weight.data.view(-1).view(torch.uint8)), name
            assert torch.equal(layer.weight.dequantize(), dequantize_4bit(weight.data, weight.quant_state)), name
    assert n_packed == 14
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_transformers_loads_ours(packed: Path, nested: bool) -> None:
    theirs = load_theirs(packed / f"ours-{nested}")
    assert_same_model(load_model(packed / f"ours-{nested}", dtype=F32), theirs)


@pytest.mark.parametrize(
    ("nested", "storage"), [(nested, storage) for nested in (False, True) for storage in STORAGES[: 6 if nested else 2]]
)
def test_we_load_what_transformers_saved(packed: Path, nested: bool, storage: str) -> None:
    folder = packed / f"theirs-{nested}-{storage}"
    assert_same_model(load_model(folder, dtype=F32), load_theirs(folder))


def test_parts_of_a_weight_may_lie_in_different_shards(packed: Path, originals: Path, tmp_path: Path) -> None:
    theirs = load_theirs(originals / "hf", quantization_config=bnb_config(True))
    theirs.save_pretrained(tmp_path, max_shard_size="13KB")
    sharded = open_checkpoint(tmp_path)
    assert any({part.file for part in w.parts.values()} != {w.packed.file} for w in sharded.nf4.values())
    assert sharded.fingerprint() == open_checkpoint(packed / "theirs-True-uint8").fingerprint()
    assert_same_model(load_model(tmp_path, dtype=F32), theirs)


def test_the_fingerprint_tells_bases_apart_but_not_storage_types(packed: Path, originals: Path) -> None:
    found = {f.name: open_checkpoint(f).fingerprint() for f in [*packed.iterdir(), originals / "hf"]}
    assert found["theirs-False-uint8"] == found["theirs-False-bfloat16"] == found["ours-False"]
    assert found["theirs-True-uint8"] == found["theirs-True-bfloat16"]
    assert len({found[name] for name in ("ours-False", "ours-True", "hf")}) == 3
    assert load_model(packed / "ours-True").base_fingerprint == found["ours-True"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_files_say_how_they_are_quantized(packed: Path, quantize: Any, double_quant: bool) -> None:
    for nested in (False, True):
        model = load_model(packed / f"ours-{nested}", quantize=quantize, double_quant=double_quant)
        layer = model.get_submodule("layers.1.mlp.up_proj")
        assert isinstance(layer, NF4Linear)
        assert (layer.nested_absmax is not None) == nested
        assert open_checkpoint(packed / f"ours-{nested}").double_quant == nested


def test_a_tensor_is_read_dequantized(packed: Path) -> None:
    checkpoint = open_checkpoint(packed / "ours-True")
    spec = next(spec for spec in checkpoint.tensors() if spec.module == "layers.1.mlp.up_proj")
    layer = load_model(packed / "ours-True").get_submodule(spec.module)
    assert isinstance(layer, NF4Linear)
    assert torch.equal(checkpoint.read(spec), layer.weight.dequantize())


def test_layers_that_were_left_dense_stay_so(originals: Path, tmp_path: Path) -> None:
    config = bnb_config(False, llm_int8_skip_modules=["lm_head", "down_proj"])
    theirs = load_theirs(originals / "hf", quantization_config=config)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, quantize="nf4", dtype=F32)
    assert isinstance(model.get_submodule("layers.1.mlp.up_proj"), NF4Linear)
    assert torch.equal(
        model.get_submodule("layers.1.mlp.down_proj").weight, theirs.model.layers[1].mlp.down_proj.weight
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_files_are_read_into_the_cpu_whatever_device_is_the_default(packed: Path) -> None:
    expected = load_model(packed / "ours-True")
    with torch.device("meta"):
        model = load_model(packed / "ours-True", device="cpu")
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_without_a_manifest_loads(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "ours-True", tmp_path / "x"))
    (folder / "manifest.json").unlink()
    load_model(folder)


# --- Faults ---------------------------------------------------------------------------------------------------------

Held = dict[str, Tensor]
Spoil = Callable[[Held], object]


def state(**changes: Any) -> Spoil:
    """Rewrite the state with these keys changed, or (...) deleted."""

    def spoil(held: Held) -> None:
        values = {**NESTED_STATE, **json.loads(bytes(held[STATE].numpy())), **changes}
        if f"{UP}.nested_absmax" not in held:
            values = {key: value for key, value in values.items() if key in changes or not key.startswith("nested")}
        held[STATE] = blob(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return spoil


def blob(text: str | bytes) -> Tensor:
    data = text.encode() if isinstance(text, str) else text
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def put(part: str, value: Tensor | None) -> Spoil:
    key = f"{UP}.{part}".rstrip(".")
    return lambda held: held.pop(key) if value is None else held.update({key: value})


def change(part: str, edit: Callable[[Tensor], Tensor]) -> Spoil:
    key = f"{UP}.{part}".rstrip(".")
    return lambda held: held.update({key: edit(held[key].clone())})


def first(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat([torch.tensor([value]), tensor[1:]])


def swapped(tensor: Tensor) -> Tensor:
    return tensor.flip(0)


NAN = float("nan")
DEEP = b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}"
WRONG: dict[str, tuple[bool, Spoil, str]] = {
    "absmax too short": (
        False,
        change("absmax", lambda t: t[:-1]),
        r"absmax is F32 \(383,\); .* wants float32 \(384,\)",
    ),
    "absmax too long": (True, change("absmax", lambda t: t.repeat(2)), r"absmax is U8 \(768,\); .*uint8 \(384,\)"),
    "absmax a matrix": (False, change("absmax", lambda t: t.view(2, -1)), r"absmax is F32 \(2, 192\)"),
    "absmax in bf16": (False, change("absmax", Tensor.bfloat16), r"absmax is BF16"),
    "absmax in 8 bits but nothing nested": (False, change("absmax", Tensor.byte), rf"lacks {UP}\.nested_absmax"),
    "absmax in f32 though nested": (True, change("absmax", Tensor.float), r"absmax is F32 .*uint8"),
    "absmax NaN": (False, change("absmax", first(NAN)), r"absmax: holds a number .* nan at element 0"),
    "absmax infinite": (False, change("absmax", first(float("inf"))), r"absmax: holds a number .* inf at element 0"),
    "nested_absmax NaN": (True, change("nested_absmax", first(NAN)), r"nested_absmax: holds a number .* nan"),
    "nested_absmax too short": (True, change("nested_absmax", lambda t: t[:1]), r"nested_absmax is F32 \(1,\)"),
    "absmax missing": (False, put("absmax", None), rf"lacks {UP}\.absmax"),
    "quant_map missing": (True, put("quant_map", None), rf"lacks {UP}\.quant_map"),
    "nested_absmax missing": (True, put("nested_absmax", None), rf"lacks {UP}\.nested_absmax"),
    "nested_quant_map missing": (True, put("nested_quant_map", None), rf"lacks {UP}\.nested_quant_map"),
    "state missing": (True, put("quant_state.bitsandbytes__nf4", None), rf"lacks {STATE}"),
    "weight missing": (True, put("", None), rf"missing tensor: {UP}"),
    "quant_map reversed": (False, change("quant_map", swapped), "quant_map is not NF4's"),
    "quant_map a little off": (False, change("quant_map", lambda t: t * 1.0001), "quant_map is not NF4's"),
    "quant_map NaN": (False, change("quant_map", first(NAN)), "quant_map is not NF4's"),
    "quant_map of 15": (False, change("quant_map", lambda t: t[:15]), r"quant_map is F32 \(15,\)"),
    "nested_quant_map another": (True, put("nested_quant_map", torch.linspace(-1, 1, 256)), "nested_quant_map is not"),
    "not UTF-8": (True, put("quant_state.bitsandbytes__nf4", blob(b'{"\xff": 1}')), "state.*not a readable .*utf-8"),
    "no JSON": (True, put("quant_state.bitsandbytes__nf4", blob("nf4")), "state.*not a readable JSON object"),
    "no object": (True, put("quant_state.bitsandbytes__nf4", blob("[1]")), "state.*a JSON object was expected"),
    "empty": (True, put("quant_state.bitsandbytes__nf4", blob(b" ")), "state.*not a readable JSON object"),
    "too deep": (True, put("quant_state.bitsandbytes__nf4", blob(DEEP)), "state.*(nested too deeply|quant_type is)"),
    "a huge state": (True, put("quant_state.bitsandbytes__nf4", blob(b" " * 5000)), "5,000 bytes of U8; at most 4,096"),
    "a state of floats": (True, put("quant_state.bitsandbytes__nf4", torch.ones(8)), "32 bytes of F32; at most"),
    "twice": (True, put("quant_state.bitsandbytes__nf4", blob('{"a":1,"a":2}')), "the key 'a' stands twice"),
    "fp4": (True, state(quant_type="fp4"), "quant_type is 'fp4'; it must be nf4"),
    "blocksize 48": (True, state(blocksize=48), "blocksize is 48; it must be 32 or 64"),
    "blocksize 128": (True, state(blocksize=128), r"absmax is U8 \(384,\); .*\(192,\)"),
    "blocksize true": (True, state(blocksize=True), "blocksize is True"),
    "blocksize 64.0": (True, state(blocksize=64.0), r"blocksize is 64\.0"),
    "no blocksize": (True, state(blocksize=...), "blocksize is None"),
    "int8": (True, state(dtype="int8"), "dtype is 'int8'; it must be float32 or bfloat16 or float16"),
    "shape another": (True, state(shape=[128, 192]), r"shape is \[128, 192\]; it must be \[192, 128\]"),
    "shape too large": (True, state(shape=[192, 256]), r"shape is \[192, 256\]"),
    "shape of floats": (True, state(shape=[192.0, 128.0]), r"shape is \[192\.0, 128\.0\]"),
    "shape a string": (True, state(shape="192x128"), "shape is '192x128'"),
    "offset NaN": (True, state(nested_offset=NAN), "nested_offset is nan, but must be a finite number"),
    "offset infinite": (True, state(nested_offset=-float("inf")), "nested_offset is -inf"),
    "offset above float32": (True, state(nested_offset=1e39), r"nested_offset is 1e\+39"),
    "offset a string": (True, state(nested_offset="0.05"), "nested_offset is '0.05'"),
    "no offset": (True, state(nested_offset=...), "nested_offset is None"),
    "nested_blocksize 128": (True, state(nested_blocksize=128), "nested_blocksize is 128; it must be 256"),
    "nested_dtype bf16": (True, state(nested_dtype="bfloat16"), "nested_dtype is 'bfloat16'"),
    "nested keys without nesting": (False, state(nested_blocksize=256), "nested_blocksize is 256; it must be absent"),
    "an unknown key": (True, state(rotation="hadamard"), "rotation is 'hadamard'; it must be absent"),
    "too few bytes": (False, change("", lambda t: t[:-1]), "12,287 bytes of U8; .* has 12,288"),
    "too many bytes": (True, change("", lambda t: torch.cat([t, t])), "24,576 bytes of U8; .* has 12,288"),
    "a stranger beside it": (True, put("absmax_of_absmax", torch.ones(3)), r"unknown tensor: '.*absmax_of_absmax'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_spoilt_weight_is_one_line_with_file_and_tensor(packed: Path, tmp_path: Path, case: str) -> None:
    nested, spoil, message = WRONG[case]
    folder = Path(shutil.copytree(packed / f"ours-{nested}", tmp_path / "x"))
    file = folder / "model.safetensors"
    held = {key: tensor.clone() for key, tensor in load_file(file).items()}
    spoil(held)
    save_file({key: tensor.contiguous() for key, tensor in held.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert UP in text
    assert "\n" not in text
    assert len(text.replace(str(tmp_path), "")) < 300


def test_maps_rounded_otherwise_are_the_same(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "ours-True", tmp_path / "x"))
    file = folder / "model.safetensors"
    held = load_file(file)
    for key in [key for key in held if key.endswith("quant_map")]:
        held[key] = held[key] * (1 + 2**-23)  # the next float32
    assert not torch.equal(held[f"{UP}.quant_map"], levels())
    save_file(held, file)
    for ours, spoilt in zip(load_model(packed / "ours-True").buffers(), load_model(folder).buffers(), strict=True):
        assert torch.equal(ours, spoilt)


NOT_OURS: list[tuple[Any, str]] = [
    ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
    ({"quant_method": "awq"}, "quant_method 'awq'"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "quant_method None"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit None"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type None"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": 1, "bnb_4bit_quant_type": "nf4"}, "load_in_4bit 1"),
    ("nf4", "quant_method 'nf4'"),
]


@pytest.mark.parametrize(("found", "message"), NOT_OURS)
def test_another_quantization_is_named(packed: Path, tmp_path: Path, found: Any, message: str) -> None:
    folder = Path(shutil.copytree(packed / "ours-True", tmp_path / "x"))
    edit_json(folder / "config.json", quantization_config=found)
    with pytest.raises(
        UserError, match=rf"config\.json: quantization_config is of {message}; only bitsandbytes' 4-bit"
    ):
        load_model(folder)


def test_config_and_tensors_must_agree(packed: Path, hf_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "ours-True", tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=...)
    with pytest.raises(
        UserError, match=r"is in NF4, but config\.json lacks quantization_config; fetch config\.json again"
    ):
        load_model(folder)
    edit_json(hf_folder / "config.json", quantization_config=config)
    with pytest.raises(UserError, match=r"no tensor is in NF4, though .* has a quantization_config"):
        load_model(hf_folder)


def test_a_packed_head_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed / "ours-True", tmp_path / "x"))
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = torch.zeros(320 * 128 // 2, 1, dtype=torch.uint8)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight in model\.safetensors, stored as U8"):
        load_model(folder)
    held["lm_head.weight.absmax"] = torch.ones(640)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown tensor: 'lm_head\.weight\.absmax'"):
        load_model(folder)


def test_a_tied_base(tmp_path: Path) -> None:
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    quantize_checkpoint(tmp_path / "tied", tmp_path / "nf4")
    assert_same_model(load_model(tmp_path / "nf4", dtype=F32), load_theirs(tmp_path / "nf4"))
