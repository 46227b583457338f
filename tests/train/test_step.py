"""One optimizer step: the token-exact loss, the guard, the loss scale, and PEFT's own step beside ours."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import as_trained, lora_layers, merged_weights
from tiny_runs import TINY, step_of, tiny_model
from torch import Tensor, nn

from minilora import backend
from minilora.adamw import FlatAdamW
from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import LoraConfig, RunConfig, TrainConfig
from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, make_batch
from minilora.fast_block import fuse
from minilora.lora import add_lora
from minilora.loss import IGNORE
from minilora.model import Mistral
from minilora.train import step as step_module
from minilora.train.setup import optimizer_for
from minilora.train.step import FIRST_SCALE, LEAST_SCALE, LossScale, StepResult, backward_of
from minilora.train.strategies import apply_strategy, trainable

LENGTHS = (5, 17, 3, 30, 9, 24, 2, 12)


def samples(seed: int = 0) -> list[Sample]:
    """Random tokens; the number of targets differs from sample to sample and is no fixed share."""
    draw = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(LENGTHS):
        mask = draw.random(n + 1) < 0.2 + 0.1 * i
        mask[0], mask[-1] = False, True
        made.append(Sample(draw.integers(14, TINY.vocab_size, n + 1, dtype=np.int32), mask, f"f:{i}"))
    return made


def with_lora(seed: int = 1, **settings: Any) -> Mistral:
    """The tiny model with adapters whose B is not zero, so that every gradient is not zero."""
    torch.manual_seed(seed)
    return as_trained(add_lora(tiny_model(), LoraConfig(rank=4, alpha=8, **settings)).train())


def adamw(model: nn.Module) -> FlatAdamW:
    return FlatAdamW({(0.0, 1.0): list(trainable(model).values())})


def rows(width: int) -> list[PackedBatch]:
    """The samples, a row each, `width` rows a batch."""
    order = list(range(len(LENGTHS)))
    return [make_batch(samples(), [[i] for i in order[s : s + width]], 32) for s in range(0, len(order), width)]


def gradients(model: Mistral, batches: Sequence[PackedBatch], **changes: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step that does not clip; the gradients are still the loss scale's."""
    result = step_of(model, adamw(model), batches, **changes)
    assert result.updated
    return result.loss, {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


def naive_loss(model: Mistral, all_samples: Sequence[Sample]) -> Tensor:
    """Mean of plain cross entropy over all target tokens of the samples, each alone."""
    logits, labels = [], []
    for s in all_samples:
        tokens = torch.tensor(s.tokens, dtype=torch.int64)
        mask = torch.tensor(s.target_mask[1:])
        logits.append(model(tokens[None, :-1])[0][mask])
        labels.append(tokens[1:][mask])
    return nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_micro_batches_are_one_batch(width: int) -> None:
    counts = {batch.n_targets for batch in rows(1)}
    assert len(counts) > 4, "unequal numbers of targets, else a mean of means would pass"
    loss, whole = gradients(with_lora(), rows(8))
    loss_of_parts, parts = gradients(with_lora(), rows(width))
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == parts.keys() == trainable(with_lora()).keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_packed_rows_are_their_samples_alone() -> None:
    packed = make_batch(samples(), [[3, 2], [5, 0, 6], [1, 7, 4]], 40)
    loss, together = gradients(with_lora(), [packed])
    loss_alone, alone = gradients(with_lora(), rows(1))
    assert loss == pytest.approx(loss_alone, rel=1e-6)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_loss_and_its_gradients_are_plain_cross_entropy() -> None:
    model = with_lora()
    naive = naive_loss(model, samples())
    naive.backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    loss, got = gradients(model, rows(3))
    assert loss == pytest.approx(float(naive.detach()), rel=1e-6)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, checkpointed = with_lora(dropout=0.2), with_lora(dropout=0.2)
    checkpointed.activation_checkpointing = True
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        results.append(gradients(model, rows(4)))
    assert results[0][0] == results[1][0]
    assert all(results[0][1][name].equal(results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize(("longest", "factor"), [(1 / 3, 1 / 3), (2.0, 1.0), (0.0, 1.0)])
def test_clipping_scales_the_whole_gradient_where_it_is_longer(longest: float, factor: float) -> None:
    model = with_lora()
    _, free = gradients(with_lora(), rows(8))
    norm = math.sqrt(sum(float((g**2).sum()) for g in free.values()))
    optimizer = adamw(model)
    result = step_of(model, optimizer, rows(8), 1e-3, norm * longest)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, p in trainable(model).items():  # Adam's first moment is a tenth of its first gradient
        torch.testing.assert_close(10 * optimizer.state[p]["exp_avg"], free[name] * factor, atol=1e-7, rtol=1e-4)


def test_the_learning_rate_is_the_step_s() -> None:
    model = with_lora()
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    step_of(model, adamw(model), rows(8), 1e-3, 1.0)
    for name, p in trainable(model).items():  # Adam's first update is lr, in the gradient's direction
        assert float((p.detach() - before[name]).abs().max()) == pytest.approx(1e-3, rel=1e-2), name


def test_after_forward_is_called_once_a_micro_batch() -> None:
    calls: list[None] = []
    model = with_lora()
    optimizer = adamw(model)
    backward = backward_of(model, optimizer, lambda: calls.append(None))
    step_of(model, optimizer, rows(2), 1e-3, 1.0, backward=backward)
    assert len(calls) == 4


def snapshot(model: nn.Module, optimizer: FlatAdamW) -> tuple[int, dict[str, Tensor]]:
    """Steps; copies of the weights and their moments."""
    found = {name: {"weight": p.detach(), **optimizer.state[p]} for name, p in trainable(model).items()}
    return optimizer.steps, {f"{name}.{key}": t.clone() for name, each in found.items() for key, t in each.items()}


def assert_unchanged(model: nn.Module, optimizer: FlatAdamW, old: tuple[int, dict[str, Tensor]]) -> None:
    steps, tensors = snapshot(model, optimizer)
    assert steps == old[0]
    assert tensors.keys() == old[1].keys()
    assert all(tensor.equal(old[1][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = with_lora()
    optimizer = adamw(model)
    step_of(model, optimizer, rows(8), 1e-3, 1.0)
    old = snapshot(model, optimizer)
    spoilt = model.lm_head.weight[20, 0].item()
    with torch.no_grad():
        model.lm_head.weight[20, 0] = bad
    result = step_of(model, optimizer, rows(2), 1e-3, 1.0)
    assert not result.updated
    assert not math.isfinite(result.loss)
    assert_unchanged(model, optimizer, old)
    with torch.no_grad():
        model.lm_head.weight[20, 0] = spoilt
    assert step_of(model, optimizer, rows(8), 1e-3, 1.0).updated
    assert all(p.isfinite().all() for p in trainable(model).values())


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is() -> None:
    model = with_lora()
    optimizer = adamw(model)
    step_of(model, optimizer, rows(8), 1e-3, 1.0)
    old = snapshot(model, optimizer)
    next(iter(trainable(model).values())).register_hook(lambda grad: grad * math.inf)
    result = step_of(model, optimizer, rows(8), 1e-3, 1.0)
    assert math.isfinite(result.loss)
    assert not result.updated
    assert_unchanged(model, optimizer, old)


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_sum = step_module.loss_sum
    monkeypatch.setattr(step_module, "loss_sum", lambda *args: loss_sum(*args) + math.inf)
    model = with_lora()
    optimizer = adamw(model)
    old = snapshot(model, optimizer)
    result = step_of(model, optimizer, rows(8), 1e-3, 1.0)
    assert math.isfinite(result.grad_norm)
    assert not result.updated
    assert_unchanged(model, optimizer, old)


@pytest.mark.parametrize(("fast", "native"), [(False, True), (True, False), (True, True)])
def test_only_products_in_16_bits_have_copies_to_read(
    fast: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain block reads none, and a CPU that multiplies in float32 is not to read what was rounded."""
    monkeypatch.setattr(backend, "_cpu_product_dtype", lambda dtype: dtype if native else torch.float32)
    model, seen = half_with_lora(), list[bool]()
    if fast:
        assert fuse(model)
    optimizer, weights = adamw(model), list(trainable(model).values())

    def look() -> None:
        seen.append(all(hasattr(p, "kept_cast") for p in weights))

    backward_of(model, optimizer, look)(rows(8)[0], 1.0)
    assert seen == [fast and native]
    assert not any(hasattr(p, "kept_cast") for p in weights)


def test_no_target_is_refused() -> None:
    model, [batch] = with_lora(), rows(8)
    batch.labels.fill_(IGNORE)
    with pytest.raises(ValueError, match="no token to train on"):
        step_of(model, adamw(model), [batch], 1e-3, 0.0)


# --- Loss scale -----------------------------------------------------------------------------------------------------


def test_off_it_is_one_and_stays() -> None:
    scale = LossScale.of(torch.float32)
    scale.update(overflowed=True)
    assert (scale.scale, scale.shrinking) == (1.0, False)


def test_an_overflow_halves_it_and_patience_doubles_it() -> None:
    scale = LossScale(True, FIRST_SCALE, patience=3)
    assert scale.scale == 2.0**16
    scale.update(overflowed=True)
    assert (scale.scale, scale.good_steps) == (2.0**15, 0)
    for _ in range(2):
        scale.update(overflowed=False)
    scale.update(overflowed=True)  # begins to count anew
    assert scale.scale == 2.0**14
    for _ in range(3):
        scale.update(overflowed=False)
    assert (scale.scale, scale.good_steps) == (2.0**15, 0)


def test_it_does_not_shrink_for_ever() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.scale == FIRST_SCALE
    for _ in range(100):
        scale.update(overflowed=True)
    assert scale.scale == LEAST_SCALE
    assert not scale.shrinking


def test_it_cancels_out() -> None:
    """A power of two changes no bit of a float32 gradient."""
    _, plain = gradients(with_lora(), rows(4))
    _, scaled = gradients(with_lora(), rows(4), loss_scale=LossScale.of(torch.float16))
    assert all((scaled[name] / 2**16).equal(gradient) for name, gradient in plain.items())
    (one, same), (two, also) = with_both_scales()
    assert same == also
    assert all(p.equal(trainable(two)[name]) for name, p in trainable(one).items())


def with_both_scales() -> list[tuple[Mistral, StepResult]]:
    """The model after a step that clips, and what the step tells, without a loss scale and with one."""
    done = []
    for scale in (LossScale.of(torch.float32), LossScale.of(torch.float16)):
        model = with_lora()
        done.append((model, step_of(model, adamw(model), rows(4), 1e-3, 0.1, scale)))
    return done


def half_with_lora() -> Mistral:
    """float16 weights, float32 adapters."""
    model = with_lora().half()
    for _, layer in lora_layers(model):
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    return model


def test_an_overflow_skips_the_step() -> None:
    model, scale = half_with_lora(), LossScale(True, scale=2.0**30)
    optimizer = adamw(model)
    old = snapshot(model, optimizer)
    result = step_of(model, optimizer, rows(8), 1e-3, 1.0, scale)
    assert not result.updated
    assert math.isfinite(result.loss)
    assert scale.scale == 2.0**29
    assert_unchanged(model, optimizer, old)


def test_float16_follows_float32() -> None:
    """fp16 weights and activations, fp32 adapters, scaled loss: gradients close to those in float32."""
    half = half_with_lora()
    loss, exact = gradients(with_lora(), rows(4))
    half_loss, near = gradients(half, rows(4), loss_scale=LossScale(True, scale=2.0**12))
    near = {name: gradient / 2**12 for name, gradient in near.items()}
    assert half_loss == pytest.approx(loss, rel=2e-3)
    for name, gradient in exact.items():
        assert near[name].dtype == torch.float32
        cosine = nn.functional.cosine_similarity(near[name].flatten(), gradient.flatten(), dim=0)
        assert float(cosine) > 0.99, name
        assert (near[name] - gradient).norm() <= 0.05 * gradient.norm(), name


# --- PEFT's step ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("quantize", "strategy", "options"),
    [
        (None, "lora", {}),
        ("nf4", "lora", {"rslora": True}),
        (None, "lora", {"dora": True}),
        ("nf4", "lora", {"dora": True}),
        (None, "lora", {"lora_plus_ratio": 16.0}),
        ("nf4", "lora", {"dora": True, "lora_plus_ratio": 4.0}),
        (None, "prefix", {}),
        ("nf4", "prefix", {}),
    ],
)
def test_one_optimizer_step_is_peft_s(
    tmp_path: Path, tiny_base: Path, quantize: Any, strategy: Any, options: dict[str, Any]
) -> None:
    """On a dense base, and on NF4, for which PEFT gets the dequantized weights: loss, gradients, and the weights after
    clipping and AdamW, with LoRA+ in PEFT's own groups."""
    ratio = options.get("lora_plus_ratio", 1.0)
    options = {key: value for key, value in options.items() if key != "lora_plus_ratio"}
    import peft.optimizers
    import transformers

    ours = load_model(tiny_base, quantize=quantize, dtype=torch.float32)
    save_hf(ours, tmp_path / "dense", dtype=torch.float32, weights=merged_weights(ours, torch.float32))
    torch.manual_seed(3)
    lora = LoraConfig(rank=4, alpha=8, **options)
    decay = 0.0 if ratio > 1 else 0.01
    training = TrainConfig(strategy=strategy, prefix_tokens=5, lora_plus_ratio=ratio, weight_decay=decay)
    run = RunConfig(lora=lora, train=training)
    as_trained(apply_strategy(ours, run).train())
    save_adapter(ours, tmp_path / "adapter")
    base = transformers.MistralForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    theirs: Any
    if strategy == "prefix":  # which PEFT does not load to be trained
        assert ours.prefix is not None
        settings = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(base, settings).train()
        theirs.prompt_encoder["default"].embedding.weight.data = ours.prefix.prompt_embeddings.detach().clone()
    else:
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    names = {
        name.replace("base_model.model.model.", "")
        .replace(".default.weight", "")
        .replace("prompt_encoder.default.embedding.weight", "prefix.prompt_embeddings"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert names.keys() == trainable(ours).keys()

    sample, longest = samples()[3], 0.05 if strategy == "prefix" else 0.5
    tokens = torch.tensor(sample.tokens, dtype=torch.int64)[None]
    labels = tokens.masked_fill(~torch.tensor(sample.target_mask)[None], -100)
    output = theirs(input_ids=tokens, labels=labels)
    output.loss.backward()
    norm = nn.utils.clip_grad_norm_(names.values(), longest)
    if ratio > 1:
        peft.optimizers.create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, betas=(0.9, 0.999), weight_decay=0.0
        ).step()
    else:
        vectors = [p for p in names.values() if p.dim() == 1]
        matrices = [p for p in names.values() if p.dim() == 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3).step()

    optimizer = optimizer_for(trainable(ours), run)
    result = step_of(ours, optimizer, [make_batch([sample], [[0]], 40)], 1e-3, longest)
    assert result.loss == pytest.approx(float(output.loss.detach()), rel=1e-6)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert result.grad_norm > longest, "the gradient is clipped"
    for name, p in trainable(ours).items():
        clipped = optimizer.state[p]["exp_avg"] / (1 - training.beta1)
        torch.testing.assert_close(clipped, names[name].grad, atol=1e-6, rtol=1e-5, msg=name)
        # Adam's first step is g / (|g| + 1e-8): of a gradient of nothing but rounding errors it makes any number.
        sure = names[name].grad.abs() > 1e-6
        assert sure.float().mean() > 0.9, name
        torch.testing.assert_close(p[sure], names[name][sure], atol=1e-6, rtol=0, msg=name)
