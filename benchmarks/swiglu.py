"""SwiGLU on a GPU, forward and backward, beside plain torch and a copy of as many bytes: `benchmarks.gpu` runs it."""

from typing import Any

import torch

from benchmarks.gpu_harness import beside_a_copy, run_part, sixteen_bits
from minilora.swiglu import swiglu, swiglu_backward

SHAPES = ((2048, 4096), (2048, 14336))
DRY_SHAPES = ((4, 64),)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    cases, dtype = {}, sixteen_bits(device)
    for n, f in SHAPES if device.type == "cuda" else DRY_SHAPES:
        # Backward is in place, so what it makes is its input next time: below 1, else it would grow until it overflows.
        dh, gate, up = (torch.rand(n, f, device=device).sub_(0.5).to(dtype) for _ in range(3))
        for what, definition, given in (
            ("forward", swiglu, (gate, up)),
            ("backward", swiglu_backward, (dh, gate, up)),
        ):
            name = f"swiglu, {what}, {n} x {f}"
            cases[name] = beside_a_copy(name, definition, given, device)
    return cases


if __name__ == "__main__":
    run_part("swiglu")
