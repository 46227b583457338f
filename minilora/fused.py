"""The fast block: what `model.Block` says, as three functions whose backward is written by hand.

    q, k, v = rotate(norm(x) W_qkv^T)        saved: x; the adapters' x A^T
    y       = residual + a W_o^T             saved: a, the attention's output
    y       = x + (silu(g) * u) W_down^T     saved: x, g, u        g, u = norm(x) W_gate^T, norm(x) W_up^T

What autograd would save besides, the norm's float32 copies, rotated pairs, silu(g), silu(g) * u, is elementwise and
made again in backward. No product is computed twice: recomputing saves memory by the block, not by the tensor
(`Mistral.activation_checkpointing`). For adapters, with P = x A^T (rank numbers a token):

    y  = x W'^T + s P B^T                    dx = dy W' + (s dy B) A
    dB = s dy^T P                            dA = (s dy B)^T x

all added in place onto the frozen layer's product, so an adapter costs little more than its FLOPs. Weights are decoded
by slices (`linear.slices`); products run in `backend.product_dtype`, where a 16-bit x is widened once.

`fuse` puts the fast block where it applies: frozen bases and norms, no dropout. It falls back to the plain block where
there is nothing to differentiate, so inference and the KV cache have one definition.
"""

from collections.abc import Callable, Sequence
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

ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Projection:
    """A frozen weight (out, in) and its adapter, if it has one: A (rank, in) and B (out, rank), float32."""

    weight: NF4Tensor | Tensor
    adapter: tuple[Tensor, Tensor] | None = None
    scale: float = 0.0

    @staticmethod
    def of(layer: nn.Module) -> "Projection":
        """What an `nn.Linear`, `NF4Linear` or `LoRALinear` computes."""
        if isinstance(layer, LoRALinear):
            return Projection(layer.base.weight, (layer.lora_A, layer.lora_B) if layer.enabled else None, layer.scale)
        assert isinstance(layer, nn.Linear | NF4Linear)
        return Projection(layer.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (N, in) -> y (N, out), and x A^T (N, rank) for backward."""
        y = multiply(x, self.weight)
        if self.adapter is None:
            return y, None
        down, up = (part.to(x.dtype) for part in self.adapter)
        reduced = x @ down.T
        return y.addmm_(reduced, up.T, alpha=self.scale), reduced

    def backward(
        self, dy: Tensor, x: Tensor, reduced: Tensor | None, onto: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dx (N, in), added to `onto` in place if given, and the float32 gradients of A and B."""
        dx = multiply_back(dy, self.weight, onto)
        if self.adapter is None or reduced is None:
            return dx, None, None
        down, up = (part.to(dy.dtype) for part in self.adapter)
        d_reduced = (dy @ up).mul_(self.scale)
        return dx.addmm_(d_reduced, down), (d_reduced.T @ x).float(), (dy.T @ reduced).mul_(self.scale).float()


def _normalize(norm: RMSNorm, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) (N, D) in `dtype`; x / rms and 1 / rms (N, 1) in float32, which its backward needs."""
    x = x.float()
    inverse = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow(2) / x.shape[-1] + norm.eps)
    unit = x * inverse
    return (unit * norm.weight).to(dtype), unit, inverse


def _normalize_back(norm: RMSNorm, dn: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """dx = (dn w - unit mean(dn w unit)) / rms, (N, D) float32."""
    d_unit = dn.float() * norm.weight
    mean = torch.linalg.vecdot(d_unit, unit)[:, None] / unit.shape[-1]
    return d_unit.addcmul_(unit, mean, value=-1).mul_(inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the half-split pairs of x (N, H, Dh) in place, by cos, sin (N, 1, Dh/2)."""
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    turned = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _QKV(torch.autograd.Function):
    """x (B, T, D) -> rotated q (B, T, Hq, Dh), rotated k and v (B, T, Hkv, Dh), in the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], context: Context, *_adapters: Tensor
    ) -> Any:
        dtype = product_dtype(x)
        normed, _, _ = _normalize(norm, _rows(x), dtype)
        ctx.rotation = [r.flatten(0, 1)[:, None].to(dtype) for r in (context.cos, context.sin)]
        made = [part.forward(normed) for part in parts]
        heads = [y.view(len(y), -1, 2 * context.cos.shape[-1]) for y, _ in made]
        for y in heads[:2]:
            _rotate(y, *ctx.rotation)
        ctx.norm, ctx.parts = norm, parts
        ctx.save_for_backward(x, *(reduced for _, reduced in made))
        return tuple(y.view(*x.shape[:2], *y.shape[1:]) for y in heads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *reduced = ctx.saved_tensors
        cos, sin = ctx.rotation
        normed, unit, inverse = _normalize(ctx.norm, _rows(x), grads[0].dtype)
        dn: Tensor | None = None
        adapters: list[Tensor | None] = []
        for i, (part, dy) in enumerate(zip(ctx.parts, grads, strict=True)):
            dy = dy.flatten(0, 1)
            if i < 2:
                dy = dy.clone(memory_format=torch.contiguous_format)
                _rotate(dy, cos, -sin)
            dn, d_A, d_B = part.backward(dy.flatten(1), normed, reduced[i], dn)
            adapters += [d_A, d_B]
        assert dn is not None
        dx = _normalize_back(ctx.norm, dn, unit, inverse).to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *adapters


class _Output(torch.autograd.Function):
    """residual (B, T, D) + a W^T, a (B, T, Hq * Dh) the attention's output."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, a: Tensor, part: Projection, *_adapters: Tensor) -> Tensor:
        y, reduced = part.forward(_rows(a))
        ctx.part = part
        ctx.save_for_backward(a, reduced)
        return residual + y.view(residual.shape).to(residual.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, reduced = ctx.saved_tensors
        dy = grads[0]
        da, d_A, d_B = ctx.part.backward(_rows(dy).to(a.dtype), _rows(a), reduced)
        return dy, da.view(a.shape), None, d_A, d_B


class _MLP(torch.autograd.Function):
    """x (B, T, D) -> x + down(silu(gate(norm(x))) * up(norm(x)))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], *_adapters: Tensor) -> Tensor:
        normed, _, _ = _normalize(norm, _rows(x), product_dtype(x))
        gate_part, up_part, down_part = parts
        gate, gate_reduced = gate_part.forward(normed)
        up, up_reduced = up_part.forward(normed)
        y, down_reduced = down_part.forward(silu(gate).mul_(up))
        ctx.norm, ctx.parts = norm, parts
        ctx.save_for_backward(x, gate.to(x.dtype), up.to(x.dtype), gate_reduced, up_reduced, down_reduced)
        return x + y.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gate, up, gate_reduced, up_reduced, down_reduced = ctx.saved_tensors
        gate_part, up_part, down_part = ctx.parts
        dtype, dy = product_dtype(x), grads[0]
        normed, unit, inverse = _normalize(ctx.norm, _rows(x), dtype)
        gate, up = gate.to(dtype), up.to(dtype)
        gated = silu(gate)
        dh, *d_down = down_part.backward(_rows(dy).to(dtype), gated * up, down_reduced)
        d_up = gated.mul_(dh)
        d_gate = torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dh)
        dn, *d_gate_adapter = gate_part.backward(d_gate, normed, gate_reduced)
        dn, *d_up_adapter = up_part.backward(d_up, normed, up_reduced, dn)
        dx = _normalize_back(ctx.norm, dn, unit, inverse).view(x.shape).add_(dy).to(x.dtype)
        return dx, None, None, *d_gate_adapter, *d_up_adapter, *d_down


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
        if not torch.is_grad_enabled() or context.cache is not None:
            return super().forward(x, context)
        qkv = [Projection.of(getattr(self.self_attn, name)) for name in ATTENTION]
        output = Projection.of(self.self_attn.o_proj)
        mlp = [Projection.of(getattr(self.mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
        q, k, v = _qkv(x, self.input_layernorm, qkv, context, *_adapters(qkv))
        a = attend(q, k, v, context.sees)
        x = _output(x, a.flatten(-2), output, *_adapters([output]))
        return _mlp(x, self.post_attention_layernorm, mlp, *_adapters(mlp))


def _adapters(parts: Sequence[Projection]) -> list[Tensor | None]:
    """What is trained, to be handed to an autograd function as arguments of its own."""
    return [tensor for part in parts for tensor in part.adapter or (None, None)]


def fuse(model: Mistral) -> bool:
    """Put the fast block in place of each plain one, if it applies to all of them; whether it did.

    It does if no weight of the blocks learns but adapters, and these have no dropout.
    """
    for block in model.layers:
        adapted = [m for m in block.modules() if isinstance(m, LoRALinear)]
        learn = {id(p) for p in block.parameters() if p.requires_grad}
        if not learn <= {id(p) for m in adapted for p in (m.lora_A, m.lora_B)} or any(m.dropout for m in adapted):
            return False
    for i, block in enumerate(model.layers):
        if not isinstance(block, FusedBlock):
            assert isinstance(block, Block)
            model.layers[i] = FusedBlock(block)
    return True
