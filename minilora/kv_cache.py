"""A rolling buffer of keys and values: with a window of W tokens, what is older than W is never looked at again.

Position p lies in slot p mod S, where S is the smaller of W and the longest sequence. A worked example with W = 3 and
the tokens a b c d e:

    after a b c    slots [a b c]    positions [0 1 2]
    after d        slots [d b c]    positions [3 1 2]    d overwrote a, which neither d nor a later token sees
    after e        slots [d e c]    positions [3 4 2]

The slot of p was last written at p - S or an earlier position, or never. Where S is W, that is out of p's window; where
S is the longest sequence, it is below 0. So a single token is stored first, and then sees the slots as they lie.

The order of the slots does not matter: attention masks by the positions kept beside them, and keys are rotated before
they are stored. A prompt shorter than its batch is filled from the left with negative positions, which no one sees.
"""

import torch
from torch import Tensor

from minilora.config import ModelConfig

EMPTY = -(2**31)  # the position of a slot that nothing was written to


class KVCache:
    """Keys and values of every layer for B sequences, each (B, S, Hkv, Dh), and the positions (B, S) of the slots.

    Where windows differ by layer S does, too; layers with the same window share their positions.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = [n_slots(window, max_len) for window in config.windows] * (config.n_layers // len(config.windows))
        shapes = [(batch_size, n, config.n_kv_heads, config.head_dim) for n in slots]
        self.is_empty = True
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.positions = {
            window: torch.full((batch_size, n_slots(window, max_len)), EMPTY, device=device)
            for window in set(config.windows)
        }

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, Hkv, Dh); return what the tokens may see, at the positions of `seen`.

        A single token may see the slots, (B, S, Hkv, Dh). A longer chunk overwrites some that its own first tokens
        still see, so for it those of before, if there are any, are joined with its own, (B, S+T, Hkv, Dh).
        """
        keys, values = self.keys[layer], self.values[layer]
        size, seen = keys.shape[1], (keys, values)
        if k.shape[1] > 1:
            seen = (k, v) if self.is_empty else (torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1))
        slots = (positions[:, -size:] % size)[..., None, None].expand(-1, -1, *k.shape[2:])
        keys.scatter_(1, slots, k[:, -size:])
        values.scatter_(1, slots, v[:, -size:])
        return seen

    def seen(self, window: int | None, positions: Tensor) -> Tensor:
        """Of what `append` returns for tokens at positions (B, T), in a layer of that window: (B, S) or (B, [S+]T)."""
        held = self.positions[window]
        if positions.shape[1] == 1:
            return held.scatter(1, positions % held.shape[1], positions)
        return positions if self.is_empty else torch.cat([held, positions], dim=1)

    def advance(self, positions: Tensor) -> None:
        """Note the positions (B, T) of a chunk, once every layer has stored it."""
        self.is_empty = False
        for held in self.positions.values():
            last = positions[:, -held.shape[1] :]
            held.scatter_(1, last % held.shape[1], last)


def n_slots(window: int | None, max_len: int) -> int:
    """S: how many tokens a layer with that window keeps of sequences of at most `max_len`."""
    return min(window or max_len, max_len)
