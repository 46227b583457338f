"""AdamW (https://arxiv.org/abs/1711.05101) over flat memory: all that learns, its gradient and moments, a piece each.

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p - lr (decay p + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))

torch.optim.AdamW's update. There each of several hundred tensors is a piece of its own; here a parameter and its
gradient are views of flat memory, into which autograd adds, so that on a GPU zeroing, norm and update are a launch
each, and what clipping multiplies the gradient by is applied on the way (kernels/adamw.py). A gradient is never None:
what backward has not reached is zeros.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt

import torch
from torch import Tensor, nn

from minilora.backend import backend_for

ALIGNED = 16  # numbers at which a parameter begins: 64 bytes
PIECE = 1 << 16  # numbers that a CPU updates at a time: the passes over them stay in its cache

Piece = tuple[Tensor, Tensor, Tensor, Tensor]  # parameters, gradients, m, v, each (n,)


@torch.no_grad()
def adamw_(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """One update, the `step`-th, of p, m and v in place, by the gradient times `grad_scale`; all (n,) float32."""
    g = grad if grad_scale == 1 else grad * grad_scale
    root = sqrt(1 - beta2**step)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, v.sqrt().add_(eps * root), value=-lr * root / (1 - beta1**step))


class FlatAdamW:
    """AdamW for parameters whose memory it takes over: p.data and p.grad become views, which must stay.

    state: the moments by parameter, views too, under torch's names; steps: updates so far
    """

    def __init__(
        self,
        groups: Mapping[tuple[float, float], Sequence[nn.Parameter]],
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        """groups: parameters by weight decay and what they multiply the learning rate by

        Raises ValueError where a group is empty, on several devices or not in float32.
        """
        self.beta1, self.beta2, self.eps, self.steps = beta1, beta2, eps, 0
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._flat: list[tuple[Tensor, Sequence[nn.Parameter]]] = []
        self._pieces = [(*key, piece) for key, parameters in groups.items() for piece in self._flatten(parameters)]

    def _flatten(self, parameters: Sequence[nn.Parameter]) -> list[Piece]:
        """Memory that the parameters and their state are views of, in pieces."""
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1 or next(iter(kinds))[0] != torch.float32:
            raise ValueError(f"what learns together must be float32 on one device, not {kinds or 'nothing'}")
        [(_, device)] = kinds
        sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters]
        weights = torch.zeros(sum(sizes), device=device)
        for p, part in zip(parameters, weights.split(sizes), strict=True):
            p.data = part[: p.numel()].view(p.shape).copy_(p.data)  # what it lay in is given back, one by one
        grad, m, v = (torch.zeros_like(weights) for _ in range(3))
        for p, *parts in zip(parameters, grad.split(sizes), m.split(sizes), v.split(sizes), strict=True):
            p.grad, exp_avg, exp_avg_sq = (part[: p.numel()].view(p.shape) for part in parts)
            self.state[p] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        self._flat.append((weights, parameters))
        n = PIECE if device.type == "cpu" else sum(sizes)
        return list(zip(weights.split(n), grad.split(n), m.split(n), v.split(n), strict=True))

    @contextmanager
    def casts(self, dtype: torch.dtype) -> Iterator[None]:
        """While entered, each parameter has a copy in `dtype`, `p.cast`, of what it was then: all by one launch."""
        made = [(flat.to(dtype), parameters) for flat, parameters in self._flat if dtype != torch.float32]
        for flat, parameters in made:
            for p in parameters:
                p.cast = flat[(at := p.storage_offset()) : at + p.numel()].view(p.shape)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for _, parameters in made:
                for p in parameters:
                    del p.cast  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        """In place: the gradients stay views."""
        for *_, (_, grad, _, _) in self._pieces:
            grad.zero_()

    def grad_norm(self) -> Tensor:
        """The length of the whole gradient, () float32 on its device; nobody waits for it here."""
        lengths = [torch.linalg.vector_norm(grad) for *_, (_, grad, _, _) in self._pieces]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(lengths))
        return whole

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update by the gradient times `grad_scale`, which is left as it is."""
        self.steps += 1
        for weight_decay, lr_ratio, piece in self._pieces:
            update = _kernel() if backend_for(piece[0].device).name == "triton" else adamw_
            update(*piece, lr * lr_ratio, self.beta1, self.beta2, self.eps, weight_decay, self.steps, grad_scale)


def _kernel() -> Callable[..., None]:
    from minilora.kernels import adamw

    return adamw.adamw_
