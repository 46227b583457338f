"""AdamW's update on a GPU, beside torch's fused one on the same flat memory and tensor by tensor: `benchmarks.gpu`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_harness import Call, in_turns, n_sets, report

RANK, DIM, N_TENSORS = 16, 4096, 448  # about the adapters of a 7B: 448 matrices, 29 million numbers
DRY = (2, 8, 3)
LR = 1e-4


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    from minilora.kernels.adamw import adamw_

    rank, dim, n_tensors = (RANK, DIM, N_TENSORS) if device.type == "cuda" else DRY
    n = rank * dim * n_tensors
    flat = [tuple(torch.randn(4, n, device=device).abs_()) for _ in range(n_sets(16 * n, device))]
    settings: Any = (LR, 0.9, 0.999, 1e-8, 0.0, 10, 0.5)
    contestants: dict[str, list[Call]] = {
        "minilora": [partial(adamw_, *parts, *settings) for parts in flat],
        "torch, flat": [torch_adamw(parts[0].clone(), 1) for parts in flat],
        "torch": [torch_adamw(parts[0].clone(), n_tensors) for parts in flat],
    }
    what = f"adamw, {n_tensors} of {rank} x {dim}"
    return {what: report(what, in_turns(contestants, device), 28 * n, peers=("torch", "torch, flat"))}


def torch_adamw(flat: Tensor, n_tensors: int) -> Call:
    """A step of torch's fused AdamW, on gradients that do not change and as many tensors."""
    weights = [nn.Parameter(part) for part in flat.chunk(n_tensors)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True).step
