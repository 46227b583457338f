"""Patterns, targets of every kind and modules that learn whole, against PEFT, both ways; then a training step."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import lora_layers, merged_weights
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from tiny_checkpoints import assert_same_logits, hf_model, randomize, tokens
from torch import nn

from minilora.checkpoint.adapter import load_adapter, read_adapter, save_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import PROJECTIONS, LoraConfig, PrefixConfig
from minilora.errors import UserError
from minilora.generation import generate
from minilora.lora import TrainedCopy, adapters_off, add_lora
from minilora.loss import cross_entropy_sum
from minilora.model import Mistral
from minilora.prefix import add_prefix

F32 = torch.float32
REGEX = r"model\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.up_proj)"
pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5.23 for the old name of a flag.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

# Ours, by the names of LoraConfig.
FEATURES: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7}},
    {"alpha_pattern": {"self_attn.v_proj": 3, "model.layers.0.mlp.up_proj": 11.5}},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 8, "q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "rslora": True},
    {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 5}, "dora": True},
    {"targets": ("layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "v_proj")},
    {"targets": REGEX},
    {"targets": r".*q_proj|.*\.1\.mlp\.gate_proj"},
    {"targets": "all-linear"},
    {"targets": "ALL-linear", "dora": True},
    {"modules_to_save": ("lm_head",)},
    {"modules_to_save": ("embed_tokens", "lm_head"), "targets": ("q_proj",)},
    {"modules_to_save": ("model.norm",)},
    {"modules_to_save": ("norm", "embed_tokens"), "targets": REGEX, "rslora": True},
    {"modules_to_save": ("layers.1.input_layernorm", "lm_head"), "dora": True, "rank_pattern": {"o_proj": 3}},
]
THEIRS = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "rslora": "use_rslora", "dora": "use_dora"}


def peft_config(settings: dict[str, Any]) -> PeftLoraConfig:
    given = {"rank": 4, "alpha": 6.0, "targets": PROJECTIONS, **settings}
    named = {THEIRS.get(key, key): list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    return PeftLoraConfig(**named, task_type="CAUSAL_LM")


def adapted(originals: Path, settings: dict[str, Any], **options: Any) -> Mistral:
    model = load_model(originals / "hf", dtype=F32, **options)
    return add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6.0, **settings}))


@pytest.mark.parametrize("settings", FEATURES)
def test_peft_loads_ours(originals: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Warnings of missing or unexpected keys are errors here."""
    model = adapted(originals, settings)
    randomize(model)
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(hf_model(), tmp_path / "a").eval()
    assert_same_logits(model, theirs, load_model(originals / "hf", dtype=F32))
    held = {key: value.shape for key, value in peft.get_peft_model_state_dict(theirs).items()}
    saved = peft.utils.load_peft_weights(str(tmp_path / "a"), device="cpu")
    assert held == {key: value.shape for key, value in saved.items()}


@pytest.mark.parametrize("settings", FEATURES)
def test_we_load_pefts(originals: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = get_peft_model(hf_model(), peft_config(settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(load_model(originals / "hf", dtype=F32), tmp_path)
    assert_same_logits(ours, theirs, load_model(originals / "hf", dtype=F32))
    learn = {p.shape for p in theirs.parameters() if p.requires_grad}
    assert {p.shape for p in ours.parameters() if p.requires_grad} == learn
    n_learn = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == n_learn


@pytest.mark.parametrize("settings", FEATURES)
def test_what_is_written_is_what_is_read(originals: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted(originals, settings)
    randomize(model)
    save_adapter(model, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", model.config)
    assert isinstance(adapter.config, LoraConfig)
    assert model.lora_config is not None
    assert {*adapter.config.targets} == {*model.lora_config.targets}
    again = adapter.attach(load_model(originals / "hf", dtype=F32))
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))
    for (name, ours), (_, theirs) in zip(lora_layers(again), lora_layers(model), strict=True):
        assert (ours.scale, ours.lora_A.shape) == (theirs.scale, theirs.lora_A.shape), name


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("settings", [*FEATURES[-4:], FEATURES[0]])
def test_a_merge_is_the_model(originals: Path, tmp_path: Path, settings: dict[str, Any], quantize: Any) -> None:
    model = adapted(originals, settings, quantize=quantize)
    randomize(model)
    with pytest.raises(UserError, match="has an adapter: merge it first"):
        save_hf(model, tmp_path / "merged")
    save_hf(model, tmp_path / "merged", dtype=F32, weights=merged_weights(model, F32))
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", dtype=F32)(tokens())
        torch.testing.assert_close(merged, model(tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [*FEATURES[-2:], {"targets": REGEX, "rank_pattern": {"q_proj": 2}}])
def test_an_adapter_goes_onto_a_part_of_the_model(originals: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """One block under its own name, as a merge by blocks holds it."""
    model = adapted(originals, settings)
    randomize(model)
    save_adapter(model, tmp_path / "a")
    part = nn.Module()
    part.layers = nn.ModuleDict({"1": load_model(originals / "hf", dtype=F32).layers[1]})
    read_adapter(tmp_path / "a", model.config).attach(part)
    inside = {name: p for name, p in model.named_parameters() if name.startswith("layers.1.")}
    assert {name for name, _ in part.named_parameters()} == inside.keys()
    assert any(p.requires_grad for p in part.parameters())
    for name, p in part.named_parameters():
        assert torch.equal(p, inside[name]), name
        assert p.requires_grad == inside[name].requires_grad, name


def test_a_prefix_belongs_to_a_whole_model(originals: Path, tmp_path: Path) -> None:
    save_adapter(add_prefix(load_model(originals / "hf", dtype=F32), PrefixConfig(3)), tmp_path / "a")
    base = load_model(originals / "hf", dtype=F32)
    adapter = read_adapter(tmp_path / "a", base.config)
    assert adapter.tensors["prompt_embeddings"].shape == (3, 512)
    part = nn.Module()
    part.layers = base.layers
    assert not any(p.requires_grad for p in adapter.attach(part).parameters())


# --- Modules that learn whole -----------------------------------------------------------------------------------------


def steps(model: nn.Module, loss: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def copy_of(theirs: nn.Module, folder: Path, originals: Path) -> Mistral:
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return load_adapter(load_model(originals / "hf", dtype=F32), folder).train()


@pytest.mark.parametrize("settings", [*FEATURES[-5:], FEATURES[2]])
def test_training_is_pefts(originals: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Three steps of AdamW through the tiled loss: losses and gradients are PEFT's."""
    theirs = get_peft_model(hf_model(), peft_config(settings)).train()
    ours = copy_of(theirs, tmp_path / "start", originals)
    x = tokens()

    def tiled(model: Any) -> Any:
        return cross_entropy_sum(model.hidden(x), model.lm_head.weight, torch.roll(x, -1, 1))

    def whole(model: Any) -> Any:
        logits = model(x).logits.flatten(0, 1)
        return nn.functional.cross_entropy(logits, torch.roll(x, -1, 1).flatten(), reduction="sum")

    mine, peers = steps(ours, tiled), steps(theirs, whole)
    assert mine == pytest.approx(peers, rel=1e-5)
    assert mine[-1] < mine[0] - 1
    theirs.save_pretrained(tmp_path / "end")
    end = read_adapter(tmp_path / "end", ours.config).tensors
    save_adapter(ours, tmp_path / "ours")
    for name, tensor in read_adapter(tmp_path / "ours", ours.config).tensors.items():
        torch.testing.assert_close(tensor, end[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_with_its_adapters_off_the_model_is_its_base_and_its_copies_are_float32(originals: Path, dtype: Any) -> None:
    base = load_model(originals / "hf", dtype=dtype)
    model = add_lora(
        load_model(originals / "hf", dtype=dtype), LoraConfig(modules_to_save=("norm", "lm_head", "embed_tokens"))
    )
    x, copies = tokens(), [m for m in model.modules() if isinstance(m, TrainedCopy)]
    assert len(copies) == 7
    assert {copy.trained.dtype for copy in copies} == {F32}
    assert model.dtype == base.dtype == dtype
    with torch.no_grad():
        assert model(x).dtype == dtype
        assert torch.equal(model(x), base(x))
        randomize(model)
        assert not torch.equal(model(x), base(x))
        with adapters_off(model):
            assert torch.equal(model(x), base(x))
            assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert generate(model, x, 3).shape == (2, 23)
    cross_entropy_sum(model.hidden(x), model.lm_head.weight, x).backward()
    assert all(copy.trained.grad is not None and copy.trained.grad.dtype == F32 for copy in copies)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_tied_head_does_not_learn_alone(tmp_path: Path, module: str) -> None:
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype=F32)
    with pytest.raises(UserError, match=f"modules_to_save names '{module}', but here one weight is both"):
        add_lora(model, LoraConfig(modules_to_save=(module,)))
    assert not list(lora_layers(model))
    add_lora(model, LoraConfig(modules_to_save=("norm",)))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"targets": r".*\.mlp.*"}, r"lora.targets is .* matches layers.0.mlp, too"),
    ({"targets": r".*\.mlp\..*"}, r"lora.targets is .* matches layers.0.mlp.act_fn, too"),
    ({"targets": r".*(lm_head|q_proj)"}, "matches lm_head, too"),
    ({"targets": "nothing"}, "lora.targets names 'nothing', which no layer is called as a regular expression"),
    ({"rank_pattern": {"gate": 4}}, "lora.rank_pattern names 'gate'"),
    ({"targets": ("q_proj",), "alpha_pattern": {"k_proj": 4}}, "lora.alpha_pattern names 'k_proj'"),
    ({"modules_to_save": ("self_attn",)}, "lora.modules_to_save names 'self_attn'"),
    ({"modules_to_save": ("q_proj",)}, "lora.modules_to_save names 'q_proj'"),
    ({"modules_to_save": ("layers.0",)}, "lora.modules_to_save names 'layers.0'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_means_nothing_or_too_much_is_refused(originals: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(originals, settings)
