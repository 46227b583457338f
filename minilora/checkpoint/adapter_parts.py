"""An adapter in memory, whatever files it came from: its config, and its tensors by our names.

    layers.0.self_attn.q_proj.lora_A (rank, in)   .lora_B (out, rank)   .lora_magnitude_vector (out,) with DoRA
    lm_head.weight (V, D)                         of modules_to_save: the whole weight
    prompt_embeddings (P, 2 * L * Hkv * Dh)       of a prefix, alone

Which tensors there must be, and of what shape, follows from the config and the base's sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.json_file import short
from minilora.checkpoint.names import tensor_specs
from minilora.checkpoint.safetensors_file import FLOATS, read_header
from minilora.config import LoraConfig, ModelConfig, PrefixConfig
from minilora.errors import UserError
from minilora.lora import Added, Model, attach_lora, refuse_added
from minilora.model import Mistral
from minilora.prefix import Prefix, add_prefix, prefix_width


@dataclass(frozen=True)
class Adapter:
    """What was read and found to be whole. tensors: float32, on the CPU; provenance: what minilora.json tells."""

    config: LoraConfig | PrefixConfig
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]

    def attach(self, module: Model) -> Model:
        """Add what of the adapter lies in `module`, a Mistral or a module that holds some of its blocks under the same
        names, in place; returns it. Its tensors are copied, on the device of what they stand beside.

        Raises UserError if something was added already. A prefix belongs to a whole Mistral.
        """
        refuse_added(module)
        if isinstance(self.config, LoraConfig):
            attach_lora(module, self.config)
        elif isinstance(module, Mistral):
            add_prefix(module, self.config)
        with torch.no_grad():
            for name, parameter in added_tensors(module).items():
                parameter.copy_(self.tensors[name])
        return module


def added_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of what was added to `model`, by our names; they are its own, detached."""
    found = dict[str, Tensor]()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False) if isinstance(module, Added) else ():
            ours = key if isinstance(module, Prefix) else f"{name}.{'weight' if key == 'trained' else key}"
            found[ours] = parameter.detach()
    return found


def expected_shapes(config: LoraConfig | PrefixConfig, sizes: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of such an adapter on a base of these sizes, by our name, in the model's order."""
    if isinstance(config, PrefixConfig):
        return {"prompt_embeddings": (config.n_tokens, prefix_width(sizes))}
    shapes = dict[str, tuple[int, ...]]()
    for spec in tensor_specs(sizes):
        if spec.is_projection and config.adapts(spec.module):
            rank = config.rank_of(spec.module)
            shapes[f"{spec.module}.lora_A"] = (rank, spec.shape[1])
            shapes[f"{spec.module}.lora_B"] = (spec.shape[0], rank)
            if config.dora:
                shapes[f"{spec.module}.lora_magnitude_vector"] = spec.shape[:1]
        elif not spec.is_projection and config.saves(spec.module):
            shapes[spec.name] = spec.shape
    return shapes


def read_exactly(
    file: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], why: str
) -> dict[str, Tensor]:
    """The tensors of `file` by our names, float32: all of `keys` (our name -> the file's) and no others.

    Raises UserError if one is missing, unknown, misshapen, no float or not finite. why: what implies the shapes
    """
    held, names = read_header(file), {key: name for name, key in keys.items()}
    for key in sorted(names.keys() - held.keys()):
        raise UserError(f"{file}: lacks {key}, which {why} asks for")
    for key, entry in held.items():
        if key not in names:
            raise UserError(f"{file}: holds {short(key)}, which {why} does not ask for on this model")
        if entry.dtype not in FLOATS:
            raise UserError(f"{file}: {key} is stored as {entry.dtype}; only {', '.join(FLOATS)} can be read")
        if entry.shape != (wanted := shapes[names[key]]):
            raise UserError(f"{file}: {key} has shape {short(entry.shape)}; {why} and base want {wanted}")
    tensors = {name: held[key].read().float() for name, key in keys.items()}
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, f"{file}: {keys[name]}", "the file is damaged, or its training has failed")
    return tensors


def refuse_other(read_back: Mapping[str, Tensor], meant: Mapping[str, Tensor], folder: str | Path) -> None:
    """Raise UserError if the tensors of a file just written are not those that were meant."""
    for name, tensor in meant.items():
        if not torch.equal(read_back[name], tensor.float().cpu()):
            raise UserError(f"{folder}: not written: read back, {name} differs; is the disk sound? save it again")
