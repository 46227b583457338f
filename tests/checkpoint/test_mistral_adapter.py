"""Adapters of mistral-finetune, both ways, against the same model written out by hand in Mistral's own layout.

There is no package of it to compare with: `logits` below is the decoder in einsum, with the files' names, interleaved
pairs, and W + scaling * B A merged first, as `load_lora` of mistral-inference merges.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SIZES, THETA, edit_json, hf_model, params_json, randomize, tokens
from torch import Tensor

from minilora.checkpoint.adapter import adapter_folder, load_adapter, read_adapter, save_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import save_mistral_adapter
from minilora.config import PROJECTIONS, LoraConfig, PrefixConfig
from minilora.errors import UserError
from minilora.lora import add_lora
from minilora.model import Mistral
from minilora.prefix import add_prefix

F32 = torch.float32
LAYERS = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)


def rotated(x: Tensor) -> Tensor:
    """x (B, T, H, Dh), its neighbours as complex numbers turned by position."""
    exponents = torch.arange(0, x.shape[-1], 2) / x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * THETA**-exponents
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).rsqrt()


def logits(base: dict[str, Tensor], lora: dict[str, Tensor], scaling: float, ids: Tensor) -> Tensor:
    w = dict(base)
    for name in {key.rpartition(".lora_")[0] for key in lora}:
        w[f"{name}.weight"] = (
            w[f"{name}.weight"] + scaling * lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        )
    h, (n_heads, n_kv) = w["tok_embeddings.weight"][ids], (SIZES["num_attention_heads"], SIZES["num_key_value_heads"])
    gap = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    hidden = (gap < 0) | (gap >= SIZES["sliding_window"])
    for layer in range(SIZES["num_hidden_layers"]):
        p = f"layers.{layer}."
        x = norm(h, w[p + "attention_norm.weight"])
        q, k, v = (torch.einsum("btd,od->bto", x, w[f"{p}attention.w{c}.weight"]) for c in "qkv")
        q, k, v = q.unflatten(-1, (n_heads, -1)), k.unflatten(-1, (n_kv, -1)), v.unflatten(-1, (n_kv, -1))
        q, k = rotated(q), rotated(k).repeat_interleave(n_heads // n_kv, 2)
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        a = torch.einsum("bhqk,bkhc->bqhc", weights, v.repeat_interleave(n_heads // n_kv, 2)).flatten(-2)
        h = h + torch.einsum("bto,do->btd", a, w[p + "attention.wo.weight"])
        x = norm(h, w[p + "ffn_norm.weight"])
        gate, up = (torch.einsum("btd,fd->btf", x, w[f"{p}feed_forward.w{c}.weight"]) for c in "13")
        h = h + torch.einsum("btf,df->btd", torch.nn.functional.silu(gate) * up, w[p + "feed_forward.w2.weight"])
    return torch.einsum("btd,vd->btv", norm(h, w["norm.weight"]), w["output.weight"])


def base_tensors(originals: Path) -> dict[str, Tensor]:
    return load_file(originals / "mistral" / "consolidated.safetensors")


def finetuned(originals: Path, rank: int = 3, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator, made = torch.Generator().manual_seed(2), dict[str, Tensor]()
    base = base_tensors(originals)
    for layer in range(SIZES["num_hidden_layers"]):
        for name in (f"layers.{layer}.{part}" for part in LAYERS):
            n_out, n_in = base[f"{name}.weight"].shape
            made[f"{name}.lora_A.weight"] = (0.1 * torch.randn(rank, n_in, generator=generator)).to(dtype)
            made[f"{name}.lora_B.weight"] = (0.1 * torch.randn(n_out, rank, generator=generator)).to(dtype)
    return made


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """What a run of mistral-finetune leaves, with a scaling that is not the default."""
    (tmp_path / "ft").mkdir()
    save_file(finetuned(originals), tmp_path / "ft" / "lora.safetensors")
    lora = {"enable": True, "rank": 3, "dropout": 0.1, "scaling": 1.7}
    (tmp_path / "ft" / "params.json").write_text(json.dumps({**params_json(), "lora": lora, "moe": None}))
    return tmp_path / "ft"


def test_the_reference_is_the_base(originals: Path) -> None:
    torch.testing.assert_close(
        logits(base_tensors(originals), {}, 1.0, tokens()), hf_model()(tokens()).logits, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("base", ["hf", "mistral"])
def test_we_load_mistral_finetunes(originals: Path, folder: Path, base: str) -> None:
    lora = {name: tensor.float() for name, tensor in finetuned(originals).items()}
    plain = logits(base_tensors(originals), {}, 1.0, tokens())
    for path, scaling, expected in (
        (folder, None, 1.7), (folder, 0.5, 0.5), (folder / "lora.safetensors", None, 1.7)
    ):  # fmt: skip
        model = load_adapter(load_model(originals / base, dtype=F32), path, scaling=scaling)
        merged = logits(base_tensors(originals), lora, expected, tokens())
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()), merged, atol=1e-5, rtol=0)
        assert (merged - plain).abs().max() > 0.1
        assert model.lora_config is not None
        assert (model.lora_config.rank, model.lora_config.dropout) == (3, 0.1)
        assert model.lora_config.scale_of("") == pytest.approx(expected, rel=1e-12)


def test_the_scale_must_be_said_by_someone(originals: Path, folder: Path) -> None:
    (folder / "params.json").unlink()
    model = load_model(originals / "hf", dtype=F32)
    with pytest.raises(UserError, match=r"lora.safetensors: no params.json .*give it with --adapter_scaling") as error:
        load_adapter(model, folder)
    [named] = re.findall(r"or, as (\{.*\}), in such a file", str(error.value))
    (folder / "params.json").write_text(named)  # where a verb, such as train, has no such option
    found = load_adapter(load_model(originals / "hf", dtype=F32), folder).lora_config
    assert found is not None
    assert found.scale_of("") == 2.0
    shutil.copy(originals / "mistral" / "params.json", folder)  # the base's own says nothing of it
    with pytest.raises(UserError, match=r"no params.json beside it says its scale"):
        load_adapter(model, folder)
    assert load_adapter(model, folder, scaling=2.0).lora_config is not None


def ours(originals: Path, **settings: Any) -> Mistral:
    model = add_lora(load_model(originals / "hf", dtype=F32), LoraConfig(**{"rank": 4, "alpha": 6.0, **settings}))
    randomize(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16().float()  # what the file can hold
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True, "dropout": 0.05}, {"targets": ("q_proj", "down_proj")}, {"rank_pattern": {"q_proj": 4}}],
)
def test_mistral_inference_merges_ours(originals: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = ours(originals, **settings)
    save_adapter(model, tmp_path / "a", provenance={"base_path": "somewhere"})
    adapter = read_adapter(tmp_path / "a", model.config)
    save_mistral_adapter(adapter, model.config, tmp_path / "ft")
    lora = load_file(tmp_path / "ft" / "lora.safetensors")
    assert lora.keys() == finetuned(originals).keys(), "load_lora looks for every layer"
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    params = json.loads((tmp_path / "ft" / "params.json").read_text())
    scaling = 6 / (2 if settings.get("rslora") else 4)
    assert params["lora"] == {"enable": True, "rank": 4, "dropout": settings.get("dropout", 0.0), "scaling": scaling}
    assert {**params_json(), "lora": params["lora"]}.items() <= params.items()
    merged = logits(base_tensors(originals), {k: t.float() for k, t in lora.items()}, scaling, tokens())
    with torch.no_grad():
        torch.testing.assert_close(merged, model(tokens()), atol=1e-5, rtol=0)
    again = read_adapter(tmp_path / "ft", model.config)
    assert again.provenance == adapter.provenance
    for name, tensor in again.tensors.items():
        if name in adapter.tensors:
            assert torch.equal(tensor, adapter.tensors[name]), name
        else:  # it adds nothing, and can learn
            assert bool(tensor.any()) == name.endswith("lora_A"), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True}, "no word for lora.dora"),
        ({"modules_to_save": ("lm_head",)}, "no word for lora.modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, "no word for lora.rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "no word for lora.alpha_pattern"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(
    originals: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    model = ours(originals, **settings)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(UserError, match=message):
        save_mistral_adapter(read_adapter(tmp_path / "a", model.config), model.config, tmp_path / "ft")
    prefix = add_prefix(load_model(originals / "hf", dtype=F32), PrefixConfig(2))
    save_adapter(prefix, tmp_path / "p")
    with pytest.raises(UserError, match="mistral-finetune has no prefixes"):
        save_mistral_adapter(read_adapter(tmp_path / "p", model.config), model.config, tmp_path / "ft")
    assert not (tmp_path / "ft").exists()


FAULTS: list[tuple[str, Tensor | None, str]] = [
    ("layers.0.attention.wq.lora_A.weight", None, "lacks layers.0.attention.wq.lora_A.weight"),
    ("layers.0.attention.wq.lora_A.weight", torch.ones(3, 64), r"has shape \(3, 64\)"),
    ("layers.1.attention.wq.lora_B.weight", torch.ones(256, 4), r"has shape \(256, 4\)"),
    ("layers.1.attention.wk.lora_B.weight", torch.ones(128, 3, dtype=torch.float64), "is stored as F64"),
    ("layers.1.attention.wk.lora_B.weight", torch.full((128, 3), float("nan")), "not finite"),
    ("layers.2.attention.wq.lora_A.weight", torch.ones(3, 128), "holds 'layers.2.attention.wq.lora_A.weight'"),
    ("tok_embeddings.weight", torch.ones(320, 128), "holds 'tok_embeddings.weight'"),
    ("norm.weight", torch.ones(128), "holds 'norm.weight'"),
    ("output.lora_A.weight", torch.ones(3, 128), "holds 'output.lora_A.weight'"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), FAULTS)
def test_tensors_that_are_refused(
    originals: Path, folder: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    held = {**finetuned(originals), name: tensor}
    save_file({key: value for key, value in held.items() if value is not None}, folder / "lora.safetensors")
    with pytest.raises(UserError, match=rf"lora\.safetensors: .*{message}"):
        read_adapter(folder, load_model(originals / "hf").config)


LORAS: list[tuple[Any, str]] = [
    ({"enable": True, "rank": 4, "scaling": 2.0}, "but lora.safetensors has an adapter of rank 3"),
    ({"enable": False, "rank": 3, "scaling": 2.0}, "lora is .*but lora.safetensors has an adapter"),
    (3, "lora is 3"),
    ({"rank": 3, "scaling": "2"}, r"scaling and dropout of lora are \('2', 0.0\)"),
    ({"rank": 3, "scaling": True}, "must be numbers"),
    ({"rank": 3, "scaling": 10**4298}, r"scaling and dropout of lora are \(1000.*must be numbers up to 1e30"),
    ({"rank": 3, "scaling": -1}, "with the scale -1, lora.alpha is -3"),
    ({"rank": 3, "scaling": float("nan")}, "with the scale nan"),
    ({"rank": 3, "scaling": 2, "dropout": 1.5}, "lora.dropout is 1.5"),
]


@pytest.mark.parametrize(("lora", "message"), LORAS)
def test_params_that_are_refused(originals: Path, folder: Path, lora: Any, message: str) -> None:
    edit_json(folder / "params.json", lora=lora)
    with pytest.raises(UserError, match=message):
        read_adapter(folder, load_model(originals / "hf").config)


def test_the_file_of_tensors_stands_for_its_folder(originals: Path, tmp_path: Path) -> None:
    """Of both layouts: what lies beside it, and says whose it is and how it was written, holds for it, too."""
    model = ours(originals)
    save_adapter(model, tmp_path / "peft")
    save_mistral_adapter(read_adapter(tmp_path / "peft", model.config), model.config, tmp_path / "ft")
    hf_model(99).save_pretrained(tmp_path / "other")
    for file in (tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "ft" / "lora.safetensors"):
        assert read_adapter(file, model.config).provenance == read_adapter(file.parent, model.config).provenance != {}
        load_adapter(load_model(originals / "hf", dtype=F32), file)
        with pytest.raises(UserError, match="trained on another base"):
            load_adapter(load_model(tmp_path / "other", dtype=F32), file)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file}: altered since it was written"):
            load_adapter(load_model(originals / "hf", dtype=F32), file)
    shutil.copy(file, tmp_path / "ft" / "adapter_model.safetensors")  # no config of PEFT's: it lies alone
    assert adapter_folder(tmp_path / "ft" / "adapter_model.safetensors").is_file()
    assert adapter_folder(".") == Path(".")
    save_adapter(add_lora(load_model("demo"), LoraConfig(rank=2)), tmp_path / "run" / "adapter")
    assert adapter_folder(tmp_path / "run") == tmp_path / "run" / "adapter"


def test_a_file_without_adapters_is_refused(originals: Path, folder: Path) -> None:
    sizes = load_model(originals / "hf").config
    save_file({"norm.weight": torch.ones(128)}, folder / "lora.safetensors")
    with pytest.raises(UserError, match=r"adapter of rank 0"):
        read_adapter(folder, sizes)
    (folder / "params.json").unlink()
    with pytest.raises(UserError, match=r"lora\.rank is 0"):
        read_adapter(folder, sizes, scaling=2.0)
    save_adapter(ours(originals, targets=PROJECTIONS), folder / "peft")
    with pytest.raises(UserError, match=r"says the scale itself, by lora_alpha; leave out --adapter_scaling"):
        read_adapter(folder / "peft", sizes, scaling=2.0)
