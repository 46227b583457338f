"""Quantizing on a GPU, absmax in 8 bits, beside bitsandbytes and plain torch: `benchmarks.gpu` runs it."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_harness import dense_weight, in_turns, n_sets, peer_sets, report, run_part
from minilora.nf4 import quantize_nf4 as definition

SHAPES = ((4096, 4096), (14336, 4096))
DRY_SHAPES = ((16, 128),)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    from minilora.kernels.nf4_quantize import quantize_nf4

    cases = {}
    for n, k in SHAPES if device.type == "cuda" else DRY_SHAPES:
        dense = dense_weight(n, k, device)
        sets = [dense.clone() for _ in range(n_sets(dense.nbytes, device))]
        contestants = {
            "minilora": [partial(quantize_nf4, w) for w in sets],
            "torch": [partial(definition, w) for w in sets],
        }
        if peer_sets(dense[:1], 1):
            import bitsandbytes.functional as bnb

            theirs = partial(bnb.quantize_4bit, quant_type="nf4", compress_statistics=True)
            contestants["bitsandbytes"] = [partial(theirs, w) for w in sets]
        what = f"quantize, nested, {n} x {k}"
        moved = dense.nbytes + definition(dense).nbytes
        cases[what] = report(what, in_turns(contestants, device), moved, peers=("bitsandbytes",))
    return cases


if __name__ == "__main__":
    run_part("quantize")
