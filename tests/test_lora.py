"""LoRA against PEFT with the same A and B, on a dense base and on NF4; its start, dropout, scale and refusals."""

from typing import Any

import peft
import pytest
import torch
from adapters import lora_layers
from torch import Tensor, nn

from minilora.config import PROJECTIONS, LoraConfig, ModelConfig
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.lora import LoRALinear, adapters_off, add_lora
from minilora.model import Mistral
from minilora.nf4 import quantize_nf4

OUT, IN, RANK = 40, 64, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """Two linear layers in a row, so that a gradient passes through the frozen weight of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {"q_proj": nn.Linear(IN, OUT, bias=False), "down_proj": nn.Linear(OUT, IN, bias=False)}
        )
        for seed, layer in enumerate(self.block.values()):
            layer.weight = nn.Parameter(random(*layer.weight.shape, seed=seed) / 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["down_proj"](self.block["q_proj"](x).tanh())
        return y


def quantized(chain: Chain) -> tuple[Chain, Chain]:
    """The chain in NF4, and in plain numbers of the same value."""
    nf4_chain, dense_chain = Chain(), Chain()
    for name in chain.block:
        weight = quantize_nf4(chain.block[name].weight)
        nf4_chain.block[name] = NF4Linear(weight)
        dense_chain.block[name].weight = nn.Parameter(weight.dequantize())
    return nf4_chain, dense_chain


def fill(model: nn.Module) -> None:
    """Random A and B, the same for every library: the n-th adapter matrix is drawn from the n-th seed."""
    matrices = [p for name, p in model.named_parameters() if "lora_" in name]
    for seed, matrix in enumerate(matrices):
        matrix.data = 0.3 * random(*matrix.shape, seed=100 + seed)


def peft_chain(chain: Chain, config: LoraConfig) -> nn.Module:
    theirs = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=list(config.targets),
    )  # fmt: skip
    return peft.inject_adapter_in_model(theirs, chain)


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dL/dx and the adapters' gradients, in order, of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * random(*y.shape, seed=7)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert x.grad is not None
    assert all(g is not None for g in gradients)
    return [y.detach(), x.grad, *(g for g in gradients if g is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """float32 sums of at most 64 products in one order or another: 1e-6 of the tensor's size."""
    assert len(ours) == len(theirs) >= 6
    for mine, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-6, atol=1e-6 * float(peer.abs().max()))


CONFIGS = {
    "plain": LoraConfig(rank=RANK, alpha=10, targets=("q_proj", "down_proj")),
    "rslora": LoraConfig(rank=RANK, alpha=10, targets=("q_proj", "down_proj"), rslora=True),
    "dora": LoraConfig(rank=RANK, alpha=10, targets=("q_proj", "down_proj"), dora=True),
    "dropout": LoraConfig(rank=RANK, alpha=10, targets=("q_proj", "down_proj"), dropout=0.25),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_peft_on_a_dense_base(name: str) -> None:
    ours, theirs = add_lora(Chain(), CONFIGS[name]), peft_chain(Chain(), CONFIGS[name])
    fill(ours)
    fill(theirs)
    outcomes = []
    for model in (ours, theirs):
        torch.manual_seed(3)  # dropout's
        outcomes.append(outcome(model.train(), random(2, 5, IN)))
    assert_same(*outcomes)


@pytest.mark.parametrize("name", CONFIGS)
def test_on_nf4_equals_peft_on_the_dequantized_weight(name: str) -> None:
    nf4_chain, dense_chain = quantized(Chain())
    ours, theirs = add_lora(nf4_chain, CONFIGS[name]), peft_chain(dense_chain, CONFIGS[name])
    fill(ours)
    fill(theirs)
    outcomes = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outcomes.append(outcome(model.train(), random(2, 5, IN)))
    assert_same(*outcomes)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("on_nf4", [False, True])
def test_the_start_is_the_base(on_nf4: bool, dora: bool) -> None:
    base = quantized(Chain())[0] if on_nf4 else Chain()
    x = random(3, IN)
    before = base(x)
    model = add_lora(base, LoraConfig(rank=RANK, targets=("q_proj", "down_proj"), dora=dora))
    assert torch.equal(model(x), before)
    for _, layer in lora_layers(model):
        bound = layer.base.in_features**-0.5
        assert (layer.lora_B == 0).all()
        assert layer.lora_A.abs().max() <= bound
        # uniform: the standard deviation is bound / sqrt(3), that of 160 numbers within 4 * sqrt(0.2 / 160) of it
        assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_a_is_drawn_as_peft_draws_it() -> None:
    """The same generator, the same distribution: equal numbers."""
    base, config = nn.Linear(IN, OUT, bias=False), LoraConfig(rank=RANK)
    torch.manual_seed(5)
    ours = LoRALinear(base, config).lora_A
    torch.manual_seed(5)
    theirs = nn.init.kaiming_uniform_(torch.empty(RANK, IN), a=5**0.5)
    torch.testing.assert_close(ours.detach(), theirs)


def identity_adapter(dropout: float) -> LoRALinear:
    """y = dropout(x): no base, A = B = 1, scale 1."""
    base = nn.Linear(IN, IN, bias=False)
    nn.init.zeros_(base.weight)
    layer = LoRALinear(base, LoraConfig(rank=IN, alpha=IN, dropout=dropout))
    layer.lora_A.data, layer.lora_B.data = torch.eye(IN), torch.eye(IN)
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_p_and_scales_up_the_rest(p: float) -> None:
    torch.manual_seed(0)
    n = 2000 * IN
    y = identity_adapter(p).train()(torch.ones(2000, IN)).detach()
    dropped = float((y == 0).float().mean())
    assert abs(dropped - p) < 4 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full((int((y != 0).sum()),), 1 / (1 - p)))


def test_dropout_rests_in_evaluation_and_spares_the_base() -> None:
    x = random(5, IN)
    assert torch.equal(identity_adapter(0.5).eval()(x), x)
    layer = LoRALinear(nn.Linear(IN, OUT, bias=False), LoraConfig(rank=RANK, dropout=0.5)).train()
    assert torch.equal(layer(x), layer.base(x))  # B = 0: what is left is the base, whole


def test_scale() -> None:
    assert LoraConfig(rank=16, alpha=32).scale_of("") == 2
    assert LoraConfig(rank=16, alpha=32, rslora=True).scale_of("") == 8
    assert LoraConfig(rank=3, alpha=1).scale_of("") == pytest.approx(1 / 3)


@pytest.mark.parametrize("rslora", [False, True])
def test_delta_is_what_the_adapter_adds(rslora: bool) -> None:
    layer = LoRALinear(nn.Linear(IN, OUT, bias=False), LoraConfig(rank=RANK, alpha=10, rslora=rslora))
    fill(layer)
    x = random(6, IN)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta().T, rtol=1e-5, atol=1e-5)
    assert not layer.delta().requires_grad


@pytest.mark.parametrize("on_nf4", [False, True])
def test_dora_starts_at_the_lengths_of_the_rows_and_keeps_no_decoded_weight(on_nf4: bool) -> None:
    chain, dense = quantized(Chain()) if on_nf4 else (Chain(), Chain())
    add_lora(chain, CONFIGS["dora"])
    for (name, layer), plain in zip(lora_layers(chain), dense.block.values(), strict=True):
        m = layer.lora_magnitude_vector
        assert m is not None
        torch.testing.assert_close(m.detach(), plain.weight.norm(dim=1), rtol=1e-6, atol=0)
        layer.lora_B.data = random(*layer.lora_B.shape) / 8
        whole = (plain.weight + layer.delta()).norm(dim=1)
        torch.testing.assert_close(layer.row_lengths(torch.float32), whole, rtol=1e-6, atol=0, msg=name)
        kept: list[Tensor] = []

        def keep(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(random(2, layer.base.in_features).requires_grad_())
        whole_sized = {plain.weight.shape, plain.weight.T.shape}
        assert not on_nf4 or not [t for t in kept if t.shape in whole_sized and t.dtype == torch.float32]


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    base = nn.Linear(IN, OUT, bias=False)
    base.weight.data[3] = 0
    layer = LoRALinear(base, CONFIGS["dora"])
    y = layer(random(2, IN))
    assert (y[:, 3] == 0).all()
    y.sum().backward()
    assert layer.lora_magnitude_vector is not None
    assert layer.lora_magnitude_vector.grad is not None
    assert layer.lora_magnitude_vector.grad.isfinite().all()
    assert layer.merged(base.weight).isfinite().all()


@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_activations_meet_float32_adapters(dora: bool) -> None:
    """A and B stay float32 and get float32 gradients; the layer's output has its input's dtype."""
    layer = LoRALinear(quantized(Chain())[0].block["q_proj"], LoraConfig(rank=RANK, dora=dora))
    fill(layer)
    y = layer(random(6, IN).bfloat16())
    y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16
    for matrix in (layer.lora_A, layer.lora_B):
        assert matrix.dtype == torch.float32
        assert matrix.grad is not None
        assert matrix.grad.dtype == torch.float32


# Injection into a Mistral


def mistral(tied: bool = False) -> Mistral:
    config = ModelConfig(
        dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=1, vocab_size=50, tied_embeddings=tied
    )
    model = Mistral(config)
    model.init_weights(0)
    return model


def test_targets_are_found_by_name_in_every_block() -> None:
    model = mistral()
    assert add_lora(model, LoraConfig(rank=2, targets=("q_proj", "down_proj"))) is model
    assert [name for name, _ in lora_layers(model)] == [
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.down_proj",
    ]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{m}" for name, _ in lora_layers(model) for m in "AB"}


@pytest.mark.parametrize("tied", [False, True])
def test_by_default_all_seven_projections_and_not_the_head(tied: bool) -> None:
    model = add_lora(mistral(tied), LoraConfig(rank=2))
    assert {name.rsplit(".", 1)[-1] for name, _ in lora_layers(model)} == set(PROJECTIONS)
    assert len(list(lora_layers(model))) == 14
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "targets",
    [("q_proj", "wq"), ("lm_head",), ("proj",), ("mlp.q_proj",), ("layers.2.mlp.up_proj",), ("embed_tokens",)],
)
def test_an_unknown_target_is_refused_and_changes_nothing(targets: tuple[str, ...]) -> None:
    model = mistral()
    with pytest.raises(UserError, match=f"lora.targets names '{targets[-1]}'.*q_proj"):
        add_lora(model, LoraConfig(rank=2, targets=targets))
    assert list(lora_layers(model)) == []
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_put_on_adapters() -> None:
    model = add_lora(mistral(), LoraConfig(rank=2, targets=("q_proj",)))
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(model, LoraConfig(rank=2, targets=("v_proj",)))
    assert len(list(lora_layers(model))) == 2


def test_with_its_adapters_off_a_model_is_its_base() -> None:
    model, tokens = mistral(), torch.arange(12).view(2, 6)
    base = model(tokens)
    add_lora(model, LoraConfig(rank=2))
    fill(model)
    tuned = model(tokens)
    with adapters_off(model):
        with adapters_off(model):
            assert torch.equal(model(tokens), base)
        assert torch.equal(model(tokens), base)  # still off
    assert torch.equal(model(tokens), tuned)
    with pytest.raises(IndexError), adapters_off(model):  # whatever happens inside, they are on again after it
        model(tokens + 1000)
    assert not torch.equal(tuned, base)
    assert torch.equal(model(tokens), tuned)


@pytest.mark.parametrize("training", [False, True])
def test_new_adapters_train_if_the_model_does(training: bool) -> None:
    model = add_lora(mistral().train(training), LoraConfig(rank=2, dropout=0.5))
    assert {m.training for m in model.modules()} == {training}


def test_a_model_moves_with_its_adapters() -> None:
    model = add_lora(mistral().to("meta"), LoraConfig(rank=2))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_training_step_moves_the_adapters_only() -> None:
    model: Any = add_lora(mistral(), LoraConfig(rank=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    tokens = torch.arange(12).view(2, 6)
    for _ in range(2):  # A moves once B is no longer zero
        optimizer.zero_grad()
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
