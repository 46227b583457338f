"""Generation: the cache against a full forward pass, company against solitude, and the odds of every draw."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from marks import interpreted
from tiny_runs import TINY, tiny_model
from torch import Tensor

from benchmarks.count_gpu import PretendedGPU
from minilora import decode_graph, generation
from minilora.checkpoint.load import load_model
from minilora.checkpoint.save import save_hf
from minilora.config import LoraConfig
from minilora.decode_graph import FEWEST, Steps
from minilora.errors import UserError
from minilora.generation import answer, choose, generate, stream
from minilora.kv_cache import KVCache
from minilora.lora import LoRALinear, adapters_off, add_lora, casts
from minilora.model import Mistral

EOS = 2
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture(scope="module")
def model() -> Mistral:
    return tiny_model()


def prompt(n: int, seed: int = 0) -> Tensor:
    return torch.randint(14, TINY.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


def naive(model: Mistral, tokens: Tensor, n: int) -> Tensor:
    """The likeliest continuation, without a cache: everything again for each token."""
    with torch.no_grad():
        for _ in range(n):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("window", [None, 1, 5, 12])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_greedy_is_the_naive_loop_also_beyond_the_window(window: int | None, length: int) -> None:
    model = tiny_model(config=dataclasses.replace(TINY, sliding_window=window))
    tokens = prompt(length)
    got = generate(model, tokens, 30)
    assert got.shape == (1, length + 30)
    assert got.equal(naive(model, tokens, 30))
    assert len(set(got[0, length:].tolist())) > 3, "not one token for ever"


def test_a_batch_is_its_rows(model: Mistral) -> None:
    rows = torch.cat([prompt(9, seed) for seed in range(4)])
    assert generate(model, rows, 16).equal(torch.cat([generate(model, row[None], 16) for row in rows]))


def test_padding_at_the_left_is_never_seen(model: Mistral) -> None:
    lengths = [3, 17, 1, 8]
    alone = [generate(model, prompt(n, n), 20)[0, n:].tolist() for n in lengths]
    n_padding = torch.tensor([17 - n for n in lengths])
    for filling in (0, 300):
        padded = torch.full((4, 17), filling)
        for row, n in enumerate(lengths):
            padded[row, 17 - n :] = prompt(n, n)
        steps = torch.stack(list(stream(model, padded, 20, n_padding=n_padding)), dim=1)
        assert steps.tolist() == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_model_says_so(temperature: float) -> None:
    model = tiny_model()
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(model, prompt(3), 2, temperature)


def test_answers_in_batches_are_answers_one_by_one(model: Mistral) -> None:
    prompts = [prompt(n, n)[0].tolist() for n in (7, 2, 30, 2, 11, 1, 7)]
    eos = generate(model, torch.tensor([prompts[0]]), 6)[0, -1].item()  # a token that comes up, so that rows end apart
    one_by_one = [answer(model, [p], 12, eos, 1)[0] for p in prompts]
    assert len({len(a) for a in one_by_one}) > 1
    for batch_size in (2, 3, 8):
        assert answer(model, prompts, 12, eos, batch_size) == one_by_one
    for p, got in zip(prompts, one_by_one, strict=True):
        row = naive(model, torch.tensor([p]), 12)[0, len(p) :].tolist()
        assert got == (row[: row.index(eos)] if eos in row else row)
    assert answer(model, [], 12, eos) == []


def test_no_token_is_made_once_every_answer_of_a_batch_has_ended(model: Mistral) -> None:
    first = generate(model, prompt(3), 1)[0].tolist()
    with patch.object(generation, "choose", wraps=choose) as chosen:
        assert answer(model, [first[:-1]] * 2, 12, eos_id=first[-1]) == [[], []]
    assert chosen.call_count == 1


@pytest.mark.parametrize("likeliest_alone", [{"top_k": 1}, {"top_p": 0.0}])
def test_a_draw_from_the_likeliest_token_alone_is_greedy(model: Mistral, likeliest_alone: dict[str, Any]) -> None:
    drawn = generate(model, prompt(5), 20, temperature=1.0, **likeliest_alone)
    assert drawn.equal(generate(model, prompt(5), 20))


@pytest.mark.parametrize("training", [False, True])
def test_answer_leaves_the_mode_as_it_was(training: bool) -> None:
    model = tiny_model().train(training)
    answer(model, [[5, 6]], 2, EOS)
    assert model.training is training
    with pytest.raises(ValueError, match=f"id {TINY.vocab_size}, but the model's go from 0 to {TINY.vocab_size - 1}"):
        answer(model, [[TINY.vocab_size]], 2, EOS)
    with pytest.raises(ValueError, match="tokens hold the id -1, but"):
        generate(model, torch.tensor([[5, -1, 6]]), 2)
    assert model.training is training


def test_nothing_is_dropped_out_of_a_model_that_trains() -> None:
    model = add_lora(tiny_model(), LoraConfig(dropout=0.5))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.3, generator=torch.Generator().manual_seed(0))
    still = generate(model.eval(), prompt(5), 20)
    assert generate(model.train(), prompt(5), 20).equal(still)
    assert model.training, "as it was found"
    steps = stream(model, prompt(5), 20)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert model.training


@pytest.mark.parametrize(("length", "new", "beyond"), [(5, 8, False), (5, 9, True), (13, 1, True)])
def test_a_text_beyond_the_models_positions_is_told(length: int, new: int, beyond: bool) -> None:
    model = tiny_model(config=dataclasses.replace(TINY, max_seq_len=12))
    with pytest.warns(UserWarning, match="max_position_embeddings, 12") if beyond else nullcontext() as told:
        generate(model, prompt(length), new)
    assert not told or len(told) == 1
    if beyond:
        generate(tiny_model(), prompt(length), new)


def test_eos_ends_a_row_and_the_last_one_the_stream(model: Mistral) -> None:
    rows = torch.cat([prompt(4, 1), prompt(4, 2)])
    free = generate(model, rows, 10)[:, 4:]
    n = next(i for i in range(2, 10) if free[0, i] not in free[0, :i])
    eos = int(free[0, n])
    row_0 = [*free[0, : n + 1].tolist(), *[eos] * 10]
    got = generate(model, rows, 10, eos_id=eos)[:, 4:].tolist()
    assert got[0] == row_0[: len(got[0])]
    assert eos not in free[1]
    assert got[1] == free[1].tolist(), "a row that has ended changes nothing for the others"
    alone = generate(model, rows[:1], 10, eos_id=eos)
    assert alone.tolist()[0] == [*rows[0].tolist(), *free[0, : n + 1].tolist()]


def test_no_new_tokens_is_the_prompt(model: Mistral) -> None:
    assert generate(model, prompt(3), 0).equal(prompt(3))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_k": 0},
        {"max_new_tokens": -1},
        {"tokens": torch.zeros(1, 0, dtype=torch.int64)},
        {"tokens": torch.zeros(3, dtype=torch.int64)},
    ],
)
def test_arguments_out_of_range(model: Mistral, bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        generate(model, **({"tokens": prompt(2), "max_new_tokens": 2} | bad))  # type: ignore[arg-type]


# --- Steps ----------------------------------------------------------------------------------------------------------

LENGTHS, LONGEST, NEW = (3, 17, 1, 8), 17, 30


def texts() -> Tensor:
    """One for each of LENGTHS, (4, LONGEST + NEW), of which so many tokens are the prompt."""
    return torch.cat([prompt(LONGEST + NEW, seed) for seed in range(len(LENGTHS))])


def prefilled(model: Mistral) -> tuple[KVCache, Tensor]:
    """A cache that holds the prompts, filled from the left, and the position (4, 1) of each row's last token."""
    rows, device = texts(), model.device
    padded = torch.stack([row[:LONGEST].roll(LONGEST - n) for row, n in zip(rows, LENGTHS, strict=True)])
    positions = torch.arange(LONGEST) - LONGEST + torch.tensor(LENGTHS)[:, None]
    cache = KVCache(model.config, len(rows), LONGEST + NEW, model.dtype, device)
    model.hidden(padded.to(device), positions.to(device), cache=cache)
    return cache, positions[:, -1:].to(device)


def by_steps(model: Mistral, call: Callable[[Steps, Tensor], Tensor] = Steps.__call__) -> Tensor:
    """The logits (4, NEW, V) of what follows each token behind the prompts."""
    cache, last = prefilled(model)
    steps = Steps(model, cache, last, NEW)
    found = []
    for i in range(NEW):
        tokens = torch.stack([row[n + i] for row, n in zip(texts(), LENGTHS, strict=True)])
        found.append(call(steps, tokens.to(model.device)).clone())
    steps.release()
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 16, 40])
@torch.no_grad()
def test_a_step_over_memory_that_stays_is_the_full_pass(window: int | None) -> None:
    """What a graph records, without one: nothing but the numbers in its memory may tell one step from another."""
    model = tiny_model(config=dataclasses.replace(TINY, sliding_window=window))
    places = set()

    def step(steps: Steps, tokens: Tensor) -> Tensor:
        cache = steps._cache
        memory = [steps._tokens, steps._positions, *cache.keys, *cache.values, *cache.positions.values()]
        places.add(tuple(tensor.data_ptr() for tensor in memory))
        steps._tokens.copy_(tokens[:, None])
        return steps.step()

    got = by_steps(model, step)
    assert len(places) == 1
    for row, text, n in zip(got, texts(), LENGTHS, strict=True):
        full = model(text[None, : n + NEW])[0, n:]
        torch.testing.assert_close(row, full, rtol=1e-5, atol=1e-4)  # logits of some 100
    assert not Steps.can_record(model.device)
    assert by_steps(model).equal(got)


@pytest.mark.parametrize(("new", "expected"), [(FEWEST, []), (FEWEST + 1, ["record", *["replay"] * (FEWEST - 1)])])
def test_the_second_of_enough_steps_is_recorded(
    model: Mistral, new: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token is the prefill's. The recording is stood in for by the step itself."""
    done = list[str]()

    class Recorded:
        def __init__(self, steps: Steps) -> None:
            self.steps = steps
            done.append("record")

        def replay(self) -> None:
            self.steps._logits = self.steps.step()
            done.append("replay")

    monkeypatch.setattr(Steps, "can_record", staticmethod(lambda _: True))
    monkeypatch.setattr(Steps, "_recorded", lambda steps: (Recorded(steps), torch.empty(0)))
    assert generate(model, prompt(5), new).equal(naive(model, prompt(5), new))
    assert done == expected


@pytest.mark.parametrize("wrong", ["other", "nan", "fails"])
def test_a_recording_that_is_not_the_step_is_told_and_left(
    model: Mistral, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    class Recorded:
        def __init__(self, steps: Steps) -> None:
            self.steps = steps

        def replay(self) -> None:
            if wrong == "fails":
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            self.steps._logits = self.steps.step().roll(1, -1) * (1 if wrong == "other" else torch.nan)

    monkeypatch.setattr(Steps, "can_record", staticmethod(lambda _: True))
    monkeypatch.setattr(Steps, "_recorded", lambda steps: (Recorded(steps), torch.empty(0)))
    with pytest.warns(UserWarning, match="without a CUDA graph, which " + ("fails" if wrong == "fails" else "says")):
        assert generate(model, prompt(5), FEWEST + 3).equal(naive(model, prompt(5), FEWEST + 3))


@interpreted
@torch.no_grad()
def test_on_a_gpu_a_step_takes_the_elementwise_kernels() -> None:
    model = tiny_model()
    cache, last = prefilled(model)
    again, _ = prefilled(model)
    tokens = torch.tensor([20, 30, 40, 50])[:, None]
    plain = model(tokens, last + 1, cache=cache)
    with PretendedGPU() as gpu:
        by_kernels = model(tokens, last + 1, cache=again)
    torch.testing.assert_close(by_kernels, plain, rtol=1e-5, atol=1e-4)
    names = [launch.name for launch in gpu.launches]
    n_layers = model.config.n_layers
    launches = {"normalize_kernel": 2 * n_layers + 1, "rotate_kernel": 2 * n_layers, "swiglu_kernel": n_layers}
    assert {name: names.count(name) for name in launches} == launches
    assert not {"repeat_interleave", "silu", "rsqrt"} & {*names}
    with PretendedGPU() as gpu, torch.enable_grad():
        model(prompt(3))
    assert not {*launches} & {launch.name for launch in gpu.launches}, "autograd does not see into them"


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_on_a_gpu_an_adapter_is_two_launches_of_a_step(dtype: torch.dtype) -> None:
    """Cast before the steps, not in each of them; then x A^T, and B's product onto y."""
    model = add_lora(tiny_model().to(dtype), LoraConfig(rank=4, alpha=8))
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for i, adapter in enumerate(adapters):
        adapter.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    cache, last = prefilled(model)
    again, _ = prefilled(model)
    tokens = torch.tensor([20, 30, 40, 50])[:, None]
    plain = model(tokens, last + 1, cache=cache)
    with PretendedGPU() as base, adapters_off(model):
        model(tokens, last + 1, cache=again)
    with casts(model, dtype), PretendedGPU() as gpu:
        adapted = model(tokens, last + 1, cache=again)
    assert len(gpu.launches) == len(base.launches) + 2 * len(adapters)
    error = (adapted - plain).norm() / plain.norm()
    assert error < (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps  # two layers' roundings of each y
    assert not any(hasattr(p, "kept_cast") for p in model.parameters())
    with PretendedGPU() as gpu, torch.enable_grad():
        assert model(prompt(3)).requires_grad
    assert "addmm_" not in {launch.name for launch in gpu.launches}, "autograd needs what it would overwrite"


def test_a_stream_gives_its_memory_back_also_if_it_is_left(model: Mistral, monkeypatch: pytest.MonkeyPatch) -> None:
    released = list[Steps]()
    monkeypatch.setattr(Steps, "release", lambda steps: released.append(steps))
    generate(model, prompt(3), 4)
    assert len(released) == 1
    left = stream(model, prompt(3), 4)
    next(left)
    assert len(released) == 1
    left.close()  # type: ignore[attr-defined]
    assert len(released) == 2


@pytest.fixture(params=["dense float32", "nf4 bfloat16", "nf4 bfloat16 with adapters"])
def on_gpu(request: pytest.FixtureRequest, tmp_path: Path) -> Mistral:
    config = dataclasses.replace(TINY, n_layers=3, dim=64, hidden_dim=192)
    save_hf(tiny_model(config=config), tmp_path / "m", dtype=torch.float32)
    if request.param == "dense float32":
        return load_model(tmp_path / "m", dtype=torch.float32, device="cuda").eval()
    model = load_model(tmp_path / "m", quantize="nf4", dtype=torch.bfloat16, device="cuda")
    if request.param.endswith("adapters"):
        torch.manual_seed(0)
        for module in add_lora(model, LoraConfig(rank=4)).modules():
            if isinstance(module, LoRALinear):
                torch.nn.init.normal_(module.lora_B, std=0.02)
    return model.eval()


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_a_replayed_step_is_the_step(on_gpu: Mistral, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unlike lengths, beyond the window; the same kernels on the same numbers."""
    recorded = list[Steps]()
    record = Steps._recorded
    monkeypatch.setattr(Steps, "_recorded", lambda steps: (recorded.append(steps), record(steps))[1])
    by_graph = by_steps(on_gpu)
    assert len(recorded) == 1
    assert recorded[0]._graph is None, "released"
    monkeypatch.setattr(decode_graph, "FEWEST", NEW + 1)
    as_it_comes = by_steps(on_gpu)
    assert len(recorded) == 1
    largest = float(as_it_comes.abs().max())
    torch.testing.assert_close(by_graph, as_it_comes, rtol=0, atol=2**-7 * largest)
    if on_gpu.dtype == torch.float32:
        for row, text, n in zip(by_graph, texts().cuda(), LENGTHS, strict=True):
            torch.testing.assert_close(row, on_gpu(text[None, : n + NEW])[0, n:], rtol=0, atol=2**-10 * largest)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 4])
def test_texts_by_graphs_are_the_texts(
    on_gpu: Mistral, rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, n_padding = texts()[:rows, :LONGEST], torch.tensor([0, 4, 16, 9])[:rows]

    def text() -> list[list[int]]:
        return torch.stack(
            list(stream(on_gpu, tokens, NEW, temperature=temperature, seed=1, n_padding=n_padding)), dim=1
        ).tolist()

    by_graph = text()
    assert text() == by_graph, "memory of a stream before is not read"
    left = stream(on_gpu, tokens, NEW)
    for _ in range(5):
        next(left)
    assert text() == by_graph, "two streams at a time"
    left.close()  # type: ignore[attr-defined]
    monkeypatch.setattr(decode_graph, "FEWEST", NEW)
    assert text() == by_graph


# --- Draws ----------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.0])  # likeliest first: 1 3 5 0 4 2
N = 40_000


def shares(**options: object) -> Tensor:
    """How often each token is drawn."""
    drawn = choose(LOGITS.expand(N, -1), generator=torch.Generator().manual_seed(0), **options)  # type: ignore[arg-type]
    return drawn.bincount(minlength=len(LOGITS)) / N


def close(got: Tensor, want: Tensor) -> None:
    """Within four standard deviations of the drawing, and exactly zero where nothing may be drawn."""
    assert ((got - want).abs() <= 4 * (want * (1 - want) / N).sqrt()).all(), (got, want)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    close(shares(temperature=temperature), (LOGITS / temperature).softmax(-1))


def cut(*kept: int) -> Tensor:
    left = torch.full_like(LOGITS, -torch.inf)
    left[list(kept)] = LOGITS[list(kept)]
    return left.softmax(-1)


def test_top_k_keeps_the_likeliest() -> None:
    close(shares(temperature=1.0, top_k=3), cut(1, 3, 5))
    close(shares(temperature=1.0, top_k=1), cut(1))
    close(shares(temperature=1.0, top_k=100), LOGITS.softmax(-1))


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    p = LOGITS.softmax(-1)  # 0.44 for 1, 0.27 for 3, 0.16 for 5
    assert 0.7 < float(p[1] + p[3]) < 0.75
    close(shares(temperature=1.0, top_p=0.70), cut(1, 3))
    close(shares(temperature=1.0, top_p=0.75), cut(1, 3, 5))
    for least in (1e-9, 1e-320, 0):  # the second is 0 in float32
        close(shares(temperature=1.0, top_p=least), cut(1))
    close(shares(temperature=1.0, top_p=1.0), p)


def test_top_k_and_top_p_together() -> None:
    close(shares(temperature=1.0, top_k=2, top_p=0.99), cut(1, 3))
    close(shares(temperature=1.0, top_k=5, top_p=0.5), cut(1, 3))


def test_zero_temperature_and_one_next_to_it_take_the_likeliest() -> None:
    for temperature in (0.0, 1e-45, 1e-6):
        assert int(choose(LOGITS[None], temperature)) == 1


def test_rows_are_drawn_each_for_itself() -> None:
    two = torch.stack([LOGITS, -LOGITS])
    assert choose(two, 1.0, top_k=1).tolist() == [1, 2]


def test_a_seed_repeats_and_another_does_not(model: Mistral) -> None:
    first, again, other = (generate(model, prompt(5), 20, 1.0, seed=seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_seed_leaves_torch_s_state_alone(model: Mistral) -> None:
    torch.manual_seed(4)
    state = torch.get_rng_state()
    generate(model, prompt(5), 5, 1.0, seed=1)
    assert torch.get_rng_state().equal(state)


def test_the_half_precision_cache_has_the_model_s_dtype() -> None:
    model = tiny_model().bfloat16()
    assert generate(model, prompt(20), 10).equal(naive(model, prompt(20), 10))
