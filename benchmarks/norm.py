"""The norm on a GPU, forward and backward, beside plain torch and a copy of as many bytes: `benchmarks.gpu` runs it."""

from typing import Any

import torch

from benchmarks.gpu_harness import beside_a_copy, run_part, sixteen_bits
from minilora.norm import add_rms_norm, rms_norm, rms_norm_backward

SHAPES = ((2048, 4096), (2048, 14336))  # the second is as wide as the 7B's MLP: no norm is, but so wide rows may be
DRY_SHAPES = ((4, 64),)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    cases, dtype = {}, sixteen_bits(device)
    for n, d in SHAPES if device.type == "cuda" else DRY_SHAPES:
        x, y, residual_grad = (torch.randn(n, d, device=device).to(dtype) for _ in range(3))
        weight, inverse = torch.ones(d, device=device, dtype=dtype), torch.ones(n, 1, device=device)
        for what, definition, given in (
            ("forward", rms_norm, (x, weight, 1e-5, dtype)),
            ("forward after a sum", add_rms_norm, (x, y, weight, 1e-5, dtype)),
            ("backward and a sum", rms_norm_backward, (y, x, weight, inverse, residual_grad)),
        ):
            name = f"norm, {what}, {n} x {d}"
            cases[name] = beside_a_copy(name, definition, given, device)
    return cases


if __name__ == "__main__":
    run_part("norm")
