"""The fast block against the plain one, its definition: loss, gradients, what is kept for backward."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from minilora import backend, fused, linear, projections
from minilora.config import LoraConfig, ModelConfig
from minilora.data.pack import PackedBatch
from minilora.fast_block import FusedBlock, fuse
from minilora.fused import Keep
from minilora.linear import NF4Linear
from minilora.lora import add_lora
from minilora.loss import IGNORE, cross_entropy_sum
from minilora.model import Mistral
from minilora.nf4 import NF4Tensor, quantize_nf4
from minilora.projections import Projections
from minilora.train.step import loss_sum
from minilora.visible import Runs

B, T, RANK = 2, 80, 4
SIZES: dict[str, Any] = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 160, "vocab_size": 96}
SHAPES = [
    ModelConfig(**SIZES, n_heads=4, n_kv_heads=4),
    ModelConfig(**SIZES, n_heads=4, n_kv_heads=1, sliding_window=7),
    ModelConfig(**SIZES, n_heads=4, n_kv_heads=1, sliding_window=(7, None)),
    ModelConfig(**SIZES, n_heads=8, n_kv_heads=2, tied_embeddings=True),  # Hq * Dh is not dim
]


def adapted(
    config: ModelConfig, lora: LoraConfig | None = None, nf4: bool = True, double_quant: bool = True
) -> Mistral:
    """A random model in train mode whose adapters are past their zeros."""
    model = Mistral(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("layers."):
            nn.init.normal_(layer.weight, std=0.1, generator=generator)
            if nf4:
                model.set_submodule(name, NF4Linear(quantize_nf4(layer.weight, double_quant=double_quant)))
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    add_lora(model, lora or LoraConfig(rank=RANK, alpha=12))
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1, generator=generator)
    return model.train()


def batch(config: ModelConfig, packed: bool) -> PackedBatch:
    """A third of the labels are no targets."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, config.vocab_size, (B, T), generator=generator)
    labels = torch.randint(0, config.vocab_size, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.3] = IGNORE
    if not packed:
        zeros = torch.zeros(B, T, dtype=torch.int32)
        return PackedBatch(tokens, labels, torch.arange(T).expand(B, T), zeros, Runs.of_rows(B, T))
    lengths = torch.tensor([65, 15]), torch.tensor([80])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(n)), n) for n in lengths])
    positions = torch.stack([torch.cat([torch.arange(int(m)) for m in n]) for n in lengths])
    stops = torch.tensor([0, 65, 80, 160], dtype=torch.int32)
    return PackedBatch(tokens, labels, positions, segments, Runs(stops, 80))


def gradients(model: Mistral, packed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_sum(model, batch(model.config, packed))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative difference of any tensor's gradient, in its norm."""
    assert a
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


@pytest.fixture(params=["added", "joined"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters added onto y, as on a CPU, and as further columns of a decoded weight, as on a GPU."""
    if request.param == "joined":
        monkeypatch.setattr(projections, "_joins", lambda weight, adapter: adapter and isinstance(weight, NF4Tensor))


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize(("packed", "checkpointing"), list(product([False, True], repeat=2)))
def test_loss_and_every_gradient_equal_the_plain_blocks(config: ModelConfig, packed: bool, checkpointing: bool) -> None:
    """In float32 only the order of sums differs: some hundred roundings of 6e-8 each, in a random walk."""
    plain = adapted(config)
    fast = copy.deepcopy(plain)
    fast.activation_checkpointing = checkpointing
    assert fuse(fast)
    assert all(isinstance(block, FusedBlock) for block in fast.layers)
    loss, grads = gradients(fast, packed)
    expected_loss, expected = gradients(plain, packed)
    assert loss.allclose(expected_loss, rtol=1e-6)
    assert len(grads) == 2 * 7 * config.n_layers
    assert distance(grads, expected) < 1e-5


def test_gradients_are_added_to_those_that_are_there_already() -> None:
    """All of them, or some: where only the first block's A have one."""
    plain = adapted(SHAPES[1])
    fast = copy.deepcopy(plain)
    assert fuse(fast)
    for model in (plain, fast):
        for name, p in model.named_parameters():
            if name.startswith("layers.0.") and name.endswith("lora_A"):
                p.grad = torch.ones_like(p)
    for _ in range(2):
        assert distance(gradients(fast)[1], gradients(plain)[1]) < 1e-5


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [keep for keep in Keep if keep != Keep.ALL])
@pytest.mark.parametrize(
    ("dtype", "product"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "bfloat16, multiplied in float32"],
)
def test_what_is_not_kept_is_made_again_to_the_same_bits(
    keep: Keep, packed: bool, dtype: torch.dtype, product: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many slices a weight is decoded in, and also where a CPU has no products in 16 bits."""
    monkeypatch.setattr(linear, "SLICE_BYTES", 4096)
    monkeypatch.setattr(backend, "_cpu_product_dtype", lambda _: product)
    model = adapted(SHAPES[2])
    for p in model.parameters():
        p.data = p.data.to(p.dtype if p.requires_grad else dtype)
    assert fuse(model)
    again = copy.deepcopy(model)
    for block in again.layers:
        block.keep = keep  # type: ignore[assignment]
    loss, grads = gradients(again, packed)
    expected_loss, expected = gradients(model, packed)
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("rank", "by_kernels", "joins"), [(16, True, 16), (8, True, 0), (16, False, 0)])
def test_columns_are_for_gpus_and_rows_of_so_many_numbers(
    rank: int, by_kernels: bool, joins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlps = [adapted(SHAPES[0], LoraConfig(rank=rank), nf4).layers[0].mlp for nf4 in (True, False)]
    monkeypatch.setattr(projections, "has_kernels", lambda _: by_kernels)
    both = [Projections.of(mlp.gate_proj, mlp.up_proj) for mlp in mlps]
    assert [(of.x_room, of.dy_room) for of in both] == [(joins, 2 * joins), (0, 0)]


def test_each_policy_keeps_less_than_the_next() -> None:
    model = adapted(SHAPES[1])
    assert fuse(model)
    bytes_kept = []
    for keep in sorted(set(Keep) - {Keep.WEIGHTS}):  # which autograd does not know of
        for block in model.layers:
            block.keep = keep  # type: ignore[assignment]
        bytes_kept.append(saved_bytes(model))
    assert bytes_kept == sorted(set(bytes_kept))


def test_kept_weights_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else twice, but for those of the lowest block's heads, whose input needs no gradient."""
    model, decoded = adapted(SHAPES[1]), list[int]()
    assert fuse(model)
    decode = linear.decode

    def counted(weight: NF4Tensor, start: int, stop: int, *rest: Any) -> None:
        decoded.append(stop - start)
        decode(weight, start, stop, *rest)

    monkeypatch.setattr(linear, "decode", counted)
    sizes = {name: m.weight.n for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    heads = sum(
        n for name, n in sizes.items() if name.startswith("layers.0.") and name.split(".")[3] in "q_proj k_proj v_proj"
    )
    for keep, n_decoded in ((Keep.ALL, 2 * sum(sizes.values()) - heads), (Keep.WEIGHTS, sum(sizes.values()))):
        for block in model.layers:
            block.keep = keep  # type: ignore[assignment]
        decoded.clear()
        gradients(model)
        assert sum(decoded) == n_decoded


def test_it_takes_attention_in_whatever_layout_torch_gives_it() -> None:
    """Under a mask, here for positions with gaps, torch's plain way has the heads before the tokens in memory."""
    plain = adapted(SHAPES[0])
    fast = copy.deepcopy(plain)
    assert fuse(fast)
    given = batch(plain.config, packed=False)
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        for model in (fast, plain):
            hidden = model.hidden(given.tokens, 2 * given.positions)
            cross_entropy_sum(hidden, model.lm_head.weight, given.labels).backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert distance(*found) < 1e-5


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize(
    ("lora", "nf4", "double_quant"),
    [
        (LoraConfig(rank=2, alpha=8, rank_pattern={"k_proj": 5, "up_proj": 1}), True, True),
        (LoraConfig(rank=3, alpha=7, rslora=True), True, False),
        (LoraConfig(rank=4, targets=("q_proj", "down_proj")), True, True),
        (LoraConfig(rank=4, targets=("up_proj",)), False, True),
    ],
)
def test_it_takes_any_adapters_on_any_base(lora: LoraConfig, nf4: bool, double_quant: bool) -> None:
    plain = adapted(SHAPES[1], lora, nf4, double_quant)
    fast = copy.deepcopy(plain)
    assert fuse(fast)
    assert distance(gradients(fast)[1], gradients(plain)[1]) < 1e-5


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_errs_no_more_than_the_plain_block(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64; with products widened to float32 and in 16 bits, whatever this machine would choose."""
    monkeypatch.setattr(backend, "_cpu_product_dtype", lambda dtype: dtype if native else torch.float32)
    start = adapted(SHAPES[0], nf4=False)
    start.to(dtype)
    exact = gradients(copy.deepcopy(start).double())[1]
    plain, fast = copy.deepcopy(start), copy.deepcopy(start)
    assert fuse(fast)
    error = distance(gradients(fast)[1], exact)
    assert 0 < error <= 2 * distance(gradients(plain)[1], exact)


def saved_bytes(model: Mistral) -> int:
    """Of tensors kept for backward, each storage once, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = batch(model.config, packed=False).tokens
    with saved_tensors_hooks(pack, lambda t: t):
        model.hidden(tokens)
    return sum(kept.values())


def test_it_keeps_what_its_first_lines_say() -> None:
    """x twice, q, k, v, attention's output, g, u, x A^T."""
    config = SHAPES[1]
    model = adapted(config)
    plain = saved_bytes(model)
    assert fuse(model)
    heads = config.n_heads * config.head_dim
    per_token = 2 * config.dim + 2 * heads + 2 * config.n_kv_heads * config.head_dim + 2 * config.hidden_dim + 7 * 4
    extra = 4 * B * T * 2 * config.dim  # the last norm of the model
    expected = 4 * B * T * per_token * config.n_layers
    assert expected * 0.95 < saved_bytes(model) <= expected * 1.05 + extra
    assert saved_bytes(model) < 0.7 * plain


def test_a_gradient_that_is_handed_in_stays_as_it_is() -> None:
    model = adapted(SHAPES[0])
    assert fuse(model)
    hidden = model.hidden(batch(model.config, packed=False).tokens)
    gradient = torch.ones_like(hidden)
    hidden.backward(gradient)
    assert torch.equal(gradient, torch.ones_like(hidden))


@pytest.mark.usefixtures("columns")
def test_gradients_are_made_with_room_and_none_is_copied_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "pad", lambda *_: pytest.fail("copied"))
    model = adapted(SHAPES[1])
    assert fuse(model)
    assert gradients(model)[1]


@pytest.mark.usefixtures("columns")
def test_what_a_hook_makes_of_a_gradient_counts() -> None:
    """Also where it puts other numbers into the tensor that has the room."""
    found = []
    for fast in (False, True):
        model = adapted(SHAPES[1])
        assert not fast or fuse(model)
        hidden: list[Tensor] = []
        model.layers[0].register_forward_hook(lambda _module, _given, made, to=hidden: to.append(made))
        loss = loss_sum(model, batch(model.config, packed=False))
        hidden[0].register_hook(lambda grad: setattr(grad, "data", 2 * grad.data))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert distance(found[1], found[0]) < 1e-5
