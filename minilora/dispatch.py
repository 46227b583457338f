"""NF4's operations by the best way that a device has: the Triton kernels, or the definitions in plain torch.

A product x W'^T with few rows of x costs the reading of W, with many the multiplying. So there are three ways to it:

    matvec        one or two rows: each weight decoded where it is used
    matmul        some more: decoded within the loop, tensor cores
    dequantize    else, and always backward: into memory that is used again, then torch's own product

`TABLE` says up to which M each is taken, by the architecture of the GPU. `python -m benchmarks.calibrate` measures it;
where no GPU was to be had it is an estimate by counted instructions (`benchmarks/sass.py`), and says so.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minilora.backend import backend_for
from minilora.nf4 import BLOCK_SIZE, NF4Tensor
from minilora.nf4 import quantize_nf4 as quantize_by_definition

TABLE = Path(__file__).with_name("dispatch.json")
Way = Literal["matvec", "matmul", "dequantize"]


@dataclass(frozen=True)
class Limits:
    """Up to how many rows of x a way is taken, for weights of `least_weights` = N * K and more."""

    least_weights: int
    matvec: int
    matmul: int


@dataclass(frozen=True)
class Entry:
    """What holds for GPUs of architecture `arch` (90 is compute capability 9.0) and newer ones without an entry.

    card: on which it was measured; None is an estimate
    shuffle: look levels up by exchange between lanes, which a card must have shown to be right first
    limits: by rising `least_weights`, the first of them 0
    """

    arch: int
    card: str | None
    shuffle: bool
    limits: tuple[Limits, ...]

    def way(self, m: int, n: int, k: int) -> Way:
        """How M rows of x are multiplied by a weight (N, K)."""
        limits = [limits for limits in self.limits if n * k >= limits.least_weights][-1]
        return "matvec" if m <= limits.matvec else "matmul" if m <= limits.matmul else "dequantize"


@cache
def table() -> tuple[Entry, ...]:
    """The entries of dispatch.json, by rising architecture."""
    return tuple(_entry(entry) for entry in json.loads(TABLE.read_text("utf-8")))


def _entry(entry: Mapping[str, object]) -> Entry:
    limits = entry["limits"]
    assert isinstance(limits, list)
    return Entry(**{**entry, "limits": tuple(Limits(**row) for row in limits)})  # type: ignore[arg-type]


def entry_for(arch: int) -> Entry:
    """The entry of an architecture, or of the newest one before it."""
    return [entry for entry in table() if entry.arch <= arch][-1]


def quantize(weight: Tensor, block_size: int = BLOCK_SIZE, double_quant: bool = True) -> NF4Tensor:
    """`nf4.quantize_nf4` where the weight lies, to the same bytes."""
    if backend_for(weight.device).name != "triton":
        return quantize_by_definition(weight, block_size, double_quant)
    from minilora.kernels.nf4_quantize import quantize_nf4

    return quantize_nf4(weight, block_size, double_quant)


def decode(weight: NF4Tensor, start: int, stop: int, out: Tensor) -> None:
    """`weight.decode`, by the same bits. On a GPU, all of the weight: start and stop are 0 and n there."""
    if backend_for(out.device).name != "triton" or (start, stop) != (0, weight.n):
        weight.decode(start, stop, out)
        return
    from minilora.kernels.nf4_dequantize import dequantize

    dequantize(weight, out=out.view(weight.shape))


def fused_product(x: Tensor, weight: NF4Tensor) -> Tensor | None:
    """x (M, K) times the transpose of W' (N, K), (M, N) in x's dtype; None where `decode` and a product are better."""
    if backend_for(x.device).name != "triton":
        return None
    from minilora.kernels.nf4_matmul import matmul
    from minilora.kernels.nf4_matvec import architecture, matvec

    (m, k), n = x.shape, weight.shape[0]
    entry = entry_for(architecture(x.device))
    way = entry.way(m, n, k)
    if way == "dequantize" or m == 0 or k % weight.block_size or weight.packed.data_ptr() % 4:
        return None
    return (matvec if way == "matvec" else matmul)(x, weight, entry.shuffle and _may_shuffle(x.device))


@cache
def _may_shuffle(device: torch.device) -> bool:
    """Whether the device has the look-up by lane exchange right; if not, warns once that the plain one is taken."""
    from minilora.kernels.nf4_matvec import shuffle_is_right

    right = shuffle_is_right(device)
    if not right:
        warnings.warn(f"{device}: the look-up by lane exchange is wrong here; the plain one is taken", stacklevel=2)
    return right
