"""Generation: the cache against a full forward pass, company against solitude, and the odds of every draw."""

import dataclasses

import pytest
import torch
from tiny_runs import TINY, tiny_model
from torch import Tensor

from minilora.generation import answer, choose, generate, stream
from minilora.model import Mistral

EOS = 2


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


@pytest.mark.parametrize("training", [False, True])
def test_answer_leaves_the_mode_as_it_was(training: bool) -> None:
    model = tiny_model().train(training)
    answer(model, [[5, 6]], 2, EOS)
    assert model.training is training
    with pytest.raises(IndexError):
        answer(model, [[TINY.vocab_size]], 2, EOS)
    assert model.training is training


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
        {"top_p": 0.0},
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
    close(shares(temperature=1.0, top_p=1e-9), cut(1))
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
