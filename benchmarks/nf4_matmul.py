"""y = x W'^T for 3 to 256 rows on a GPU beside what else does it: `benchmarks.gpu` runs it."""

from typing import Any

import torch

from benchmarks.gpu_harness import run_part
from benchmarks.nf4_matvec import DRY_SHAPES, SHAPES, products

ROWS = (3, 8, 16, 32, 64, 128, 256)
DRY_ROWS = (3, 17)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    from minilora.kernels.nf4_matmul import matmul

    on_gpu = device.type == "cuda"
    shapes, rows = (SHAPES, ROWS) if on_gpu else (DRY_SHAPES, DRY_ROWS)
    return {name: case for n, k in shapes for name, case in products(matmul, "matmul", n, k, rows, device).items()}


if __name__ == "__main__":
    run_part("matmul")
