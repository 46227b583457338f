"""The decoder against transformers' MistralForCausalLM; packing, cache, padding and checkpointing against itself."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinistralConfig, MinistralForCausalLM, MistralConfig, MistralForCausalLM

from minilora import model as model_module
from minilora.config import LoraConfig, ModelConfig
from minilora.kv_cache import KVCache
from minilora.linear import NF4Linear
from minilora.lora import add_lora
from minilora.model import Context, Mistral
from minilora.nf4 import quantize_nf4
from minilora.visible import Pieces, Runs, visible

CONFIGS = {
    "window 7, heads 8:1": ModelConfig(
        dim=64, n_layers=3, head_dim=16, hidden_dim=96, n_heads=8, n_kv_heads=1, vocab_size=71, sliding_window=7
    ),
    "no window, heads 4:1, tied": ModelConfig(
        dim=48, n_layers=2, head_dim=24, hidden_dim=80, n_heads=4, n_kv_heads=1, vocab_size=90, tied_embeddings=True
    ),
    "window 1, heads 4:1, theta 1e6": ModelConfig(
        dim=32, n_layers=2, head_dim=10, hidden_dim=40, n_heads=8, n_kv_heads=2, vocab_size=33, sliding_window=1,
        rope_theta=1e6, norm_eps=1e-3,
    ),
    "window 13, heads 16:2, heads wider than dim, tied": ModelConfig(
        dim=40, n_layers=2, head_dim=8, hidden_dim=72, n_heads=16, n_kv_heads=2, vocab_size=101, sliding_window=13,
        tied_embeddings=True,
    ),
    "windows by layer, heads 4:1": ModelConfig(
        dim=32, n_layers=4, head_dim=8, hidden_dim=56, n_heads=4, n_kv_heads=1, vocab_size=50, sliding_window=(None, 5)
    ),
    "window longer than the text, heads 2:2": ModelConfig(
        dim=36, n_layers=2, head_dim=12, hidden_dim=50, n_heads=2, n_kv_heads=2, vocab_size=40, sliding_window=64
    ),
}  # fmt: skip
WINDOW = CONFIGS["window 7, heads 8:1"]
T = 37


def mistral(config: ModelConfig, seed: int = 0) -> Mistral:
    """Random weights that keep the residual stream and the logits near unit size: an error of 1e-5 is one of 1e-5."""
    model, generator = Mistral(config), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.data = 1 + 0.2 * noise
        else:
            is_only_embedding = name == "embed_tokens.weight" and not config.tied_embeddings
            weight.data = noise / (1 if is_only_embedding else weight.shape[1]) ** 0.5
    return model


def transformers_twin(model: Mistral, attention: str) -> Any:
    config, by_layer = model.config, {}
    window = max((w for w in config.windows if w), default=None)
    causal_lm, config_of = MistralForCausalLM, MistralConfig
    if isinstance(config.sliding_window, tuple):
        causal_lm, config_of = MinistralForCausalLM, MinistralConfig
        kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
        by_layer = {"layer_types": kinds * (config.n_layers // len(kinds))}
    twin = causal_lm(
        config_of(
            vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            sliding_window=window, tie_word_embeddings=config.tied_embeddings,
            attn_implementation=attention, **by_layer,
        )
    )  # fmt: skip
    weights = {n if n.startswith("lm_head") else f"model.{n}": w for n, w in model.state_dict().items()}
    twin.load_state_dict(weights)
    assert twin.config._attn_implementation == attention
    return twin.to(model.embed_tokens.weight.dtype)


def some_tokens(config: ModelConfig, batch: int = 2, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """float32 sums in another order, of numbers near unit size."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# Against transformers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, attention: str) -> None:
    config = CONFIGS[name]
    model = mistral(config)
    twin = transformers_twin(model, attention)
    with torch.no_grad():
        for length in (1, 6, T):
            tokens = some_tokens(config, length=length)
            logits = model(tokens)
            assert logits.shape == (2, length, config.vocab_size)
            assert logits.std() > 0.5
            assert_near(logits, twin(tokens).logits)


def test_another_window_is_another_model() -> None:
    """What the parity above could not see, it would not hold: one token more or less in the window."""
    model, tokens = mistral(WINDOW), some_tokens(WINDOW)
    for window in (6, 8, None):
        other = mistral(replace(WINDOW, sliding_window=window))
        with torch.no_grad():
            assert (model(tokens) - other(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["window 7, heads 8:1", "no window, heads 4:1, tied"])
def test_gradients_equal_transformers(name: str) -> None:
    config = CONFIGS[name]
    model = mistral(config)
    twin = transformers_twin(model, "sdpa")
    tokens = some_tokens(config)
    for m in (model, twin):
        out = m(tokens)
        getattr(out, "logits", out).logsumexp(-1).mean().backward()
    theirs = {n.removeprefix("model."): p.grad for n, p in twin.named_parameters()}
    ours = {n: p.grad for n, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for parameter, gradient in ours.items():
        peer = theirs[parameter]
        assert gradient is not None
        torch.testing.assert_close(gradient, peer, rtol=0, atol=1e-5 * float(peer.abs().max()), msg=parameter)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["window 7, heads 8:1", "no window, heads 4:1, tied"])
def test_bfloat16_is_as_near_to_transformers_as_two_orders_of_sums_are(name: str, attention: str) -> None:
    """Sums in bfloat16, 8 bits of mantissa, in another order: 2 % of the largest logit, and a cosine of 0.999."""
    model = mistral(CONFIGS[name]).bfloat16()
    tokens = some_tokens(CONFIGS[name])
    with torch.no_grad():
        logits, theirs = model(tokens), transformers_twin(model, attention)(tokens).logits
    assert logits.dtype == torch.bfloat16
    logits, theirs = logits.double(), theirs.double()
    assert (logits - theirs).abs().max() <= 2e-2 * theirs.abs().max()
    assert torch.nn.functional.cosine_similarity(logits.flatten(), theirs.flatten(), dim=0) > 0.999


def test_positions_are_absolute_numbers_that_may_start_anywhere() -> None:
    model, tokens = mistral(WINDOW), some_tokens(WINDOW)
    positions = torch.arange(500, 500 + T).expand(2, T)
    with torch.no_grad():
        theirs = transformers_twin(model, "sdpa")(tokens, position_ids=positions, use_cache=False).logits
        # float32 angles near 500 are off by 3e-5 radians, so the order of their computation shows there
        torch.testing.assert_close(model(tokens, positions), theirs, rtol=0, atol=1e-4)


# Packed rows


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_samples_do_not_see_each_other(name: str) -> None:
    config = CONFIGS[name]
    model, lengths = mistral(config), (5, 1, 19, 12)
    tokens = some_tokens(config, batch=1, length=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        under_mask = model(tokens, positions, segments)
        stops = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        in_runs = model.lm_head(model.hidden(tokens, positions, segments, runs=Runs(stops, max(lengths))))
        separate = torch.cat([model(sample) for sample in tokens.split(lengths, dim=1)], dim=1)
        assert_near(under_mask, separate)
        assert_near(in_runs, separate)
        assert (model(tokens) - separate).abs().max() > 0.1 or config.sliding_window == 1


# The cache


def with_cache(model: Mistral, tokens: Tensor, ends: list[int], max_len: int) -> Tensor:
    """Logits of `tokens`, given to the model in chunks that end at `ends`."""
    cache = KVCache(model.config, len(tokens), max_len, torch.float32, torch.device("cpu"))
    logits = []
    for start, stop in pairwise([0, *ends]):
        positions = torch.arange(start, stop).expand(len(tokens), -1) if start else None  # a prompt needs none
        logits.append(model(tokens[:, start:stop], positions, cache=cache))
    return torch.cat(logits, dim=1)


CHUNKS = {
    "token by token": list(range(1, T + 1)),
    "a prompt, then token by token": list(range(11, T + 1)),
    "chunks shorter, longer and as long as the window": [3, 10, 11, 12, 26, 33, T],
    "at once": [T],
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_nothing(name: str, chunks: str) -> None:
    config = CONFIGS[name]
    model, tokens = mistral(config), some_tokens(config)
    with torch.no_grad():
        expected = model(tokens)
        for max_len in (T, T + 20):
            assert_near(with_cache(model, tokens, CHUNKS[chunks], max_len), expected)


def test_the_cache_is_of_the_windows_size() -> None:
    cache = KVCache(WINDOW, 2, 1000, torch.bfloat16, torch.device("cpu"))
    assert [keys.shape for keys in cache.keys] == [values.shape for values in cache.values] == [(2, 7, 1, 16)] * 3
    assert cache.positions[7].shape == (2, 7)
    assert KVCache(WINDOW, 2, 5, torch.bfloat16, torch.device("cpu")).keys[0].shape[1] == 5
    by_layer = replace(WINDOW, sliding_window=(None, 7, 3))
    cache = KVCache(by_layer, 2, 1000, torch.bfloat16, torch.device("cpu"))
    assert [keys.shape[1] for keys in cache.keys] == [1000, 7, 3]
    assert {window: held.shape[1] for window, held in cache.positions.items()} == {None: 1000, 7: 7, 3: 3}


def test_slots_of_the_worked_example() -> None:
    config = replace(WINDOW, sliding_window=3, n_layers=1)
    cache = KVCache(config, 1, 10, torch.float32, torch.device("cpu"))
    looked_at = ([0, 1, 2], [3, 1, 2], [3, 4, 2], [3, 4, 2, 5, 6])
    held_then = ([0, 1, 2], [3, 1, 2], [3, 4, 2], [6, 4, 5])
    for start, stop, looked, held in zip((0, 3, 4, 5), (3, 4, 5, 7), looked_at, held_then, strict=True):
        positions = torch.arange(start, stop)[None]
        k = positions[..., None, None].float().expand(1, -1, 1, 16)
        keys, _ = cache.append(0, k, k, positions)
        assert keys[0, :, 0, 0].tolist() == cache.seen(3, positions)[0].tolist() == looked
        cache.advance(positions)
        assert cache.keys[0][0, :, 0, 0].tolist() == cache.positions[3][0].tolist() == held


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_in_an_empty_cache_sees_itself_alone(name: str) -> None:
    """Without a mask of T x (S + T): as the same tokens without a cache."""
    config, positions = CONFIGS[name], torch.arange(9)[None]
    cache = KVCache(config, 1, 20, torch.float32, torch.device("cpu"))
    context = Context(config, positions, None, cache, torch.float32, runs=Runs.of_rows(1, 9))
    assert all(isinstance(context.sees(layer), Pieces) for layer in range(config.n_layers))
    k = torch.randn(1, 9, config.n_kv_heads, config.head_dim)
    assert context.join(0, k, k)[0] is k
    cache.advance(positions)
    runs = Runs.of_rows(1, 9)
    assert isinstance(Context(config, positions + 9, None, cache, torch.float32, runs=runs).sees(0), Tensor)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_runs_there_is_a_mask(name: str) -> None:
    """Positions and segments may say more than runs can: padding, gaps, a segment that comes back."""
    positions, segments = torch.tensor([[-1, 0, 1, 5, 2]]), torch.tensor([[0, 0, 0, 1, 0]])
    context = Context(CONFIGS[name], positions, segments, None, torch.float32)
    for layer in range(CONFIGS[name].n_layers):
        window = CONFIGS[name].windows[layer % len(CONFIGS[name].windows)]
        sees = context.sees(layer)
        assert isinstance(sees, Tensor)
        assert torch.equal(sees, visible(positions, positions, window, segments))


def test_tokens_that_follow_others_in_a_cache_need_positions() -> None:
    model, tokens = mistral(WINDOW), torch.ones(1, 4, dtype=torch.int64)
    cache = KVCache(WINDOW, 1, 20, torch.float32, torch.device("cpu"))
    first = model(tokens, cache=cache)
    assert_near(first, model(tokens))
    with pytest.raises(ValueError, match="need positions"):
        model(tokens, cache=cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_filled_from_the_left_are_answered_as_if_alone(name: str) -> None:
    config = CONFIGS[name]
    model, lengths, new = mistral(config), (1, 4, 9, 15), 12
    longest = max(lengths)
    texts = some_tokens(config, batch=len(lengths), length=longest + new)
    rows = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, text, n in zip(rows, texts, lengths, strict=True):
        row[longest - n :] = text[:n]
    first = torch.tensor(lengths)[:, None] - longest  # position of each row's first slot, 0 or negative
    cache = KVCache(config, len(lengths), longest + new, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        logits = [model(rows, first + torch.arange(longest), cache=cache)[:, -1:]]
        for step in range(new):
            following = torch.stack([text[n + step] for text, n in zip(texts, lengths, strict=True)])[:, None]
            logits.append(model(following, first + longest + step, cache=cache))
        batch = torch.cat(logits, dim=1)
        assert batch.isfinite().all()
        for b, n in enumerate(lengths):
            assert_near(batch[b], model(texts[b : b + 1, : n + new])[0, n - 1 :])


# Training


def qlora(config: ModelConfig) -> Mistral:
    model = mistral(config)
    for block in model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                setattr(parent, name, NF4Linear(quantize_nf4(layer.weight)))
    torch.manual_seed(2)
    model = add_lora(model, LoraConfig(rank=3, dropout=0.2)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def gradients(model: Mistral, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of the learning parameters, and how many blocks were computed."""
    model.zero_grad()
    model.activation_checkpointing = checkpointing
    calls = []
    handles = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in model.layers]
    torch.manual_seed(4)
    model(some_tokens(model.config)).logsumexp(-1).mean().backward()
    for handle in handles:
        handle.remove()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("make", [mistral, qlora])
def test_activation_checkpointing_gives_equal_gradients(make: Any) -> None:
    model = make(WINDOW)
    plain, calls = gradients(model, checkpointing=False)
    assert calls == WINDOW.n_layers
    again, calls = gradients(model, checkpointing=True)
    assert calls == 2 * WINDOW.n_layers  # once more in backward
    assert plain.keys() == again.keys()
    assert plain
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


def test_segments_alone_keep_samples_apart_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without positions a row is not one run there, for the runs would say nothing of the segments."""
    model, given = mistral(WINDOW), []

    def context(*arguments: Any) -> Context:
        given.append(arguments[6])
        return Context(*arguments)

    monkeypatch.setattr(model_module, "Context", context)
    tokens = some_tokens(WINDOW)
    model(tokens)
    model(tokens, segments=torch.arange(T).expand(tokens.shape) // 4)
    assert given[0] is not None
    assert given[1] is None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        mistral(WINDOW)(torch.zeros(shape, dtype=torch.int64))


def test_every_weight_learns() -> None:
    found, _ = gradients(mistral(WINDOW), checkpointing=False)
    assert found.keys() == dict(mistral(WINDOW).named_parameters()).keys()
    assert all(g.abs().max() > 0 for g in found.values())


# Parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_the_count_of_parameters_is_the_modules(name: str) -> None:
    config = CONFIGS[name]
    model = Mistral(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters
    assert (model.lm_head.weight is model.embed_tokens.weight) == config.tied_embeddings


def test_init_weights_is_a_function_of_the_seed() -> None:
    config = replace(WINDOW, dim=256)
    first, second, other = Mistral(config), Mistral(config), Mistral(config)
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        model.init_weights(seed)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)
        if a.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / (6**0.5 if into_residual else 1)
            assert float(a.detach().std()) == pytest.approx(expected, rel=4 / (2 * a.numel()) ** 0.5)
