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
    """Keys and values of every layer for B sequences, each (B, S, Hkv, Dh), and the positions (B, S) of the slots."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.size = min(config.sliding_window or max_len, max_len)
        shape = (config.n_layers, batch_size, self.size, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.full((batch_size, self.size), EMPTY, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, Hkv, Dh); return those of before joined with them, (B, S+T, Hkv, Dh).

        What was there before is joined first: a chunk longer than the window overwrites slots that its own first
        tokens still see.
        """
        joined = torch.cat([self.keys[layer], k], dim=1), torch.cat([self.values[layer], v], dim=1)
        slots = (positions[:, -self.size :] % self.size)[..., None, None].expand(-1, -1, *k.shape[2:])
        self.keys[layer].scatter_(1, slots, k[:, -self.size :])
        self.values[layer].scatter_(1, slots, v[:, -self.size :])
        return joined

    def advance(self, positions: Tensor) -> None:
        """Note the positions (B, T) of a chunk, once every layer has stored it."""
        last = positions[:, -self.size :]
        self.positions.scatter_(1, last % self.size, last)
