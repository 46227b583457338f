"""Dequantizing on a GPU beside bitsandbytes, plain torch and a copy of as many bytes: `benchmarks.gpu` runs it."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_harness import (
    Call,
    copies,
    dense_weight,
    in_turns,
    nf4_sets,
    peer_sets,
    report,
    run_part,
    sixteen_bits,
)

SHAPES = ((4096, 4096), (14336, 4096))
DRY_SHAPES = ((16, 128),)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name. share_of_copy: our bytes a second over those of `copy_`."""
    from minilora.kernels.nf4_dequantize import dequantize

    cases = {}
    for n, k in SHAPES if device.type == "cuda" else DRY_SHAPES:
        dense = dense_weight(n, k, device)
        out, dtype = torch.empty_like(dense), sixteen_bits(device)
        sets = nf4_sets(dense)
        moved = sets[0].nbytes + out.nbytes
        contestants: dict[str, list[Call]] = {
            "minilora": [partial(dequantize, w, out=out) for w in sets],
            "torch": [partial(w.dequantize, out=out) for w in sets],
            "copy": copies(moved, device),
        }
        if peers := peer_sets(dense, len(sets)):
            import bitsandbytes.functional as bnb

            contestants["bitsandbytes"] = [partial(bnb.dequantize_4bit, *p, out=out) for p in peers]
        timings = in_turns(contestants, device)
        what = f"dequantize, nested, {n} x {k} to {dtype}".replace("torch.", "")
        case = report(what, timings, moved, peers=("bitsandbytes",))
        case["share_of_copy"] = timings["copy"].median_us / timings["minilora"].median_us
        cases[what] = case
    return cases


if __name__ == "__main__":
    run_part("dequantize")
