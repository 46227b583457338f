"""A folder to a model, tensor by tensor: what is needed beyond the model itself is one tensor.

The module is built without memory (on torch's meta device) and filled from the files. With quantize="nf4" each linear
layer of the blocks is quantized as it comes, from the file's own precision; embedding, norms and head stay dense. Files
that are quantized already are taken as they are, with either value of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilora.checkpoint.finite import cast_finite
from minilora.checkpoint.names import TensorSpec
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.config import ModelConfig
from minilora.dispatch import quantize as quantize_nf4
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.model import Mistral
from minilora.nf4 import NF4Tensor

Progress = Callable[[int, int], None]  # told what is done, and of how much


def unheard(_done: int, _of: int) -> None:
    """The progress that nobody is told."""


def load_model(
    path: str | Path,
    *,
    quantize: Literal["nf4"] | None = None,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> Mistral:
    """Load a Mistral for inference: eval mode, no parameter requires a gradient (a training strategy turns them on).

    path: a folder in Hugging Face's or Mistral's layout, or "demo", the model that ships with minilora
    quantize, double_quant: "nf4" stores the blocks' linear layers in NF4, their absmax in 8 bits with double_quant;
        neither changes what a folder in bitsandbytes' 4-bit layout holds
    dtype: of the dense weights, and so of what is computed: float32, bfloat16 or float16
    device: None is torch's default device

    All headers are checked first (`open_checkpoint`). Raises UserError for what is wrong with the files, and for a
    number that NF4 or `dtype` cannot hold, by tensor and index.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f'quantize is {quantize!r}, but must be "nf4" or None')
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}, but must be float32, bfloat16 or float16")
    device = torch.get_default_device() if device is None else torch.device(device)
    checkpoint = open_checkpoint(path)
    checkpoint.check_tied_head()
    model, storage = skeleton(checkpoint.config), Storage(quantize is not None, double_quant, dtype, device)
    for spec in checkpoint.tensors():
        fill(model, checkpoint, spec, storage)
    if checkpoint.config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.base_fingerprint, model.base_converted_from = checkpoint.fingerprint(), checkpoint.converted_from()
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Storage:
    """How a model's weights are kept: the blocks' linear layers in NF4, with absmax in 8 bits, or all in `dtype`."""

    nf4: bool
    double_quant: bool
    dtype: torch.dtype
    device: torch.device


def skeleton(config: ModelConfig) -> Mistral:
    """A model without memory, on the meta device, to be filled."""
    with torch.device("meta"), _Unfilled():
        return Mistral(config)


def fill(module: nn.Module, checkpoint: Checkpoint, spec: TensorSpec, storage: Storage) -> None:
    """Put one weight of the files where it belongs in `module`, a model or a part of one with the same names."""
    where = f"{checkpoint.entries[spec.name].file}: {spec.name}"
    if spec.name in checkpoint.nf4:
        module.set_submodule(spec.module, NF4Linear(checkpoint.nf4[spec.name].read()).to(storage.device))
        return
    weight = checkpoint.read(spec).to(storage.device)
    if storage.nf4 and spec.is_projection and not checkpoint.nf4:
        module.set_submodule(spec.module, NF4Linear(quantize_weight(weight, where, storage.double_quant)))
    else:
        parameter = nn.Parameter(cast_finite(weight, storage.dtype, where), requires_grad=False)
        module.get_submodule(spec.module).register_parameter("weight", parameter)


class _Unfilled(TorchFunctionMode):
    """While entered, new layers get no random numbers: on the meta device, drawing them would import a compiler and
    its algebra, a second and 80 MB, for nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if getattr(func, "__module__", "") == nn.init.__name__ else func(*args, **(kwargs or {}))


def quantize_weight(weight: Tensor, name: str, double_quant: bool) -> NF4Tensor:
    """`quantize_nf4`, whose errors name the weight."""
    try:
        return quantize_nf4(weight, double_quant=double_quant)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
