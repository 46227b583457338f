"""The fast block: what `model.Block` says, as three functions whose backward is written by hand.

    q, k, v = rotate(norm(x) W_qkv^T)        saved: x; the adapters' x A^T
    y       = a W_o^T                        saved: a, the attention's output
    x       = residual + y                   saved: x, g, u        g, u = norm(x) W_gate^T, norm(x) W_up^T
    result  = x + (silu(g) * u) W_down^T

What autograd would save besides, the norm's float32 copies, rotated pairs, silu(g), silu(g) * u, is elementwise and
made again in backward, on a GPU by one kernel for all that lies between two products (`norm.py`, `rope.py`,
`swiglu.py`). Therefore residual + y is the third function's, whose norm reads the sum at once; and the first returns x,
too, so that both of x's gradients meet in the norm's backward. No product is computed twice: recomputing saves memory
by the block, not by the tensor (`Mistral.activation_checkpointing`).

For adapters, with P = x A^T (rank numbers a token):

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

from minilora.attention import attend
from minilora.backend import product_dtype
from minilora.linear import NF4Linear, multiply, multiply_back
from minilora.lora import LoRALinear
from minilora.model import Block, Context, Mistral
from minilora.nf4 import NF4Tensor
from minilora.norm import RMSNorm, add_rms_norm, rms_norm, rms_norm_backward
from minilora.rope import rotate
from minilora.swiglu import swiglu, swiglu_backward


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
        dx, d_reduced = self.backward_to_x(dys, needs_dx)
        return dx, self.backward_to_adapters(dys, x, reduced, d_reduced)

    def backward_to_x(self, dys: Sequence[Tensor], needs_dx: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """dx (N, in), if it is needed, and the gradient of x A^T (N, sum of ranks)."""
        dx: Tensor | None = None
        for dy, weight in zip(dys, self.weights, strict=True):
            dx = multiply_back(dy, weight, dx) if needs_dx else None
        if not self.learned:
            return dx, None
        d_reduced = dys[0].new_empty(len(dys[0]), sum(self._ranks))
        for adapter, dy, part in self._adapted(dys, d_reduced):
            torch.mm(dy, adapter.up.to(dy.dtype), out=part).mul_(adapter.scale)
        if dx is not None:
            dx.addmm_(d_reduced, self._down(dx.dtype))
        return dx, d_reduced

    def backward_to_adapters(
        self, dys: Sequence[Tensor], x: Tensor, reduced: Tensor | None, d_reduced: Tensor | None
    ) -> list[Tensor]:
        """The float32 gradients of what is `learned`, from x (N, in), x A^T and its gradient."""
        if reduced is None or d_reduced is None:
            return []
        d_ups = [(dy.T @ part).mul_(adapter.scale).float() for adapter, dy, part in self._adapted(dys, reduced)]
        d_downs = (d_reduced.T @ x).split(self._ranks)
        pairs = zip(d_downs, d_ups, strict=True)
        return [grad for d_down, d_up in pairs for grad in (d_down.to(torch.float32, copy=True), d_up)]

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


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _QKV(torch.autograd.Function):
    """x (B, T, D) -> rotated q (B, T, Hq, Dh), rotated k and v (B, T, Hkv, Dh), in the dtype of the products, and x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm, parts: Projections, context: Context, *_learned: Tensor) -> Any:
        dtype = product_dtype(x)
        normed, inverse = rms_norm(_rows(x), norm.weight, norm.eps, dtype)
        ctx.rotation = [r.flatten(0, 1).to(dtype) for r in (context.cos, context.sin)]
        ys, reduced = parts.forward(normed)
        q, k, v = (y.unflatten(1, (-1, 2 * context.cos.shape[-1])) for y in ys)
        ctx.norm, ctx.parts = norm, parts
        ctx.save_for_backward(x, inverse, reduced)
        rotated = (rotate(q, *ctx.rotation), rotate(k, *ctx.rotation), v)
        return *(y.unflatten(0, x.shape[:2]) for y in rotated), x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inverse, reduced = ctx.saved_tensors
        norm, (cos, sin) = ctx.norm, ctx.rotation
        dq, dk, dv, residual_grad = (grad.flatten(0, 1) for grad in grads)
        dys = [dy.flatten(1) for dy in (rotate(dq, cos, sin, True), rotate(dk, cos, sin, True), dv)]
        normed, _ = rms_norm(_rows(x), norm.weight, norm.eps, dv.dtype, inverse)
        dn, learned = ctx.parts.backward(dys, normed, reduced, ctx.needs_input_grad[0])
        if dn is None:
            return None, None, None, None, *learned
        dx = rms_norm_backward(dn, _rows(x), norm.weight, inverse, residual_grad).view(x.shape)
        return dx, None, None, None, *learned


class _Output(torch.autograd.Function):
    """a W^T (B, T, D), a (B, T, Hq * Dh) the attention's output, in its dtype."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, part: Projections, *_learned: Tensor) -> Tensor:
        [y], reduced = part.forward(_rows(a))
        ctx.part = part
        ctx.save_for_backward(a, reduced)
        return y.view(*a.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, reduced = ctx.saved_tensors
        da, learned = ctx.part.backward([_rows(grads[0])], _rows(a), reduced)
        return da.view(a.shape), None, *learned


class _MLP(torch.autograd.Function):
    """residual, y (B, T, D) -> x + down(silu(gate(norm(x))) * up(norm(x))), x = residual + y."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, y: Tensor, norm: RMSNorm, wide: Projections, down: Projections, *_learned: Tensor
    ) -> Tensor:
        dtype, shape = product_dtype(residual), residual.shape
        x, normed, inverse = add_rms_norm(_rows(residual), _rows(y), norm.weight, norm.eps, dtype)
        (gate, up), wide_reduced = wide.forward(normed)
        (z,), down_reduced = down.forward(swiglu(gate, up))
        ctx.norm, ctx.wide, ctx.down = norm, wide, down
        ctx.save_for_backward(x, inverse, gate.to(x.dtype), up.to(x.dtype), wide_reduced, down_reduced)
        return (x + z.to(x.dtype)).view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inverse, gate, up, wide_reduced, down_reduced = ctx.saved_tensors
        norm, dtype, dresult = ctx.norm, product_dtype(x), _rows(grads[0])
        dz = [dresult.to(dtype)]
        dh, d_down_reduced = ctx.down.backward_to_x(dz)
        h, d_gate, d_up = swiglu_backward(dh, gate.to(dtype), up.to(dtype))
        of_down = ctx.down.backward_to_adapters(dz, h, down_reduced, d_down_reduced)
        del h  # (N, F), before more is made
        normed, _ = rms_norm(x, norm.weight, norm.eps, dtype, inverse)
        dn, of_wide = ctx.wide.backward([d_gate, d_up], normed, wide_reduced)
        dx = rms_norm_backward(dn, x, norm.weight, inverse, dresult).view(grads[0].shape)
        return dx, dx.to(dtype), None, None, None, *of_wide, *of_down


_qkv: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _QKV.apply
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
        q, k, v, x = _qkv(x, self.input_layernorm, qkv, context, *qkv.learned)
        y = _output(attend(q, k, v, context.sees(attention.layer)).flatten(-2), output, *output.learned)
        return _mlp(x, y, self.post_attention_layernorm, wide, down, *wide.learned, *down.learned)


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
