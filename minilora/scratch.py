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

_MOST_OF_HEAP = 1 << 25  # bytes of a block that comes from the heap; the most that glibc takes
_AHEAD = (1 << 31) - 1  # bytes that the heap grows by; the most that mallopt takes
_LARGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # Linux's

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


def keep_freed_memory(large_pages: bool = False, short: bool = False) -> None:
    """Let glibc keep what is freed for what is asked for next, as every step asks for the same again.

    Else a step's end gives its memory back and the next step is given new pages, which the system clears one by one: a
    fifth of the CPU time of a small model's step. The peak stays what it is. What the user has set by MALLOC_... rules.

    large_pages: as well; for where memory is plentiful, as the heap's holes stay in them
    short: memory is, so blocks of 2 MiB and more are given back at once. Then a process has little more than its
        tensors take, without the holes between them; clearing new pages costs a step time instead.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    wanted = [("TRIM_THRESHOLD", -1, -1), ("MMAP_THRESHOLD", -3, _LARGE_PAGE if short else _MOST_OF_HEAP)]
    wanted += [("TOP_PAD", -2, _AHEAD)] if large_pages else []
    free = [(name, key, value) for name, key, value in wanted if f"MALLOC_{name}_" not in os.environ]
    for _, key, value in free:
        libc.mallopt(key, value)
    if large_pages and len(free) == len(wanted):
        _ask_for_large_pages(libc)


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Let the heap grow ahead, which takes addresses and no memory, and what is new of it be mapped by 2 MiB at a time.

    A processor remembers where some thousand pages are, which is a few MiB of 4 KiB each, and a step goes through much
    more, so it finds them sooner. A system that has no such pages says no.
    """
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    libc.sbrk.argtypes, libc.malloc.argtypes = [ctypes.c_ssize_t], [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    before = libc.sbrk(0)
    libc.free(libc.malloc(_MOST_OF_HEAP // 2))  # grows the heap unless there is so much already
    first = -(-before // _LARGE_PAGE) * _LARGE_PAGE
    if (n := (libc.sbrk(0) - first) // _LARGE_PAGE * _LARGE_PAGE) > 0:
        libc.madvise(first, n, _MADV_HUGEPAGE)
