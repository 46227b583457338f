"""A rolling buffer of keys and values: with a window of W tokens, what is older than W is never looked at again.

Position p lies in slot p mod S, where S is the smaller of W and the longest sequence. A worked example with W = 3 and
the tokens a b c d e:

    after a b c    slots [a b c]    positions [0 1 2]
    after d        slots [d b c]    positions [3 1 2]    d overwrote a, which no later token sees
    after e        slots [d e c]    positions [3 4 2]

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
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.positions = {
            window: torch.full((batch_size, n_slots(window, max_len)), EMPTY, device=device)
            for window in set(config.windows)
        }

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, Hkv, Dh); return those of before joined with them, (B, S+T, Hkv, Dh).

        What was there before is joined first: a chunk longer than the window overwrites slots that its own first
        tokens still see.
        """
        joined = torch.cat([self.keys[layer], k], dim=1), torch.cat([self.values[layer], v], dim=1)
        size = self.keys[layer].shape[1]
        slots = (positions[:, -size:] % size)[..., None, None].expand(-1, -1, *k.shape[2:])
        self.keys[layer].scatter_(1, slots, k[:, -size:])
        self.values[layer].scatter_(1, slots, v[:, -size:])
        return joined

    def advance(self, positions: Tensor) -> None:
        """Note the positions (B, T) of a chunk, once every layer has stored it."""
        for held in self.positions.values():
            last = positions[:, -held.shape[1] :]
            held.scatter_(1, last % held.shape[1], last)


def n_slots(window: int | None, max_len: int) -> int:
    """S: how many tokens a layer with that window keeps of sequences of at most `max_len`."""
    return min(window or max_len, max_len)
