"""AdamW (https://arxiv.org/abs/1711.05101) over flat memory: all that learns, its gradient and moments, a piece each.

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = p - lr (decay p + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))

torch.optim.AdamW's update. There each of several hundred tensors is a piece of its own; here a parameter and its
gradient are views of flat memory, into which autograd adds, so that on a GPU zeroing, norm and update are a launch
each, and what clipping multiplies the gradient by is applied on the way (kernels/adamw.py). A gradient is never None:
what backward has not reached is zeros.

The moments may be kept in 8 bits (https://arxiv.org/abs/2110.02861), coded in blocks of 256 on the dynamic map
(dynamic_8bit.py), for m with a sign, for v without:

    m[i] = MAP[m_code[i]] m_absmax[i // 256]            v[i] = UNSIGNED_MAP[v_code[i]] v_absmax[i // 256]

What differs from bitsandbytes: blocks never run from one parameter into the next, and small ones are in 8 bits too; a v
above zero keeps the lowest level above zero, where bitsandbytes rounds below half of that to zero, and the next update
divides by nothing but eps. And they may lie in the host's memory (paging.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.config import Optimizer
from minilora.dispatch import kernel_on_gpu
from minilora.dynamic_8bit import DYNAMIC_BLOCK_SIZE, decode_dynamic, encode_dynamic
from minilora.paging import Lane

ALIGNED = 16  # numbers at which a parameter begins: 64 bytes
PIECE = 1 << 16  # numbers that a CPU updates at a time: the passes over them stay in its cache
PAGE = 1 << 22  # numbers whose state is on a GPU at a time where it is paged: long enough for a link's full rate
CODE_OF_ZERO = 127  # on the map with a sign
# What is kept of the moments, under torch's names: dtype, and how many numbers share an entry.
STATE: dict[Optimizer, dict[str, tuple[torch.dtype, int]]] = {
    "adamw": {"exp_avg": (torch.float32, 1), "exp_avg_sq": (torch.float32, 1)},
    "adamw_8bit": {
        "exp_avg": (torch.uint8, 1),
        "exp_avg_sq": (torch.uint8, 1),
        "exp_avg_absmax": (torch.float32, DYNAMIC_BLOCK_SIZE),
        "exp_avg_sq_absmax": (torch.float32, DYNAMIC_BLOCK_SIZE),
    },
}
State = tuple[Tensor, ...]
Piece = tuple[Tensor, Tensor, State]  # parameters and gradients, each (n,), and their state


def state_bytes(kind: Optimizer, n: int, pinned: bool = False) -> int:
    """Of n numbers' moments; of several parameters it may be an entry more each.

    pinned: of the host, of which torch takes a power of two for each tensor
    """
    each = (-(-n // shared) * dtype.itemsize for dtype, shared in STATE[kind].values())
    return sum(1 << (size - 1).bit_length() if pinned else size for size in each)


class Update(NamedTuple):
    """The numbers of one update: the `step`-th, counted from 1, by the gradient times `grad_scale`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float


@kernel_on_gpu
@torch.no_grad()
def adamw_(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, update: Update) -> None:
    """Update p, m and v in place; all (n,) float32."""
    lr, beta1, beta2, eps, weight_decay, step, grad_scale = update
    g = grad if grad_scale == 1 else grad * grad_scale
    root = sqrt(1 - beta2**step)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, v.sqrt().add_(eps * root), value=-lr * root / (1 - beta1**step))


@kernel_on_gpu
@torch.no_grad()
def adamw_8bit_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, m_absmax: Tensor, v_absmax: Tensor, update: Update
) -> None:
    """`adamw_` of moments in 8 bits, all in place: m and v (n,) uint8 codes, their absmax (n / 256,) float32.

    n: a multiple of 256. Where an absmax is 0, its block is zeros whatever the codes are.
    """
    kept = ((m, m_absmax, True), (v, v_absmax, False))
    m32, v32 = (decode_dynamic(*moment) for moment in kept)
    adamw_(p, grad, m32, v32, update)
    for (codes, absmax, signed), moment in zip(kept, (m32, v32), strict=True):
        new_codes, new_absmax = encode_dynamic(moment, signed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)


class FlatAdamW:
    """AdamW for parameters whose memory it takes over: p.data and p.grad become views, which must stay.

    state: the moments by parameter, views too, under the names that `STATE` has; steps: updates so far
    """

    def __init__(
        self,
        groups: Mapping[tuple[float, float], Sequence[nn.Parameter]],
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        kind: Optimizer = "adamw",
        paged: bool = False,
    ) -> None:
        """Take the parameters' memory over; their moments are zeros.

        groups: parameters by weight decay and what they multiply the learning rate by
        paged: keep the state in the host's memory; the updates are the same

        Raises ValueError where a group is empty, on several devices or not in float32.
        """
        self.beta1, self.beta2, self.eps, self.kind, self.paged, self.steps = beta1, beta2, eps, kind, paged, 0
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._stored = STATE[kind]
        self._flat: list[tuple[Tensor, Sequence[nn.Parameter]]] = []
        self._gradients: list[Tensor] = []
        self._casts: dict[torch.dtype, list[Tensor]] = {}
        self._pieces = [(*key, piece) for key, parameters in groups.items() for piece in self._flatten(parameters)]
        parts = [(PAGE // shared, dtype) for dtype, shared in self._stored.values()]
        self._lanes = [Lane(parts, self._gradients[0].device) for _ in range(2)] if paged else []

    def _flatten(self, parameters: Sequence[nn.Parameter]) -> list[Piece]:
        """Memory that the parameters and their state are views of, in pieces."""
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1 or next(iter(kinds))[0] != torch.float32:
            raise ValueError(f"what learns together must be float32 on one device, not {kinds or 'nothing'}")
        [(_, device)] = kinds
        aligned = max(ALIGNED, *(shared for _, shared in self._stored.values()))
        sizes = [-(-p.numel() // aligned) * aligned for p in parameters]
        weights = torch.zeros(sum(sizes), device=device)
        for p, part in zip(parameters, weights.split(sizes), strict=True):
            p.data = part[: p.numel()].view(p.shape).copy_(p.data)  # what it lay in is given back, one by one
        grad = torch.zeros_like(weights)
        for p, part in zip(parameters, grad.split(sizes), strict=True):
            p.grad, self.state[p] = part[: p.numel()].view(p.shape), {}
        at_once = PIECE if device.type == "cpu" else len(grad)
        self._flat.append((weights, parameters))
        self._gradients += grad.split(at_once)
        n, flats = PAGE if self.paged else at_once, self._zeros(len(grad), device)
        for name, (_, shared) in self._stored.items():
            for p, part in zip(parameters, flats[name].split([size // shared for size in sizes]), strict=True):
                self.state[p][name] = part if shared > 1 else part[: p.numel()].view(p.shape)
        state = [flats[name].split(n // shared) for name, (_, shared) in self._stored.items()]
        return list(zip(weights.split(n), grad.split(n), zip(*state, strict=True), strict=True))

    def _zeros(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """The state of n numbers that have no moments yet. m's codes say so too: those between two parameters stay."""
        where = {"device": "cpu", "pin_memory": device.type == "cuda"} if self.paged else {"device": device}
        flats = {name: torch.zeros(n // shared, dtype=dtype, **where) for name, (dtype, shared) in self._stored.items()}
        if self.kind == "adamw_8bit":
            flats["exp_avg"].fill_(CODE_OF_ZERO)
        return flats

    @contextmanager
    def casts(self, dtype: torch.dtype) -> Iterator[None]:
        """While entered, each parameter has a copy in `dtype` of what it was then, `p.kept_cast`, which `lora.cast_of`
        reads: all by one launch, into memory that stays."""
        if dtype == torch.float32:
            yield
            return
        if dtype not in self._casts:
            self._casts[dtype] = [torch.empty_like(flat, dtype=dtype) for flat, _ in self._flat]
        for cast, (flat, parameters) in zip(self._casts[dtype], self._flat, strict=True):
            cast.copy_(flat)
            for p in parameters:
                p.kept_cast = cast[(at := p.storage_offset()) : at + p.numel()].view(p.shape)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for _, parameters in self._flat:
                for p in parameters:
                    del p.kept_cast  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        """In place: the gradients stay views."""
        for grad in self._gradients:
            grad.zero_()

    def grad_norm(self) -> Tensor:
        """The length of the whole gradient, () float32 on its device; nobody waits for it here."""
        whole: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in self._gradients]))
        return whole

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update by the gradient times `grad_scale`, which is left as it is. Paged state is the host's again after."""
        self.steps += 1
        rule: Callable[..., None] = adamw_ if self.kind == "adamw" else adamw_8bit_
        for i, (weight_decay, lr_ratio, (p, grad, kept)) in enumerate(self._pieces):
            update = Update(lr * lr_ratio, self.beta1, self.beta2, self.eps, weight_decay, self.steps, grad_scale)
            with self._lanes[i % 2].holding(kept) if self._lanes else nullcontext(kept) as state:
                rule(p, grad, *state, update)
        for lane in self._lanes:
            lane.settle()
