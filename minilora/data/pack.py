"""Samples packed into rows of one length: hardly any compute goes to padding, and no sample sees another.

    tokens t[0..n] of a sample -> inputs t[0..n-1], labels t[1..n] (IGNORE where t is no target)
    a row                      -> samples side by side; positions begin at 0, and segments count up, with each of them

Attention allows only equal segments, so a packed row gives what its samples give alone. What is left of a row is a
segment of its own, without labels.

Which samples share a row: best fit, long ones first, within windows of a shuffled order; the samples of a window's
emptiest rows are packed anew with the next one's. The order is a function of (seed, epoch) alone, so a run is resumed
from two numbers. So is, where sources have weights or other text is replayed, which samples an epoch takes (`Mix`).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilora.data.encode import Sample
from minilora.errors import UserError
from minilora.loss import IGNORE
from minilora.visible import Runs

WINDOW = 1024  # samples packed together: enough to fill rows, few enough that every epoch mixes them anew


@dataclass(frozen=True)
class PackedBatch:
    """tokens, labels, positions (B, T) int64, segments (B, T) int32; labels are IGNORE where nothing is predicted.

    runs: what segments and positions say, once more, as attention takes it
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    runs: Runs

    @property
    def n_targets(self) -> int:
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "PackedBatch":
        tokens, labels = self.tokens.to(device), self.labels.to(device)
        positions, segments = self.positions.to(device), self.segments.to(device)
        runs = replace(self.runs, stops=self.runs.stops.to(device))
        return PackedBatch(tokens, labels, positions, segments, runs)


@dataclass(frozen=True)
class Mix:
    """Which samples an epoch takes, where that is not each of them once.

    sizes: how many samples each source has; they follow one another
    weights: of the sources. One of weight w gives the share w / sum of an epoch, a sample at least. An epoch has as
        many samples as there are, but for rounding; what a source gives beyond whole passes is drawn anew each epoch.
        None: each sample once
    replay: share of an epoch's tokens that the last source gives, which has no weight; 0: there is no such source
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    replay: float = 0.0

    def draw(self, lengths: Sequence[int], random: np.random.Generator) -> NDArray[np.int64]:
        """Indices of the epoch's samples, source by source."""
        costs = np.asarray(lengths)
        groups = np.split(np.arange(len(costs)), np.cumsum(self.sizes)[:-1])
        learnt = groups[:-1] if self.replay else groups
        shares = self.weights or [len(group) for group in learnt]
        n_samples, ones = sum(map(len, learnt)), np.ones_like(costs)
        drawn = [
            _take(group, ones, max(1, round(n_samples * share / sum(shares))), random)
            for group, share in zip(learnt, shares, strict=True)
        ]
        if self.replay:
            n_tokens = sum(int(costs[group].sum()) for group in drawn)
            drawn.append(_take(groups[-1], costs, n_tokens * self.replay / (1 - self.replay), random))
        return np.concatenate(drawn)


def _take(group: NDArray[Any], costs: NDArray[Any], amount: float, random: np.random.Generator) -> NDArray[np.int64]:
    """Samples of the group, in whole passes and a part of one, until their costs come closest to the amount."""
    passes = ceil(amount / int(costs[group].sum()))
    order: NDArray[np.int64] = np.concatenate([random.permutation(group) for _ in range(passes)])
    return order[: int(np.abs(np.cumsum(costs[order]) - amount).argmin()) + 1]


def epoch_rows(
    lengths: Sequence[int], max_seq_len: int, seed: int, epoch: int, shuffle: bool = True, mix: Mix | None = None
) -> list[list[int]]:
    """Rows of sample indices, each sample once unless `mix` says otherwise, at most max_seq_len positions in a row.

    lengths: the `Sample.length` of each sample, none above max_seq_len
    shuffle: False packs the samples as they come, the same in every epoch
    """
    if max(lengths) > max_seq_len:
        raise ValueError(f"a sample of {max(lengths)} positions does not fit rows of {max_seq_len}")
    random = np.random.default_rng([seed, epoch])
    taken = np.arange(len(lengths)) if mix is None else mix.draw(lengths, random)
    order = (random.permutation(taken) if shuffle else taken).tolist()
    done, rows = list[list[int]](), list[list[int]]()
    for start in range(0, len(order), WINDOW):
        window = [i for row in rows for i in row] + order[start : start + WINDOW]
        rows = sorted(_best_fit(window, lengths, max_seq_len), key=lambda row: sum(lengths[i] for i in row))
        emptiest = np.searchsorted(np.cumsum([len(row) for row in rows]), WINDOW // 4)
        done, rows = done + rows[emptiest:], rows[:emptiest]
    done += rows
    return [done[i] for i in random.permutation(len(done))] if shuffle else done


def _best_fit(samples: list[int], lengths: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Each sample, long ones first, goes to the fullest row that still has space for it."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (positions left, row), sorted
    for i in sorted(samples, key=lambda i: -lengths[i]):
        fit = bisect_left(spaces, (lengths[i], -1))
        space, row = spaces.pop(fit) if fit < len(spaces) else (max_seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(spaces, (space - lengths[i], row))
    return rows


def make_batch(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], max_seq_len: int, trim: bool = False
) -> PackedBatch:
    """One batch row for each row of sample indices; T is max_seq_len or, with trim, what the longest row takes."""
    taken = max(sum(samples[i].length for i in row) for row in rows)
    shape = (len(rows), taken if trim else max_seq_len)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, segments = np.full(shape, IGNORE, np.int64), np.zeros(shape, np.int32)
    lengths = [0]
    for b, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row):
            sample = samples[i]
            here = (b, slice(start, start + sample.length))
            tokens[here] = sample.tokens[:-1]
            labels[here] = np.where(sample.target_mask[1:], sample.tokens[1:], IGNORE)
            positions[here] = np.arange(sample.length)
            segments[here] = segment
            start += sample.length
            lengths.append(sample.length)
        positions[b, start:] = np.arange(shape[1] - start)
        segments[b, start:] = len(row)
        lengths.append(shape[1] - start)
    runs = Runs(torch.from_numpy(np.cumsum(lengths, dtype=np.int32)), max(lengths))
    t, n, p, s = map(torch.from_numpy, (tokens, labels, positions, segments))
    return PackedBatch(t, n, p, s, runs)


def batches(
    samples: Sequence[Sample], max_seq_len: int, batch_size: int, device: torch.device | str
) -> Iterator[PackedBatch]:
    """All samples, once and as they come, in batches of batch_size rows that are as short as they can be: what is
    measured on."""
    rows = epoch_rows([s.length for s in samples], max_seq_len, seed=0, epoch=0, shuffle=False)
    for start in range(0, len(rows), batch_size):
        yield make_batch(samples, rows[start : start + batch_size], max_seq_len, trim=True).to(device)


class RowSampler:
    """Hands out rows, epoch after epoch; its state is the epoch and the number of its rows already handed out."""

    def __init__(self, lengths: Sequence[int], max_seq_len: int, seed: int, mix: Mix | None = None) -> None:
        self._rows_of = partial(epoch_rows, lengths, max_seq_len, seed, mix=mix)
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.row, self.rows = epoch, 0, self._rows_of(epoch)

    def take(self, n: int) -> list[list[int]]:
        """The next n rows; where an epoch ends, the next begins."""
        taken: list[list[int]] = []
        while len(taken) < n:
            if self.row == len(self.rows):
                self._begin(self.epoch + 1)
            new = self.rows[self.row : self.row + n - len(taken)]
            self.row += len(new)
            taken += new
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "row": self.row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken. Raises UserError if that place is not in this data."""
        self._begin(state["epoch"])
        self.row = state["row"]
        if not 0 <= self.row <= len(self.rows):
            raise UserError(f"row {self.row} of epoch {self.epoch} does not exist: the data are not those of the run")
