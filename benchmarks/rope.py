"""The rotation on a GPU beside plain torch and a copy of as many bytes: `benchmarks.gpu` runs it."""

from typing import Any

import torch

from benchmarks.gpu_harness import beside_a_copy, run_part, sixteen_bits
from minilora.rope import rope_cos_sin, rotate

SHAPES = ((2048, 8, 128), (2048, 32, 128), (2048, 112, 128))  # the 7B's keys and queries; as wide as its MLP
DRY_SHAPES = ((4, 2, 16),)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    cases, dtype = {}, sixteen_bits(device)
    for n, heads, head_dim in SHAPES if device.type == "cuda" else DRY_SHAPES:
        x = torch.randn(n, heads, head_dim, device=device).to(dtype)
        [cos], [sin] = rope_cos_sin(torch.arange(n, device=device)[None], head_dim, 1e6, dtype)
        name = f"rope, {n} x {heads} heads of {head_dim}"
        cases[name] = beside_a_copy(name, rotate, (x, cos, sin), device)
    return cases


if __name__ == "__main__":
    run_part("rope")
