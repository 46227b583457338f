"""Memory for what is thrown away at once, kept and used again.

On a CPU new memory costs more than what is written into it, page by page, and blocks that come and go between others
that stay leave holes in the heap, which a process then holds for nothing. A GPU has torch's own cache for this.
"""

import ctypes
import os
import sys
from threading import local

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names in mallopt(3)

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


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is asked for next, as every step asks for the same again.

    Else a step's end gives its memory back and the next step is given new pages, which the system clears one by one: a
    fifth of the CPU time of a small model's step. The peak stays what it is. What the user has set by MALLOC_... rules.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, parameter, value in (("TRIM", _TRIM_THRESHOLD, -1), ("MMAP", _MMAP_THRESHOLD, 1 << 25)):  # the most
            if f"MALLOC_{name}_THRESHOLD_" not in os.environ:
                libc.mallopt(parameter, value)
