"""Memory for what is thrown away at once, kept and used again.

On a CPU new memory costs more than what is written into it, page by page, and blocks that come and go between others
that stay leave holes in the heap, which a process then holds for nothing. A GPU has torch's own cache for this.
"""

from threading import local

import torch
from torch import Tensor

_held = local()  # a thread's own: two threads may decode at the same time


def scratch(purpose: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) of memory with anything in it, the caller's until the same thread asks for the same purpose again."""
    if device.type != "cpu":
        return torch.empty(n, dtype=dtype, device=device)
    buffers: dict[str, Tensor] = _held.__dict__
    key = f"{purpose} {dtype}"
    if key not in buffers or len(buffers[key]) < n:
        with torch.inference_mode(False):  # else what generation made could not be written to in training
            buffers[key] = torch.empty(n, dtype=dtype, device=device)
    return buffers[key][:n]
