"""Packing: every target once, nothing shared between samples, the same rows from the same two numbers."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minilora.config import ModelConfig
from minilora.data.encode import Sample
from minilora.data.pack import WINDOW, Mix, PackedBatch, RowSampler, epoch_rows, make_batch
from minilora.errors import UserError
from minilora.loss import IGNORE, cross_entropy_sum
from minilora.model import Mistral

T = 64


def some_samples(n: int, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        tokens = random.integers(1, 1000, random.integers(2, T + 2)).astype(np.int32)
        mask = random.random(len(tokens)) < 0.5
        mask[0] = False
        samples.append(Sample(tokens, mask, f"f:{i}"))
    return samples


def lengths_of(samples: list[Sample]) -> list[int]:
    return [sample.length for sample in samples]


def unpack(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each segment that has positions from 0 on, row by row, padding included."""
    found = []
    for b in range(len(batch.tokens)):
        starts = [*torch.nonzero(batch.positions[b] == 0).flatten().tolist(), batch.tokens.shape[1]]
        for segment, (start, end) in enumerate(pairwise(starts)):
            assert batch.positions[b, start:end].tolist() == list(range(end - start))
            assert batch.segments[b, start:end].tolist() == [segment] * (end - start)
            found.append((batch.tokens[b, start:end].tolist(), batch.labels[b, start:end].tolist()))
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_sample_once_and_rows_are_full(shuffle: bool) -> None:
    lengths = lengths_of(some_samples(3 * WINDOW))
    rows = epoch_rows(lengths, T, seed=1, epoch=0, shuffle=shuffle)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    taken = [sum(lengths[i] for i in row) for row in rows]
    assert max(taken) <= T
    assert sum(taken) > 0.98 * T * len(rows)


def test_best_fit_by_hand() -> None:
    assert epoch_rows([3, 7, 5, 2, 3], 10, seed=0, epoch=0, shuffle=False) == [[1, 0], [2, 4, 3]]
    assert epoch_rows([10, 10], 10, seed=0, epoch=0, shuffle=False) == [[0], [1]]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(some_samples(200))

    def rows(seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
        return epoch_rows(lengths, T, seed, epoch, shuffle)

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)
    assert rows(1, 2) != rows(2, 2)
    assert rows(1, 2) != rows(2, 1)
    assert rows(1, 2, shuffle=False) == rows(5, 6, shuffle=False)
    pairs = [{frozenset(row) for row in rows(0, epoch)} for epoch in range(2)]
    assert len(pairs[0] & pairs[1]) < len(pairs[0]) / 2, "an epoch mixes its rows anew"


def test_a_sample_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="65 positions does not fit rows of 64"):
        epoch_rows([3, 65], T, seed=0, epoch=0)


@pytest.mark.parametrize("trim", [True, False])
def test_a_batch_holds_what_its_samples_hold(trim: bool) -> None:
    samples = some_samples(40)
    rows = epoch_rows(lengths_of(samples), T, seed=0, epoch=0)[:8]
    batch = make_batch(samples, rows, T, trim=trim)
    longest = max(sum(samples[i].length for i in row) for row in rows)
    assert batch.tokens.shape == (8, longest if trim else T)
    packed = iter(unpack(batch))
    for row in rows:
        for i in row:
            tokens, mask = samples[i].tokens.tolist(), samples[i].target_mask.tolist()
            labels = [token if target else IGNORE for token, target in zip(tokens[1:], mask[1:], strict=True)]
            assert next(packed) == (tokens[:-1], labels)
        if sum(samples[i].length for i in row) < batch.tokens.shape[1]:
            assert set(next(packed)[1]) == {IGNORE}
    assert next(packed, None) is None
    assert batch.n_targets == sum(samples[i].n_targets for row in rows for i in row)


def test_dtypes_and_a_row_by_hand() -> None:
    a = Sample(np.array([1, 5, 6, 2], np.int32), np.array([False, False, True, True]), "f:1")
    b = Sample(np.array([1, 7], np.int32), np.array([False, True]), "f:2")
    batch = make_batch([a, b], [[0, 1]], 6).to("cpu")
    assert batch.tokens.tolist() == [[1, 5, 6, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 2, 7, IGNORE, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert [x.dtype for x in (batch.tokens, batch.labels, batch.positions)] == [torch.int64] * 3
    assert batch.segments.dtype == torch.int32
    assert batch.n_targets == 3


@pytest.mark.parametrize("trim", [False, True])
def test_runs_say_what_positions_and_segments_say(trim: bool) -> None:
    samples = some_samples(12)
    batch = make_batch(samples, epoch_rows(lengths_of(samples), T, seed=0, epoch=0), T, trim).to("cpu")
    n_tokens, stops = batch.tokens.numel(), batch.runs.stops
    assert (stops.dtype, int(stops[0]), int(stops[-1])) == (torch.int32, 0, n_tokens)
    assert batch.runs.longest == int(stops.diff().max())
    row = torch.arange(n_tokens) // batch.tokens.shape[1]
    run = torch.bucketize(torch.arange(n_tokens), stops, right=True)
    same_run = run[:, None] == run
    same_segment = (row[:, None] == row) & (batch.segments.view(-1)[:, None] == batch.segments.view(-1))
    assert torch.equal(same_run, same_segment)
    assert torch.equal(batch.positions.view(-1), torch.arange(n_tokens) - stops[run - 1])


def test_a_model_sees_packed_samples_as_if_alone() -> None:
    config = ModelConfig(32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=2, vocab_size=1000)
    model = Mistral(config)
    model.init_weights(seed=0)
    samples = some_samples(12)
    rows = epoch_rows(lengths_of(samples), T, seed=0, epoch=0)
    assert max(map(len, rows)) > 1

    def loss(rows: list[list[int]], trim: bool) -> float:
        batch = make_batch(samples, rows, T, trim)
        hidden = model.hidden(batch.tokens, batch.positions, batch.segments, runs=batch.runs)
        return float(cross_entropy_sum(hidden, model.lm_head.weight, batch.labels))

    with torch.no_grad():
        alone = sum(loss([[i]], trim=True) for i in range(12))
        torch.testing.assert_close(loss(rows, trim=False), alone, rtol=1e-5, atol=0)


def test_the_sampler_goes_on_across_epochs() -> None:
    lengths = lengths_of(some_samples(50))
    epochs = [row for epoch in range(3) for row in epoch_rows(lengths, T, 7, epoch)]
    sampler = RowSampler(lengths, T, seed=7)
    taken = [row for n in (1, 5, 3, 40, 2) for row in sampler.take(n)]
    assert taken == epochs[:51]


@pytest.mark.parametrize("n_before", [0, 1, 13, 40])
def test_the_sampler_resumes(n_before: int) -> None:
    lengths = lengths_of(some_samples(50))
    straight, resumed = RowSampler(lengths, T, seed=7), RowSampler(lengths, T, seed=7)
    straight.take(n_before)
    resumed.take(3)
    resumed.load_state_dict(straight.state_dict())
    assert resumed.take(60) == straight.take(60)
    assert resumed.state_dict() == straight.state_dict()


def test_the_sampler_resumes_at_the_end_of_an_epoch() -> None:
    lengths = lengths_of(some_samples(50))
    straight, resumed = RowSampler(lengths, T, seed=7), RowSampler(lengths, T, seed=7)
    straight.take(len(straight.rows))
    resumed.load_state_dict(straight.state_dict())
    assert resumed.take(2) == straight.take(2) == epoch_rows(lengths, T, 7, 1)[:2]


def test_a_state_of_other_data() -> None:
    sampler = RowSampler(lengths_of(some_samples(5)), T, seed=7)
    with pytest.raises(UserError, match="row 99 of epoch 1 does not exist"):
        sampler.load_state_dict({"epoch": 1, "row": 99})


def alpaca_lengths() -> list[int]:
    lengths: list[int] = json.loads(Path(__file__).with_name("alpaca_lengths.json").read_text())
    return lengths


@pytest.mark.parametrize("epoch", range(3))
def test_rows_of_alpaca_are_full(epoch: int) -> None:
    lengths = alpaca_lengths()
    rows = epoch_rows(lengths, 2048, seed=0, epoch=epoch, shuffle=True)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert sum(lengths) >= 0.99 * 2048 * len(rows)


def test_samples_that_fill_no_row_are_not_carried_on_for_ever() -> None:
    rows = epoch_rows([40] * (3 * WINDOW), T, seed=0, epoch=0)
    assert sorted(i for row in rows for i in row) == list(range(3 * WINDOW))
    assert {len(row) for row in rows} == {1}


def drawn(mix: Mix, lengths: list[int], epoch: int = 0) -> list[int]:
    return mix.draw(lengths, np.random.default_rng([0, epoch])).tolist()


def test_weights_are_shares_of_an_epochs_samples() -> None:
    mix, lengths = Mix((100, 60), (1.0, 3.0)), [5] * 160
    first, second = (Counter(drawn(mix, lengths, epoch)) for epoch in range(2))
    for epoch in (first, second):
        assert sum(epoch.values()) == 160
        assert sum(n for i, n in epoch.items() if i < 100) == 40
        assert {n for i, n in epoch.items() if i >= 100} == {2}, "120 of 60: two whole passes"
    assert first != second, "which of a thinned source's samples are seen is drawn anew"
    assert Counter(drawn(mix, lengths, 1)) == second


def test_replay_is_a_share_of_the_tokens() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 40, 700).tolist()
    for share in (0.05, 0.1, 0.5):
        taken = drawn(Mix((400, 100, 200), None, share), lengths)
        assert sorted(i for i in taken if i < 500) == list(range(500))
        replayed = sum(lengths[i] for i in taken if i >= 500)
        assert replayed / sum(lengths[i] for i in taken) == pytest.approx(share, abs=0.002)


def test_the_sampler_of_a_mix_resumes() -> None:
    lengths, mix = lengths_of(some_samples(50)), Mix((20, 20, 10), (2.0, 1.0), 0.2)
    straight, resumed = RowSampler(lengths, T, 7, mix=mix), RowSampler(lengths, T, 7, mix=mix)
    straight.take(33)
    resumed.load_state_dict(straight.state_dict())
    assert resumed.take(60) == straight.take(60)
