"""How kernels are timed on a GPU: contestants in turns in one process, by events, with cold caches, medians.

    sleep on the GPU | start A end | start B end | ... | start A end | ...

The sleep lets the CPU get ahead, so that an interval between two events holds the kernel and no waiting for its launch.
Where the GPU comes to an interval before the CPU is through with launching it, that is not so: then the batch is halved
and measured again. A contestant that is overtaken even in a batch of one round, as its calls wait for the GPU or keep
the CPU busy for longer than the sleep, has `host_bound` in its figures and in its rows: they are no kernel's.

Each contestant has several sets of data, more than the L2 holds, and takes the next one each time: what it reads comes
from memory. A ratio is of medians, with the 20th and 80th percentile beside each.

Without a GPU the same runs on a CPU in Triton's interpreter, on small data, to see that all of it runs: no figure of it
means anything.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from inspect import unwrap
from statistics import median, quantiles
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from benchmarks.harness import row
from minilora.dispatch import launcher
from minilora.nf4 import NF4Tensor, quantize_nf4

Call = Callable[[], object]
T = TypeVar("T")

SLEEP_CYCLES = 40_000_000  # some 20 ms: the CPU launches a batch of rounds meanwhile
BATCH = 10  # rounds
CACHE_BYTES = 200 << 20  # four times the L2 of an H100


@dataclass(frozen=True)
class Timing:
    """Microseconds of each call. host_bound: some of them with waiting for a launch"""

    us: tuple[float, ...]
    host_bound: bool = False

    @property
    def median_us(self) -> float:
        return median(self.us)

    def figures(self) -> dict[str, float]:
        """For the JSON."""
        cuts = quantiles(self.us, n=5, method="inclusive") if len(self.us) > 1 else [self.us[0]] * 4
        figures = {"median_us": self.median_us, "p20_us": cuts[0], "p80_us": cuts[3], "n": len(self.us)}
        return figures | ({"host_bound": True} if self.host_bound else {})


def in_turns(contestants: Mapping[str, Sequence[Call]], device: torch.device, rounds: int = 60) -> dict[str, Timing]:
    """Time the contestants, each a call for every set of its data, after a warm-up of every call."""
    for calls in contestants.values():
        for call in calls:
            call()
    rounds = rounds if device.type == "cuda" else 2
    found: dict[str, list[float]] = {name: [] for name in contestants}
    done, size, host_bound = 0, BATCH, set[str]()
    while done < rounds:
        turns = range(done, min(done + size, rounds))
        batch, overtaken = _on_gpu(contestants, turns) if device.type == "cuda" else _on_cpu(contestants, turns)
        if overtaken and len(turns) > 1:
            size = len(turns) // 2
            continue
        for name, us in batch.items():
            found[name] += us
        done, host_bound = turns.stop, host_bound | overtaken
    return {name: Timing(tuple(us), name in host_bound) for name, us in found.items()}


def _on_gpu(contestants: Mapping[str, Sequence[Call]], turns: range) -> tuple[dict[str, list[float]], set[str]]:
    """(microseconds of each call, the names of those whose launching the GPU has overtaken)."""
    overtaken = set[str]()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contestants}
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    for turn in turns:
        for name, calls in contestants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[turn % len(calls)]()
            end.record()
            if start.query():  # the GPU is there, and may have waited
                overtaken.add(name)
            events[name].append((start, end))
    torch.cuda.synchronize()
    us = {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}
    return us, overtaken


def _on_cpu(contestants: Mapping[str, Sequence[Call]], turns: range) -> tuple[dict[str, list[float]], set[str]]:
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in turns:
        for name, calls in contestants.items():
            start = time.perf_counter()
            calls[turn % len(calls)]()
            found[name].append(1e6 * (time.perf_counter() - start))
    return found, set()


def matmul_tflop_per_s(device: torch.device) -> float:
    """What the card reaches in 16 bits: a square product by torch."""
    size = 8192 if device.type == "cuda" else 64
    a = torch.randn(size, size, device=device).to(sixteen_bits(device))
    timings = in_turns({"matmul": [partial(torch.mm, a, a)]}, device)
    return 2 * size**3 / timings["matmul"].median_us / 1e6


# -- data --------------------------------------------------------------------------------------------------------------


def dense_weight(n: int, k: int, device: torch.device) -> Tensor:
    """(N, K) as weights are distributed, in the 16-bit dtype of the device."""
    weight = torch.empty(n, k).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return weight.to(device, sixteen_bits(device))


def sixteen_bits(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it; the interpreter, too, has float16 only."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def n_sets(n_bytes: int, device: torch.device) -> int:
    """How many sets of so many bytes are needed for none to be in the cache when its turn comes."""
    return max(4, -(-CACHE_BYTES // n_bytes)) if device.type == "cuda" else 1


def nf4_sets(dense: Tensor, double_quant: bool = True) -> list[NF4Tensor]:
    """The same weight in NF4, in so many places."""
    weight = quantize_nf4(dense, double_quant=double_quant)
    copies = range(n_sets(weight.packed.nbytes, dense.device))
    return [replace(weight, packed=weight.packed.clone(), absmax=weight.absmax.clone()) for _ in copies]


def peer_sets(dense: Tensor, sets: int) -> list[tuple[Tensor, Any]]:
    """bitsandbytes' own (packed, state), as many; none where it cannot run."""

    def quantized() -> list[tuple[Tensor, Any]]:
        import bitsandbytes.functional as bnb

        return [bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True) for _ in range(sets)]

    return of_bitsandbytes(dense.device, quantized)


def of_bitsandbytes(device: torch.device, make: Callable[[], list[T]]) -> list[T]:
    """What `make` makes with it; nothing where it is not installed, or, which is told, cannot run."""
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        return []
    try:
        return make()
    except Exception as error:  # whatever a library may raise that was built for something else
        print(f"bitsandbytes is left out: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return []


def copies(n_bytes: int, device: torch.device) -> list[Call]:
    """Copies of as many bytes, read and written together, each from elsewhere."""
    sources = torch.empty(n_sets(n_bytes // 2, device), n_bytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(sources[0])
    return [partial(target.copy_, source) for source in sources]


# -- reports -----------------------------------------------------------------------------------------------------------


def report(
    what: str, timings: Mapping[str, Timing], n_bytes: float, flops: float = 0.0, peers: Sequence[str] = ()
) -> dict[str, Any]:
    """A case for the JSON; its "rows" compare ours with the fastest of `peers` that ran. Ours is "minilora".

    n_bytes, flops: the least that has to be moved and computed
    """
    ours = timings["minilora"].median_us
    case: dict[str, Any] = {
        "timings": {name: timing.figures() for name, timing in timings.items()},
        "bytes": n_bytes,
        "gb_per_s": n_bytes / ours / 1e3,
        "tflop_per_s": flops / ours / 1e6,
        "speed_ratio": {name: timing.median_us / ours for name, timing in timings.items() if name != "minilora"},
        "rows": [],
    }
    ran = [name for name in peers if name in timings]
    if ran:
        best = min(ran, key=lambda name: timings[name].median_us)
        peer_us = timings[best].median_us
        ratio = f"{peer_us / ours:.2f}" + ", host-bound" * (timings["minilora"].host_bound or timings[best].host_bound)
        case["rows"].append(row(what, f"{ours:.1f} us", f"{peer_us:.1f} us ({best})", ratio))
    return case


def beside_a_copy(what: str, definition: Callable[..., Any], given: Sequence[Any], device: torch.device) -> Any:
    """The case of an elementwise kernel beside its definition and a copy of as many bytes.

    share_of_copy: our bytes a second over those of `copy_`
    """
    kernel, plain = launcher(definition), unwrap(definition)
    made = kernel(*_cloned(given))
    results = [made] if isinstance(made, Tensor) else made
    moved = sum(tensor.nbytes for tensor in (*given, *results) if isinstance(tensor, Tensor))
    sets = [_cloned(given) for _ in range(n_sets(moved, device))]
    ours, torchs = ([partial(function, *one) for one in sets] for function in (kernel, plain))
    timings = in_turns({"minilora": ours, "torch": torchs, "copy": copies(moved, device)}, device)
    case = report(what, timings, moved, peers=("torch",))
    return case | {"share_of_copy": timings["copy"].median_us / timings["minilora"].median_us}


def _cloned(given: Sequence[Any]) -> list[Any]:
    return [thing.clone() if isinstance(thing, Tensor) else thing for thing in given]


def run_part(name: str) -> NoReturn:
    """What a part's module does as a command: `benchmarks.gpu` with that part alone, and exit."""
    from benchmarks.gpu import main

    sys.exit(main(["--only", name, *sys.argv[1:]]))
