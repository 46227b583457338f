"""Numbers that are not finite: one of them makes every logit NaN, so they are refused where they come in or go out."""

from math import isfinite

import torch
from torch import Tensor

from minilora.errors import UserError


def refuse_not_finite(tensor: Tensor, name: str, remedy: str) -> None:
    """Raise UserError that names the first NaN or infinity of `tensor` by `name` and flat index."""
    low, high = tensor.aminmax()  # NaN wins both; one pass, and nothing of the tensor's size beside it
    if isfinite(low) and isfinite(high):
        return
    flat = tensor.detach().reshape(-1)
    index = int((~flat.isfinite()).nonzero()[0])
    found = f"{flat[index].item()} at element {index} (counted flat)"
    raise UserError(f"{name}: holds a number that is not finite, {found}; {remedy}")


def cast_finite(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`weight` in `dtype`. Raises UserError for a number that is not finite, or not any more."""
    cast = weight.to(dtype)
    remedy = f"if it is too large for {dtype}, choose another dtype; else its source is damaged, fetch it again"
    refuse_not_finite(cast, name, remedy)
    return cast
