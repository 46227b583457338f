"""The fast block: what `model.Block` says, as three functions whose backward is written by hand.

    q, k, v = rotate(norm(x) W_qkv^T)        saved: x; the adapters' x A^T
    y       = residual + a W_o^T             saved: a, the attention's output
    y       = x + (silu(g) * u) W_down^T     saved: x, g, u        g, u = norm(x) W_gate^T, norm(x) W_up^T

What autograd would save besides, the norm's float32 copies, rotated pairs, silu(g), silu(g) * u, is elementwise and
made again in backward. No product is computed twice: recomputing saves memory by the block, not by the tensor
(`Mistral.activation_checkpointing`). For adapters, with P = x A^T (rank numbers a token):

    y  = x W'^T + s P B^T                    dx = dy W' + (s dy B) A
    dB = s dy^T P                            dA = (s dy B)^T x

all added in place onto the frozen layer's product, the A of layers with the same x in one product, so adapters cost
little more than their FLOPs. Weights are decoded by slices (`linear.slices`); products run in `backend.product_dtype`,
where a 16-bit x is widened once.

`fuse` puts the fast block where it applies: frozen bases and norms, no dropout. It falls back to the plain block where
there is nothing to differentiate, so inference and the KV cache have one definition.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from minilora.attention import attend
from minilora.backend import product_dtype
from minilora.linear import NF4Linear, multiply, multiply_back
from minilora.lora import LoRALinear
from minilora.model import Block, Context, Mistral
from minilora.nf4 import NF4Tensor
from minilora.norm import RMSNorm


@dataclass(frozen=True)
class Adapter:
    """A (rank, in) and B (out, rank), float32, whose product is added `scale` times."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Projections:
    """Layers of one input: their frozen weights (out, in), and the adapters that some of them have."""

    weights: tuple[NF4Tensor | Tensor, ...]
    adapters: tuple[Adapter | None, ...]

    @staticmethod
    def of(*layers: nn.Module) -> "Projections":
        """What each `nn.Linear`, `NF4Linear` or `LoRALinear` computes."""
        weights, adapters = list[NF4Tensor | Tensor](), list[Adapter | None]()
        for layer in layers:
            base, adapter = layer, None
            if isinstance(layer, LoRALinear):
                base, adapter = layer.base, Adapter(layer.lora_A, layer.lora_B, layer.scale) if layer.enabled else None
            assert isinstance(base, nn.Linear | NF4Linear)
            weights.append(base.weight)
            adapters.append(adapter)
        return Projections(tuple(weights), tuple(adapters))

    @property
    def learned(self) -> list[Tensor]:
        """A and B of each adapter: what is handed to an autograd function as arguments of its own."""
        return [tensor for adapter in self.adapters if adapter for tensor in (adapter.down, adapter.up)]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """x (N, in) -> y (N, out) of each, and x A^T (N, sum of ranks) for backward."""
        ys = [multiply(x, weight) for weight in self.weights]
        if not self.learned:
            return ys, None
        reduced = x @ self._down(x.dtype).T
        for adapter, y, part in self._adapted(ys, reduced):
            y.addmm_(part, adapter.up.to(x.dtype).T, alpha=adapter.scale)
        return ys, reduced

    def backward(
        self, dys: Sequence[Tensor], x: Tensor, reduced: Tensor | None, needs_dx: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx (N, in), if it is needed, and the float32 gradients of what is `learned`."""
        dx: Tensor | None = None
        for dy, weight in zip(dys, self.weights, strict=True):
            dx = multiply_back(dy, weight, dx) if needs_dx else None
        if reduced is None:
            return dx, []
        d_reduced, d_ups = torch.empty_like(reduced), list[Tensor]()
        for adapter, dy, part in self._adapted(dys, reduced):
            d_ups.append((dy.T @ part).mul_(adapter.scale).float())
        for adapter, dy, part in self._adapted(dys, d_reduced):
            torch.mm(dy, adapter.up.to(dy.dtype), out=part).mul_(adapter.scale)
        if dx is not None:
            dx.addmm_(d_reduced, self._down(x.dtype))
        d_downs = (d_reduced.T @ x).split(self._ranks)
        pairs = zip(d_downs, d_ups, strict=True)
        return dx, [grad for d_down, d_up in pairs for grad in (d_down.to(torch.float32, copy=True), d_up)]

    @property
    def _ranks(self) -> list[int]:
        return [len(adapter.down) for adapter in self.adapters if adapter]

    def _down(self, dtype: torch.dtype) -> Tensor:
        """Every A, one below the other: (sum of ranks, in). They read x once."""
        return torch.cat([adapter.down for adapter in self.adapters if adapter]).to(dtype)

    def _adapted(self, ys: Sequence[Tensor], reduced: Tensor) -> Iterator[tuple[Adapter, Tensor, Tensor]]:
        """Each adapter with its y and its columns of x A^T."""
        with_adapter = [(adapter, y) for adapter, y in zip(self.adapters, ys, strict=True) if adapter]
        for (adapter, y), part in zip(with_adapter, reduced.split(self._ranks, dim=1), strict=True):
            yield adapter, y, part


def _normalize(norm: RMSNorm, x: Tensor, dtype: torch.dtype, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """norm(x) (N, D) in `dtype`, and 1 / rms (N, 1) float32, which is made where it is not given."""
    x = x.float()
    if inverse is None:
        inverse = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow_(2) / x.shape[-1] + norm.eps)
    return (x * inverse).mul_(norm.weight).to(dtype), inverse


def _normalize_back(norm: RMSNorm, dn: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """dx = (dn w - x mean(dn w x) / rms^2) / rms, (N, D) float32; `dn` may be overwritten."""
    x, d_unit = x.float(), dn.float().mul_(norm.weight)
    mean = torch.linalg.vecdot(d_unit, x)[:, None] / x.shape[-1]
    return d_unit.mul_(inverse).addcmul_(x, mean.mul_(inverse.pow(3)), value=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, H, Dh), its half-split pairs turned by cos, sin (N, 1, Dh/2)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (c, d) = (t.unflatten(-1, (2, -1)).unbind(-2) for t in (x, y))
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=d).addcmul_(a, sin)
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _QKV(torch.autograd.Function):
    """x (B, T, D) -> rotated q (B, T, Hq, Dh), rotated k and v (B, T, Hkv, Dh), in the dtype of the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm, parts: Projections, context: Context, *_learned: Tensor) -> Any:
        dtype = product_dtype(x)
        normed, inverse = _normalize(norm, _rows(x), dtype)
        ctx.rotation = [r.flatten(0, 1)[:, None].to(dtype) for r in (context.cos, context.sin)]
        ys, reduced = parts.forward(normed)
        q, k, v = (y.unflatten(1, (-1, 2 * context.cos.shape[-1])) for y in ys)
        ctx.norm, ctx.parts = norm, parts
        ctx.save_for_backward(x, inverse, reduced)
        rotated = (_rotated(q, *ctx.rotation), _rotated(k, *ctx.rotation), v)
        return tuple(y.unflatten(0, x.shape[:2]) for y in rotated)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inverse, reduced = ctx.saved_tensors
        cos, sin = ctx.rotation
        dq, dk, dv = (grad.flatten(0, 1) for grad in grads)
        dys = [dy.flatten(1) for dy in (_rotated(dq, cos, -sin), _rotated(dk, cos, -sin), dv)]
        normed, _ = _normalize(ctx.norm, _rows(x), dv.dtype, inverse)
        dn, learned = ctx.parts.backward(dys, normed, reduced, ctx.needs_input_grad[0])
        dx = None if dn is None else _normalize_back(ctx.norm, dn, _rows(x), inverse).to(x.dtype).view(x.shape)
        return dx, None, None, None, *learned


class _Output(torch.autograd.Function):
    """residual (B, T, D) + a W^T, a (B, T, Hq * Dh) the attention's output."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, a: Tensor, part: Projections, *_learned: Tensor) -> Tensor:
        (y,), reduced = part.forward(_rows(a))
        ctx.part = part
        ctx.save_for_backward(a, reduced)
        return residual + y.view(residual.shape).to(residual.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, reduced = ctx.saved_tensors
        dy = grads[0]
        da, learned = ctx.part.backward([_rows(dy).to(a.dtype)], _rows(a), reduced)
        return dy, da.view(a.shape), None, *learned


class _MLP(torch.autograd.Function):
    """x (B, T, D) -> x + down(silu(gate(norm(x))) * up(norm(x)))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm, wide: Projections, down: Projections, *_learned: Tensor) -> Tensor:
        normed, inverse = _normalize(norm, _rows(x), product_dtype(x))
        (gate, up), wide_reduced = wide.forward(normed)
        (y,), down_reduced = down.forward(silu(gate).mul_(up))
        ctx.norm, ctx.wide, ctx.down = norm, wide, down
        ctx.save_for_backward(x, inverse, gate.to(x.dtype), up.to(x.dtype), wide_reduced, down_reduced)
        return x + y.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inverse, gate, up, wide_reduced, down_reduced = ctx.saved_tensors
        dtype, dy = product_dtype(x), grads[0]
        gate, up = gate.to(dtype), up.to(dtype)
        gated = silu(gate)
        dh, of_down = ctx.down.backward([_rows(dy).to(dtype)], gated * up, down_reduced)
        d_up = gated.mul_(dh)
        d_gate = torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dh)
        normed, _ = _normalize(ctx.norm, _rows(x), dtype, inverse)
        dn, of_wide = ctx.wide.backward([d_gate, d_up], normed, wide_reduced)
        dx = _normalize_back(ctx.norm, dn, _rows(x), inverse).view(x.shape).add_(dy).to(x.dtype)
        return dx, None, None, None, *of_wide, *of_down


_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]] = _QKV.apply
_output: Callable[..., Tensor] = _Output.apply
_mlp: Callable[..., Tensor] = _MLP.apply


class FusedBlock(Block):
    """A block's own layers under their own names, run by the three functions while there is something to learn."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm, self.mlp = block.post_attention_layernorm, block.mlp
        self.train(block.training)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not torch.is_grad_enabled() or context.cache is not None or context.prefix:
            return super().forward(x, context)
        attention, mlp = self.self_attn, self.mlp
        qkv, output = (
            Projections.of(attention.q_proj, attention.k_proj, attention.v_proj),
            Projections.of(attention.o_proj),
        )
        wide, down = Projections.of(mlp.gate_proj, mlp.up_proj), Projections.of(mlp.down_proj)
        q, k, v = _qkv(x, self.input_layernorm, qkv, context, *qkv.learned)
        x = _output(x, attend(q, k, v, context.sees(attention.layer)).flatten(-2), output, *output.learned)
        return _mlp(x, self.post_attention_layernorm, wide, down, *wide.learned, *down.learned)


def fuse(model: Mistral) -> bool:
    """Put the fast block in place of each plain one, if it applies to all of them; whether it did.

    It does if no weight of the blocks learns but adapters, and these are plain: without dropout, not DoRA's. (Under a
    prefix the fast block falls back to the plain one, so there `fuse` would gain nothing.)
    """
    for block in model.layers:
        adapted = [m for m in block.modules() if isinstance(m, LoRALinear)]
        learn = {id(p) for p in block.parameters() if p.requires_grad}
        plain = all(m.dropout == 0 and m.lora_magnitude_vector is None for m in adapted)
        if not (plain and learn <= {id(p) for m in adapted for p in (m.lora_A, m.lora_B)}):
            return False
    for i, block in enumerate(model.layers):
        if not isinstance(block, FusedBlock):
            assert isinstance(block, Block)
            model.layers[i] = FusedBlock(block)
    return True
