"""A linear layer whose frozen weight is stored in NF4: y = x W'^T, W' = dequantize(W).

The weight is decoded for the product and thrown away; backward decodes it again, so that no full-size weight is kept
between the two. W' gets no gradient: only dL/dx = dL/dy W' is needed to train what lies before and beside it.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minilora.nf4 import NF4Tensor


class _NF4Product(torch.autograd.Function):
    """x (..., in) -> x W'^T (..., out). Keeps the packed bytes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        ctx.weight = weight
        return linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.dequantize(grads[0].dtype), None


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
        self.out_features, self.in_features = weight.shape
        self.weight_dtype, self.block_size = weight.dtype, weight.block_size
        for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> NF4Tensor:
        return NF4Tensor(
            self.packed,
            self.absmax,
            (self.out_features, self.in_features),
            self.weight_dtype,
            self.block_size,
            self.nested_absmax,
            self.nested_offset,
        )

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
