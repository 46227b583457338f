"""NF4's operations by the best way that a device has: the Triton kernels, or the definitions in plain torch.

A product x W'^T with few rows of x costs the reading of W, with many the multiplying. So there are three ways to it:

    matvec        one or two rows: each weight decoded where it is used
    matmul        some more: decoded within the loop, tensor cores; in float32, which has none, up to 32 rows
    dequantize    else, and always backward: into memory that is used again, then torch's own product

`TABLE` says up to which M each is taken, by the architecture of the GPU. `python -m benchmarks.calibrate` measures it;
where no GPU was to be had it is an estimate by counted instructions (`benchmarks/sass.py`), and says so.

What goes over its numbers once or twice (`norm`, `rope`, `swiglu`, `softmax_gradient`, `adamw`) has one way on a GPU,
the kernel of its name: `kernel_on_gpu`. Of what the plain block and the fast one both have, this runs:

    the fast block                                    what has `kernel_on_gpu`: its kernel on a GPU, else its own text
    the plain block, on a CPU or differentiated       its own text, in steps that autograd sees into
    the plain block, on a GPU and undifferentiated    fewer launches: the branch `if undifferentiated_on_gpu`, with
                                                      which the plain text of each (and of `LoRALinear`) begins
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from minilora.backend import has_kernels
from minilora.errors import UserError
from minilora.nf4 import BLOCK_SIZE, NF4Tensor
from minilora.nf4 import quantize_nf4 as quantize_by_definition

TABLE = Path(__file__).with_name("dispatch.json")
OLDEST = 75
MAX_BYTES = 1_000_000
MOST_VECTORS, MOST_ROWS = 2, 256  # of matvec and matmul: what the launchers take
FLOAT32_ROWS = 32  # one tile of `nf4_matmul`, estimated; with two, each weight is decoded twice
Way = Literal["matvec", "matmul", "dequantize"]
P = ParamSpec("P")
R = TypeVar("R")


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

    def way(self, m: int, n: int, k: int, dtype: torch.dtype) -> Way:
        """How M rows of x in `dtype` are multiplied by a weight (N, K)."""
        limits = [limits for limits in self.limits if n * k >= limits.least_weights][-1]
        matmul = min(limits.matmul, FLOAT32_ROWS) if dtype == torch.float32 else limits.matmul
        return "matvec" if m <= limits.matvec else "matmul" if m <= matmul else "dequantize"


@cache
def table() -> tuple[Entry, ...]:
    """The entries of dispatch.json, by rising architecture. Raises UserError where the file is damaged."""
    try:
        with TABLE.open("rb") as file:
            entries = sorted((_entry(**found) for found in json.loads(file.read(MAX_BYTES))), key=lambda e: e.arch)
        if entries[0].arch > OLDEST:
            raise ValueError(f"there is no entry for arch {OLDEST}")
    except (OSError, RecursionError, LookupError, TypeError, ValueError) as error:
        remedy = "install minilora again, then measure this GPU with python -m benchmarks.calibrate"
        raise UserError(f"{TABLE} is damaged: {error}; {remedy}") from None
    return tuple(entries)


def _entry(arch: int, card: str | None, shuffle: bool, limits: list[dict[str, int]]) -> Entry:
    """From the keys of an object in dispatch.json. Raises TypeError, LookupError or ValueError if they are no entry."""
    rows = tuple(Limits(**row) for row in limits)
    numbers = (arch, *(n for row in rows for n in astuple(row)))
    typed = all(type(n) is int for n in numbers) and isinstance(shuffle, bool) and isinstance(card, str | None)
    fits = typed and all(0 <= row.matvec <= MOST_VECTORS and 0 <= row.matmul <= MOST_ROWS for row in rows)
    floors = [row.least_weights for row in rows]
    if not fits or floors[0] != 0 or floors != sorted({*floors}):
        raise ValueError(f"the entry of arch {arch} is not as it was written")
    return Entry(arch, card, shuffle, rows)


def entry_for(arch: int) -> Entry:
    """The entry of an architecture, or of the newest one before it; of one that is older than all, the oldest."""
    return [entry for entry in table() if entry.arch <= max(arch, OLDEST)][-1]


def quantize(weight: Tensor, block_size: int = BLOCK_SIZE, double_quant: bool = True) -> NF4Tensor:
    """`nf4.quantize_nf4` where the weight lies, to the same bytes."""
    if not has_kernels(weight.device):
        return quantize_by_definition(weight, block_size, double_quant)
    from minilora.kernels.nf4_quantize import quantize_nf4

    return quantize_nf4(weight, block_size, double_quant)


def decode(weight: NF4Tensor, start: int, stop: int, out: Tensor, columns: Tensor | None = None) -> None:
    """`weight.decode`, by the same bits. On a GPU, all of the weight: start and stop are 0 and n there.

    columns: (rows, r) to follow the rows of all of the weight; `out` is (rows, in + r) then, else anything in order
    """
    if has_kernels(out.device) and (start, stop) == (0, weight.n):
        from minilora.kernels.nf4_dequantize import dequantize

        dequantize(weight, out=out.view(weight.shape) if columns is None else out, columns=columns)
    elif columns is None:
        weight.decode(start, stop, out.view(-1))
    else:
        out.copy_(torch.cat([weight.dequantize(out.dtype), columns.to(out.dtype)], dim=1))


def fused_product(x: Tensor, weight: NF4Tensor) -> Tensor | None:
    """x (M, K) times the transpose of W' (N, K), (M, N) in x's dtype; None where `decode` and a product are better."""
    if not has_kernels(x.device):
        return None
    from minilora.kernels.nf4_dequantize import is_whole
    from minilora.kernels.nf4_matmul import is_exact, matmul
    from minilora.kernels.nf4_matvec import DTYPES, architecture, matvec

    (m, k), n = x.shape, weight.shape[0]
    arch = architecture(x.device)
    entry = entry_for(arch)
    way = entry.way(m, n, k, x.dtype)
    fits = x.dtype in DTYPES and m > 0 and k % weight.block_size == 0 and is_whole(weight.packed)
    if way == "dequantize" or not fits or (way == "matmul" and not is_exact(x.dtype, arch)):
        return None
    shuffle = entry.shuffle and x.device.type == "cuda" and _may_shuffle(x.device)  # the interpreter knows no PTX
    return (matvec if way == "matvec" else matmul)(x, weight, shuffle)


@cache
def _may_shuffle(device: torch.device) -> bool:
    """Whether the device has the look-up by lane exchange right; if not, warns once that the plain one is taken."""
    from minilora.kernels.nf4_matvec import shuffle_is_right

    right = shuffle_is_right(device)
    if not right:
        warnings.warn(f"{device}: the look-up by lane exchange is wrong here; the plain one is taken", stacklevel=2)
    return right


def kernel_on_gpu(definition: Callable[P, R]) -> Callable[P, R]:
    """`definition`, a function whose first argument is a tensor; on a GPU its kernel takes its place."""

    @wraps(definition)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return (launcher(definition) if has_kernels(first.device) else definition)(*args, **kwargs)

    return chosen


def undifferentiated_on_gpu(x: Tensor) -> bool:
    """Whether kernels, which autograd does not see into, may take the place of what torch would do to x in steps."""
    return not torch.is_grad_enabled() and x.itemsize <= 4 and has_kernels(x.device)


def launcher(definition: Callable[P, R]) -> Callable[P, R]:
    """Of the kernel that does what `definition` does: by the same name, in the module of minilora/kernels so called."""
    module = import_module("minilora.kernels." + definition.__module__.rpartition(".")[2])
    found: Callable[P, R] = getattr(module, definition.__name__)
    return found
