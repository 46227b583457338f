"""The fast block: what `model.Block` says, as one function whose backward is written by hand.

    q, k, v = rotate(norm(x) W_qkv^T)          a = attention(q, k, v)
    m       = x + a W_o^T
    y       = m + (silu(g) * u) W_down^T       g, u = norm(m) W_gate^T, norm(m) W_up^T

What lies between the products stands on a tape. Backward needs all of it, but not all of it must be kept: what is not
is made again from what is, by the same lines (`Keep`). The last product is never made again, since nothing but y comes
of it; nor are norm(x) and silu(g) * u ever kept. The products, with their adapters, are those of
`projections.py`; they run in `backend.product_dtype`, where a 16-bit x is widened once.

The norm behind the last block is a function, too, at the end. `fast_block.py` puts both in the plain ones' place.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from minilora.attention import attend_back, attend_kept
from minilora.backend import has_kernels, product_dtype
from minilora.model import Context
from minilora.norm import RMSNorm, add_rms_norm, rms_norm, rms_norm_backward
from minilora.projections import Gradients, Projections
from minilora.rope import rotate, rotate_back
from minilora.swiglu import swiglu, swiglu_backward
from minilora.visible import Sees


class Keep(IntEnum):
    """What a block keeps for backward; in the 7B, in 16 bits: 8 kB a token, 25, 37 and 94 kB; and 436 MB."""

    INPUT = 0
    ATTENTION = 1  # its output, too, and the stream after it
    HEADS = 2  # q, k and v, too
    ALL = 3  # gate and up, too
    WEIGHTS = 4  # the decoded weights, too: for plentiful memory


@dataclass(frozen=True)
class Layers:
    """A block's frozen layers with their adapters, by their inputs, and what all blocks share."""

    norm: RMSNorm
    qkv: Projections
    o: Projections
    mlp_norm: RMSNorm
    wide: Projections
    down: Projections
    context: Context
    sees: Sees

    @property
    def learned(self) -> list[Tensor]:
        return [*self.qkv.learned, *self.o.learned, *self.wide.learned, *self.down.learned]

    def decoded(self, dtype: torch.dtype) -> "Layers":
        """The same, whose weights need not be decoded again."""
        parts = {name: getattr(self, name).decoded(dtype) for name in ("qkv", "o", "wide", "down")}
        return replace(self, **parts)

    def rotation(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (N, Dh / 2)."""
        cos, sin = (r.flatten(0, 1).to(dtype) for r in (self.context.cos, self.context.sin))
        return cos, sin


class Tape(SimpleNamespace):
    """A block's numbers between its products, those that are there; N = B * T."""

    x: Tensor  # (B, T, D)
    inverse: Tensor  # 1 / rms (N, 1)
    q: Tensor  # (B, T, Hq, Dh), rotated, as is
    k: Tensor  # (B, T, Hkv, Dh)
    v: Tensor  # (B, T, Hkv, Dh)
    qkv_reduced: Tensor | None  # x A^T (N, sum of ranks), as the others of that name; None without adapters
    attended: Tensor  # (B, T, Hq, Dh)
    rest: tuple[Tensor, ...]  # what `attend_back` wants besides
    mid: Tensor  # (B, T, D)
    o_reduced: Tensor | None
    mid_inverse: Tensor
    gate: Tensor  # (N, F), in x's dtype
    up: Tensor
    wide_reduced: Tensor | None
    down_reduced: Tensor | None

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


_KEPT = (  # what each step of Keep adds
    ("x",),  # and down's x A^T, which is not made again
    ("attended", "mid", "o_reduced"),
    ("q", "k", "v", "inverse", "qkv_reduced"),
    ("gate", "up", "mid_inverse", "wide_reduced"),
)


def _fill_attention(tape: Tape, layers: Layers) -> None:
    """Forward as far as attention's output: put on the tape what is not there."""
    x, dtype = _rows(tape.x), product_dtype(tape.x)
    if "q" not in tape:
        x_normed, tape.inverse = rms_norm(x, layers.norm.weight, layers.norm.eps, dtype, room=layers.qkv.x_room)
        ys, tape.qkv_reduced = layers.qkv.forward(x_normed)
        cos, sin = layers.rotation(dtype)
        q, k, v = (y.unflatten(1, (-1, 2 * cos.shape[-1])) for y in ys)
        heads = (rotate(q, cos, sin), rotate(k, cos, sin), v)
        tape.q, tape.k, tape.v = (y.unflatten(0, tape.x.shape[:2]) for y in heads)
        del x_normed, ys, q, k, v, heads
    if "rest" not in tape:
        tape.attended, tape.rest = attend_kept(tape.q, tape.k, tape.v, layers.sees)


def _fill_mlp(tape: Tape, layers: Layers) -> None:
    """And on to gate and up."""
    x, dtype, norm, room = _rows(tape.x), product_dtype(tape.x), layers.mlp_norm, layers.wide.x_room
    normed: Tensor | None = None
    if "mid" not in tape:
        (y,), tape.o_reduced = layers.o.forward(tape.attended.reshape(len(x), -1))
        mid, normed, tape.mid_inverse = add_rms_norm(x, y, norm.weight, norm.eps, dtype, room)
        tape.mid = mid.view(tape.x.shape)
    if "gate" not in tape:
        if normed is None:
            normed, tape.mid_inverse = rms_norm(_rows(tape.mid), norm.weight, norm.eps, dtype, room=room)
        gates, tape.wide_reduced = layers.wide.forward(normed)
        tape.gate, tape.up = (y.to(tape.x.dtype) for y in gates)  # as they are kept, whether they are or not


def _mlp_back(dy: Tensor, tape: Tape, layers: Layers) -> tuple[Tensor, Gradients]:
    """The gradient of `mid` (N, D + `layers.o.dy_room`), in dy's dtype, and the adapters'.

    dy: (N, D + `layers.down.dy_room`)
    """
    mid, norm, dtype = _rows(tape.mid), layers.mlp_norm, product_dtype(dy)
    dys, wide, down = [dy.to(dtype)], layers.wide, layers.down
    d_reduced = down.reduce(dys)
    dh = down.back(dys, d_reduced, wide.dy_room)
    h, *d_wide = swiglu_backward(dh, tape.gate.to(dtype), tape.up.to(dtype))
    del tape.gate, tape.up
    of_down = down.learn(dys, d_reduced, h, tape.down_reduced)
    del h, dh, dys
    d_reduced = wide.reduce(d_wide)
    dn, through_residual = wide.back(d_wide, d_reduced), dy[:, : mid.shape[1]]
    dmid, normed = rms_norm_backward(dn, mid, norm.weight, tape.mid_inverse, through_residual, room=layers.o.dy_room)
    of_wide = wide.learn(d_wide, d_reduced, normed, tape.wide_reduced)
    return dmid, [*of_wide, *of_down]


def _attention_back(dmid: Tensor, tape: Tape, layers: Layers, dx_room: int | None) -> tuple[Tensor | None, Gradients]:
    """The gradient of x (N, D + dx_room), or none if that is None, and the adapters'. dmid: as `_mlp_back` makes it."""
    x, norm, dtype = _rows(tape.x), layers.norm, product_dtype(dmid)
    dys = [dmid.to(dtype)]
    d_reduced = layers.o.reduce(dys)
    da = layers.o.back(dys, d_reduced)
    of_o = layers.o.learn(dys, d_reduced, tape.attended.reshape(len(x), -1), tape.o_reduced)
    heads = tape.q, tape.k, tape.v, tape.attended
    grads = attend_back(da.view(tape.attended.shape), *heads, tape.rest, layers.sees)
    cos, sin = layers.rotation(dtype)
    dq, dk, dv = (grad.flatten(0, 1) for grad in grads)
    dys = [rotate_back(dq, cos, sin), rotate_back(dk, cos, sin, layers.qkv.dy_room), dv.flatten(1)]
    d_reduced = layers.qkv.reduce(dys)
    if dx_room is not None:
        dn, through_residual = layers.qkv.back(dys, d_reduced), dmid[:, : x.shape[1]]
        dx, normed = rms_norm_backward(dn, x, norm.weight, tape.inverse, through_residual, dx_room)
    else:
        dx, (normed, _) = None, rms_norm(x, norm.weight, norm.eps, dtype, tape.inverse)
    of_qkv = layers.qkv.learn(dys, d_reduced, normed, tape.qkv_reduced)
    return dx, [*of_qkv, *of_o]


class _Block(torch.autograd.Function):
    """x (B, T, D) -> y (B, T, D). dx_room: of the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Layers, keep: Keep, dx_room: int, *_learned: Tensor) -> Tensor:
        if keep == Keep.WEIGHTS:
            layers = layers.decoded(product_dtype(x))
        tape = Tape(x=x)
        _fill_attention(tape, layers)
        _fill_mlp(tape, layers)
        gate, up = (y.to(product_dtype(x)) for y in (tape.gate, tape.up))
        h, mid = swiglu(gate, up, layers.down.x_room), tape.mid
        if keep >= (Keep.HEADS if isinstance(layers.sees, Tensor) else Keep.ATTENTION):  # a mask's holds q, k and v
            ctx.rest = tape.rest
        ctx.dx_room, ctx.layers, ctx.names = dx_room, layers, [name for names in _KEPT[: keep + 1] for name in names]
        kept = [getattr(tape, name) for name in ctx.names]
        del tape, gate, up  # so what is not kept makes room for the last product
        (y,), down_reduced = layers.down.forward(h)
        ctx.save_for_backward(down_reduced, *kept)
        return mid + y.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        down_reduced, *kept = ctx.saved_tensors
        tape, layers = Tape(down_reduced=down_reduced, **dict(zip(ctx.names, kept, strict=True))), ctx.layers
        del ctx.layers  # and with it the weights, if they were kept
        if hasattr(ctx, "rest"):
            tape.rest = ctx.rest
        _fill_attention(tape, layers)
        _fill_mlp(tape, layers)
        dmid, of_mlp = _mlp_back(_roomy_rows(grads[0], layers.down.dy_room), tape, layers)
        dx, of_attention = _attention_back(dmid, tape, layers, ctx.dx_room if ctx.needs_input_grad[0] else None)
        return None if dx is None else _bare_gradient(dx, tape.x.shape), None, None, None, *of_attention, *of_mlp


fused_block: Callable[..., Tensor] = _Block.apply


class _Norm(torch.autograd.Function):
    """x (B, T, D), weight (D,) -> the norm behind the last block. x is kept as it is; autograd keeps it in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dx_room: int) -> Tensor:
        normed, inverse = rms_norm(_rows(x), weight, eps, x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        ctx.dx_room = dx_room
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        dn = _rows(grads[0])
        if dn.dtype == torch.float32 and not has_kernels(dn.device):
            dn = dn.clone()  # it would be overwritten, and it is autograd's
        dx, _ = rms_norm_backward(dn, _rows(x), weight, inverse, room=ctx.dx_room)
        return _bare_gradient(dx, x.shape), None, None, None


fused_norm: Callable[..., Tensor] = _Norm.apply


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# Between blocks gradients go through autograd, which knows of (B, T, D) alone. So a block writes on its output how much
# room the gradient of that is to have (`dy_room`), and whoever makes that gradient hands autograd the bare one, a view,
# and writes on it what it is a view of (`roomy`). Autograd passes on that very tensor. Where it has made another one,
# or a hook has put other numbers there, the attribute is missing or another address, and the gradient is copied.


def _bare_gradient(roomy: Tensor, shape: torch.Size) -> Tensor:
    """(N, D + room) as the gradient of that shape (B, T, D)."""
    grad = roomy[:, : shape[-1]].view(shape)
    grad.roomy = roomy  # type: ignore[attr-defined]
    return grad


def _roomy_rows(grad: Tensor, room: int) -> Tensor:
    """A gradient (B, T, D) as (N, D + room); copied if it was not made with that room."""
    rows = _rows(grad)
    if room == 0:
        return rows
    roomy: Tensor | None = getattr(grad, "roomy", None)
    if roomy is None or roomy.data_ptr() != grad.data_ptr() or roomy.shape != (len(rows), rows.shape[1] + room):
        return pad(rows, (0, room))
    return roomy
