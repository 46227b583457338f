"""A linear layer whose frozen weight is stored in NF4: y = x W'^T, W' = dequantize(W).

The weight is decoded for the product and thrown away; backward decodes it again, so that no full-size weight is kept
between the two. W' gets no gradient: only dL/dx = dL/dy W' is needed to train what lies before and beside it.

Few rows of x are multiplied without decoding the weight first, where a kernel can (`dispatch.py`); and where steps are
told to, the next weight is decoded while this one is multiplied (`ahead.py`).

On a CPU the weight is decoded a few rows at a time, into one small buffer that stays in the cache: the product then
reads what was just written, and the full-size weight exists nowhere. (New memory costs more than the decoding does.)
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import gcd
from typing import Any, Self

import torch
from torch import Tensor, nn

from minilora.ahead import current
from minilora.backend import product_dtype
from minilora.dispatch import decode, fused_product
from minilora.nf4 import BLOCK_SIZE, NF4Tensor
from minilora.scratch import scratch

SLICE_BYTES = 32 << 20  # of decoded weight in work at a time on a CPU; smaller slices make the products inefficient


def multiply(x: Tensor, weight: NF4Tensor | Tensor, columns: Tensor | None = None) -> Tensor:
    """x (N, in) times the transpose of a frozen weight (out, in), -> (N, out) in x's dtype. Not differentiated.

    columns: (out, r), which a weight in NF4 is decoded with, an adapter's B; x is (N, in + r) then (projections.py)
    """
    n_out, n_in = weight.shape
    if isinstance(weight, NF4Tensor) and (fused := fused_product(x[:, :n_in], weight)) is not None:
        return fused if columns is None else fused.addmm_(x[:, n_in:], columns.T)
    y = x.new_empty(x.shape[0], n_out)
    for start, stop, rows in slices(weight, x, columns):
        for of_x, of_y in _parts(x, y if stop - start == n_out else y[:, start:stop]):
            torch.mm(of_x, rows.T, out=of_y)
    return y


def product(x: Tensor, weight: NF4Tensor | Tensor) -> Tensor:
    """x (..., in) -> x W^T (..., out) in x's dtype, multiplied in `product_dtype`. Not differentiated."""
    y = multiply(x.reshape(-1, x.shape[-1]).to(product_dtype(x)), weight)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def multiply_back(
    dy: Tensor,
    weight: NF4Tensor | Tensor,
    dx: Tensor | None = None,
    adds: bool = False,
    below: Tensor | None = None,
) -> Tensor:
    """dy (N, out) times a frozen weight (out, in), -> (N, in) in dy's dtype, in new memory or in dx.

    adds: to what dx holds
    below: (r, in), which a weight in NF4 is decoded with, every A; dy is (N, out + r) then
    """
    if dx is None:
        dx = dy.new_empty(dy.shape[0], weight.shape[1])
    for start, stop, rows in slices(weight, dy, below=below):
        for of_dy, of_dx in _parts(dy if stop - start == dy.shape[1] else dy[:, start:stop], dx):
            of_dx.addmm_(of_dy, rows, beta=1 if adds or start else 0)
    return dx


def add_product_(to: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """to (M, N), a float32 gradient, += scale * a (M, K) b (K, N)."""
    if a.device.type == "cuda" and a.dtype != torch.float32:  # which multiplies 16 bits into float32
        torch.ops.aten.addmm.dtype_out(to, a, b, torch.float32, beta=1, alpha=scale, out=to)
    else:  # thin products are faster with the thin side as their rows
        to.add_(torch.mm(a, b) if to.shape[0] < to.shape[1] else torch.mm(b.T, a.T).T, alpha=scale)


def _parts(x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """x (N, K) and what becomes its product, y (N, M), in as many parts as it needs for all threads to work on it.

    On a CPU oneDNN leaves a 16-bit product of up to some thousand rows to one thread if it is about half to all as wide
    as high: seen with two threads, of 1024 rows at widths from 448 to 1024.
    """
    n, m = y.shape
    alone = x.dtype != torch.float32 and n <= 1024 and 0.4 * n <= m <= n and x.device.type == "cpu"
    return zip(x.chunk(2), y.chunk(2), strict=True) if alone else ((x, y),)


def slices(
    weight: NF4Tensor | Tensor, like: Tensor, columns: Tensor | None = None, below: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows start..stop of the weight in the dtype of `like`), each valid until the next is asked for.

    columns, below: (out, r) and (r, in), which stand behind the weight's rows and under the last one: all in one slice

    What is decoded already comes in the slices that it would be decoded in: sums in another order have other bits. With
    columns or below, it is a view into the matrix that `decoded` made with just these, and `as_strided` reaches beyond
    the view to the rest of that. (No other dense weight is asked for with them: an adapter joins those in NF4 alone.)
    """
    (n_out, n_in), (height, width) = weight.shape, _shape_with(weight.shape, columns, below)
    rows = height
    if like.device.type == "cpu" and columns is None and below is None:
        weight_bytes = n_out * n_in * like.dtype.itemsize
        even = -(-n_out // -(-weight_bytes // SLICE_BYTES))  # as few slices as there must be, of even size
        block = weight.block_size if isinstance(weight, NF4Tensor) else BLOCK_SIZE
        whole = block // gcd(n_in, block)  # so many rows are whole blocks
        rows = min(n_out, -(-even // whole) * whole)
    if isinstance(weight, Tensor) and weight.dtype == like.dtype:
        has_more = (height, width) != tuple(weight.shape)
        dense = weight.as_strided((height, width), weight.stride()) if has_more else weight
        yield from ((i, min(i + rows, height), dense[i : i + rows]) for i in range(0, n_out, rows))
        return
    if isinstance(weight, NF4Tensor) and (ahead := current()) is not None:
        key = tuple(part.data_ptr() for part in (weight.packed, columns, below) if part is not None)
        fill = partial(_decode_with, weight, 0, n_out, columns, below)
        yield 0, height, ahead.filled(key, (height, width), like.dtype, fill)
        return
    buffer = scratch("weight", rows * width, like.dtype, like.device).view(rows, width)
    for start in range(0, n_out, rows):
        stop = min(start + rows, height)
        part = buffer[: stop - start]
        if isinstance(weight, NF4Tensor):
            _decode_with(weight, start, min(stop, n_out), columns, below, part)
        else:
            assert columns is None
            assert below is None
            part.copy_(weight[start:stop])
        yield start, stop, part


def decoded(
    weight: NF4Tensor | Tensor, dtype: torch.dtype, columns: Tensor | None = None, below: Tensor | None = None
) -> Tensor:
    """All of a frozen weight (out, in), in `dtype` and, if it was in NF4, in memory of its own.

    columns, below: (out, r) and (r, in), put into the same memory behind its rows and under the last one
    """
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    n_out, n_in = weight.shape
    out = torch.empty(_shape_with(weight.shape, columns, below), dtype=dtype, device=weight.packed.device)
    _decode_with(weight, 0, n_out, columns, below, out)
    return out[:n_out, :n_in]


def _shape_with(shape: tuple[int, ...], columns: Tensor | None, below: Tensor | None) -> tuple[int, int]:
    n_out, n_in = shape
    return n_out + (0 if below is None else len(below)), n_in + (0 if columns is None else columns.shape[1])


def _decode_with(
    weight: NF4Tensor, start: int, stop: int, columns: Tensor | None, below: Tensor | None, out: Tensor
) -> None:
    """Rows start..stop of the weight, with columns behind them and `below` under the last one, into `out`."""
    n_in = weight.shape[1]
    decode(weight, start * n_in, stop * n_in, out[: stop - start], columns)
    if below is not None:
        out[stop - start :, :n_in] = below


class _NF4Product(torch.autograd.Function):
    """x (..., in) -> x W'^T (..., out). Keeps the packed bytes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        ctx.weight = weight
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy = grads[0]
        dx = multiply_back(dy.reshape(-1, dy.shape[-1]).to(product_dtype(dy)), ctx.weight)
        return dx.to(dy.dtype).view(*dy.shape[:-1], ctx.weight.shape[1]), None


_nf4_product: Callable[[Tensor, NF4Tensor], Tensor] = _NF4Product.apply


class NF4Linear(nn.Module):
    """A frozen (out, in) weight in NF4, without bias; its parts are buffers, so they move and count with the model."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, weight: NF4Tensor) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"a linear weight has two dimensions, not shape {weight.shape}")
        self.out_features, self.in_features = self.shape = weight.shape
        self.weight_dtype, self.block_size = weight.dtype, weight.block_size
        for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> NF4Tensor:
        nested = self.nested_absmax, self.nested_offset
        return NF4Tensor(self.packed, self.absmax, self.shape, self.weight_dtype, self.block_size, *nested)

    def forward(self, x: Tensor) -> Tensor:
        return _nf4_product(x, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` and its kin do to the buffers: they move but keep their dtypes: no rounded absmax."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        double_quant = self.nested_absmax is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, double_quant={double_quant}"
