"""Who sees whom: token i sees token j iff 0 <= i - j < window, and both are of one segment.

i and j are positions. A segment is a sample of a packed row, and positions begin anew with each. Two samples in a row
of 8 tokens, under a window of 3:

    segment     0 0 0 0 0 1 1 1
    position    0 1 2 3 4 0 1 2

    query 0     x . . . . . . .     a line for each query, a column for each key; x: it is seen
          1     x x . . . . . .
          2     x x x . . . . .
          3     . x x x . . . .
          4     . . x x x . . .
          0     . . . . . x . .
          1     . . . . . x x .
          2     . . . . . x x x

Each sample here is a run: its tokens see only tokens of their own run, up to themselves. Attention is told of it in one
of three forms:

    `visible`   a mask, the whole picture: any positions, padding and keys of a cache among them
    `Runs`      where each run begins and the last one ends, 0 5 8, and the window: what FlashAttention on a GPU takes
    `Pieces`    the runs cut into blocks of queries, each with the keys that its queries see: what a CPU goes through
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES = 256  # of a piece: with more, more keys are masked away; with fewer, the products are small
SHORT = 64  # tokens of a run that is not worth a piece of its own
TOGETHER = 128  # tokens of short runs that share a piece, at most


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None, segments: Tensor | None = None) -> Tensor:
    """Which key each query sees: bool (B, 1, Tq, Tk), from positions (B, Tq), (B, Tk).

    segments: (B, T), of tokens that are both queries and keys
    Keys at negative positions are padding: nobody sees them but themselves (a row that saw nothing would be NaN).
    """
    i, j = q_positions[:, :, None], k_positions[:, None, :]
    mask = i == j  # and nothing else as large but what is compared: a byte a pair each
    mask |= j >= 0
    mask &= i >= j
    if window is not None:
        mask &= i - window < j
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    return mask[:, None]


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores where the mask is true, 0, and where it is not, -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


@dataclass(frozen=True)
class Runs:
    """Tokens, row after row, in runs: one sees those before it in its run, within `window`, and itself.

    stops: (K + 1,) int32, where each run begins, and the last one ends; runs may be empty
    longest: no run is longer; the host must know it, so that a GPU need not be waited for
    """

    stops: Tensor
    longest: int
    window: int | None = None

    @staticmethod
    def of_rows(n_rows: int, length: int, device: torch.device | str = "cpu") -> "Runs":
        """Each row is one run."""
        stops = torch.arange(0, n_rows * length + 1, length, dtype=torch.int32, device=device)
        return Runs(stops, length)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each run that is not empty. To read them a GPU is waited for."""
        return [n for n in self.stops.diff().tolist() if n]


@dataclass(frozen=True)
class Piece:
    """Queries start..stop, which see of the keys first..stop what the mask says, or all up to themselves.

    mask: (stop - start, stop - first) float32, 0 or -inf; None: start is first
    """

    start: int
    stop: int
    first: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class Pieces:
    """Tokens, row after row, in runs: one sees those before it in its run, within a window, and itself; on a CPU.

    rows: so many runs of the same length side by side, each in these pieces; else 1
    """

    rows: int
    pieces: tuple[Piece, ...]

    @staticmethod
    def of(runs: Sequence[int], window: int | None = None) -> "Pieces":
        """From the runs' lengths."""
        rows = len(runs) if len(set(runs)) == 1 else 1
        return Pieces(rows, tuple(_pieces(runs[: len(runs) // rows], window)))

    def parts(self, *tensors: Tensor) -> list[Tensor]:
        """Each (B, T, H, Dh) as (rows, H, n, Dh)."""
        return [x.reshape(self.rows, -1, *x.shape[2:]).transpose(1, 2) for x in tensors]

    @property
    def mask_bytes(self) -> int:
        """Of the masks; those of a window are views of one."""
        storages = [piece.mask.untyped_storage() for piece in self.pieces if piece.mask is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _pieces(runs: Sequence[int], window: int | None) -> Iterator[Piece]:
    """A run that the window holds is one piece, a longer one several; neighbours that are short share one."""
    begin, i, band = 0, 0, None
    while i < len(runs):
        end, n = begin + runs[i], 1
        while runs[i] <= SHORT and i + n < len(runs) and runs[i + n] <= SHORT and end + runs[i + n] - begin <= TOGETHER:
            end, n = end + runs[i + n], n + 1
        if n > 1:
            together = torch.tensor(runs[i : i + n])
            run = torch.repeat_interleave(torch.arange(n), together)[None]
            yield Piece(begin, end, begin, _of_one_row(*(torch.arange(end - begin)[None],) * 2, window, run))
        elif window is None or end - begin <= window:
            yield Piece(begin, end, begin)
        else:
            keys = torch.arange(window - 1 + QUERIES)[None]
            band = _of_one_row(keys[:, window - 1 :], keys, window) if band is None else band
            for start in range(begin, end, QUERIES):
                stop, earliest = min(start + QUERIES, end), start - window + 1
                first = max(begin, earliest)
                yield Piece(start, stop, first, band[: stop - start, first - earliest : stop - earliest])
        begin, i = end, i + n


def _of_one_row(q_positions: Tensor, k_positions: Tensor, window: int | None, run: Tensor | None = None) -> Tensor:
    """`visible` of one row, (Tq, Tk) float32, `as_added`."""
    return as_added(visible(q_positions, k_positions, window, run)[0, 0], torch.float32)


Sees = Tensor | Pieces | Runs
