"""AdamW's update on a GPU, beside torch's fused one on the same flat memory and tensor by tensor; with moments in
8 bits beside bitsandbytes' on flat memory, which is its best: `benchmarks.gpu`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_harness import Call, in_turns, n_sets, of_bitsandbytes, report, run_part
from minilora.adamw import Update
from minilora.dynamic_8bit import dynamic_map

RANK, DIM, N_TENSORS = 16, 4096, 448  # about the adapters of a 7B: 448 matrices, 29 million numbers
DRY = (2, 128, 3)
LR = 1e-4


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name."""
    from minilora.kernels.adamw import adamw_, adamw_8bit_

    rank, dim, n_tensors = (RANK, DIM, N_TENSORS) if device.type == "cuda" else DRY
    n = rank * dim * n_tensors
    flat = [tuple(torch.randn(4, n, device=device).abs_()) for _ in range(n_sets(16 * n, device))]
    update = Update(LR, 0.9, 0.999, 1e-8, 0.0, 10, 0.5)
    contestants: dict[str, list[Call]] = {
        "minilora": [partial(adamw_, p, grad, m, v, update) for p, grad, m, v in flat],
        "torch, flat": [torch_adamw(parts[0].clone(), 1) for parts in flat],
        "torch": [torch_adamw(parts[0].clone(), n_tensors) for parts in flat],
    }
    what = f"adamw, {n_tensors} of {rank} x {dim}"
    cases = {what: report(what, in_turns(contestants, device), 28 * n, peers=("torch", "torch, flat"))}
    coded = [[*parts[:2], *codes_like(parts[0]), *torch.ones(2, n // 256, device=device)] for parts in flat]
    contestants = {
        "minilora": [partial(adamw_8bit_, p, grad, m, v, a, b, update) for p, grad, m, v, a, b in coded],
        "minilora, 32 bits": contestants["minilora"],
    }
    if peers := of_bitsandbytes(device, lambda: [bitsandbytes_adamw(parts) for parts in coded]):
        contestants["bitsandbytes"] = peers
    what = f"adamw_8bit, {n_tensors} of {rank} x {dim}"
    return cases | {what: report(what, in_turns(contestants, device), 16 * n, peers=("bitsandbytes",))}


def codes_like(p: Tensor) -> Tensor:
    """m's and v's, (2, n) uint8."""
    return torch.randint(256, (2, len(p)), dtype=torch.uint8, device=p.device)


def bitsandbytes_adamw(parts: list[Tensor]) -> Call:
    """An update of p, gradient, codes and absmax, made once to see that it can be."""
    import bitsandbytes.functional as bnb

    p, grad, m, v, *absmax = (part.clone() for part in parts)
    maps = dynamic_map(p.device), dynamic_map(p.device, signed=False)
    numbers = (0.9, 0.999, 0.0, 0.0, 1e-8, 10, LR)
    update = partial(bnb.optimizer_update_8bit_blockwise, "adam", grad, p, m, v, *numbers, *maps, *absmax, 0.0, 0.5)
    update()
    return update


def torch_adamw(flat: Tensor, n_tensors: int) -> Call:
    """A step of torch's fused AdamW, on gradients that do not change and as many tensors."""
    weights = [nn.Parameter(part) for part in flat.chunk(n_tensors)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True).step


if __name__ == "__main__":
    run_part("adamw")
