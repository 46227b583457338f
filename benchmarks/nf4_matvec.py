"""y = W' x for one or two vectors on a GPU beside what else does it: `benchmarks.gpu` runs it.

bitsandbytes by `matmul_4bit`, which is its fused `gemm_4bit`; plain torch, which decodes and multiplies; and a dense
16-bit weight, four times the bytes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_harness import dense_weight, in_turns, nf4_sets, peer_sets, report, run_part
from minilora.nf4 import NF4Tensor

# (out, in) of Mistral 7B's layers, which are multiplied one by one: k and v, q and o, gate and up, down
SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
DRY_SHAPES = ((48, 128),)
ROWS = (1, 2)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    from minilora.kernels.nf4_matvec import matvec

    shapes = SHAPES if device.type == "cuda" else DRY_SHAPES
    return {name: case for n, k in shapes for name, case in products(matvec, "matvec", n, k, ROWS, device).items()}


def products(operation: Any, name: str, n: int, k: int, rows: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Cases by name of a kernel (x, weight, shuffle) -> y, for a weight (N, K) and so many rows of x.

    Ours looks levels up by exchange between lanes where the device has it right, else plainly, which is timed besides.
    """
    from minilora.kernels.nf4_matvec import shuffle_is_right

    dense, cases = dense_weight(n, k, device), {}
    sets = nf4_sets(dense)
    dense_sets = [dense.clone() for _ in range(min(4, len(sets)))]
    peers, scratch = peer_sets(dense, len(sets)), torch.empty_like(dense)
    for m in rows:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(device, dense.dtype)
        shuffle = device.type == "cuda" and shuffle_is_right(device)
        contestants = {
            "minilora": [partial(operation, x, w, shuffle) for w in sets],
            "dequantize, then torch": [partial(decoded_product, x, w, scratch) for w in sets],
            "dense": [partial(torch.nn.functional.linear, x, w) for w in dense_sets],
        }
        if shuffle:
            contestants["minilora, plain look-up"] = [partial(operation, x, w) for w in sets]
        if peers:
            import bitsandbytes as bnb

            contestants["bitsandbytes"] = [partial(bnb.matmul_4bit, x, p.t(), state) for p, state in peers]
        what = f"{name}, M = {m}, nested, {n} x {k}"
        moved = sets[0].nbytes + x.nbytes + m * n * x.element_size()
        others = ("bitsandbytes", "dequantize, then torch") if m > 16 else ("bitsandbytes",)
        cases[what] = report(what, in_turns(contestants, device), moved, 2.0 * m * n * k, others)
    return cases


def decoded_product(x: Tensor, weight: NF4Tensor, scratch: Tensor) -> Tensor:
    """x (M, K) -> (M, N) by decoding the weight into `scratch` (N, K) and torch's product."""
    from minilora.kernels.nf4_dequantize import dequantize

    return torch.nn.functional.linear(x, dequantize(weight, out=scratch))


if __name__ == "__main__":
    run_part("matvec")
