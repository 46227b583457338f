"""Logits to their gradient and losses on a GPU, beside torch's cross entropy and a copy: `benchmarks.gpu` runs it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.gpu_harness import Call, in_turns, n_sets, report, run_part, sixteen_bits
from minilora.loss import IGNORE, whole_rows

COLUMNS = (32768, 131072)  # Mistral 7B's since v0.3, and Nemo's
DRY_COLUMNS = (77,)


def measure(device: torch.device) -> dict[str, Any]:
    """Cases by name: what `loss` has in work at a time."""
    from minilora.kernels.softmax_gradient import softmax_gradient_

    cases = {}
    for v in COLUMNS if device.type == "cuda" else DRY_COLUMNS:
        dtype = sixteen_bits(device)
        n = whole_rows(4096 if device.type == "cuda" else 3, v, dtype.itemsize)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(n, v, generator=generator).to(device, dtype)
        labels = torch.randint(v, (n,), generator=generator).to(device)
        sets, target = [logits.clone() for _ in range(n_sets(logits.nbytes, device))], torch.empty_like(logits)
        contestants: dict[str, list[Call]] = {
            # Again and again on what it wrote itself: gradients are numbers as good as any.
            "minilora": [partial(softmax_gradient_, z, labels, IGNORE) for z in sets],
            "torch": [partial(by_torch, z, labels) for z in sets],
            "copy": [partial(target.copy_, z) for z in sets],
        }
        what = f"softmax_gradient, {n} x {v}"
        moved = 2 * logits.nbytes + 12 * n
        cases[what] = report(what, in_turns(contestants, device), moved, peers=("torch",))
    return cases


def by_torch(logits: Tensor, labels: Tensor) -> Tensor | None:
    """The gradient as autograd makes it, in float32 and back."""
    z = logits.detach().requires_grad_()
    cross_entropy(z.float(), labels, ignore_index=IGNORE, reduction="sum").backward()
    return z.grad


if __name__ == "__main__":
    run_part("softmax_gradient")
