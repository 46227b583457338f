"""Where the memory goes: bytes by owner, predicted from a configuration and measured on a model.

NF4 weight: 1/2 byte; absmax: 4/64, or with double quantization 1/64 + 4/(64 * 256) bytes a weight
adapter: 4 bytes a parameter, as much again for its gradient, twice as much for Adam's two moments
"""

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from minilora.config import LoraConfig, ModelConfig
from minilora.linear import NF4Linear
from minilora.lora import LoRALinear
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

DenseDtype = Literal["float32", "bfloat16", "float16"]
Storage = DenseDtype | Literal["nf4", "nf4 double-quantized"]
_DENSE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linear layers of a block."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "q_proj": (q, config.dim),
        "k_proj": (kv, config.dim),
        "v_proj": (kv, config.dim),
        "o_proj": (config.dim, q),
        "gate_proj": (config.hidden_dim, config.dim),
        "up_proj": (config.hidden_dim, config.dim),
        "down_proj": (config.dim, config.hidden_dim),
    }


def predict(config: ModelConfig, storage: Storage, dense: DenseDtype, lora: LoraConfig | None) -> dict[str, int]:
    """Bytes by owner of a model at rest and of what training adapters adds; activations are not in it.

    storage: of the blocks' linear layers; dense: of embeddings, head and norms
    """
    shapes = projection_shapes(config)
    sizes = [out * in_ for out, in_ in shapes.values()] * config.n_layers
    owners: dict[str, int] = {}
    if storage in _DENSE_BYTES:
        owners["linear weights"] = sum(sizes) * _DENSE_BYTES[storage]
    else:
        blocks = [-(-n // BLOCK_SIZE) for n in sizes]
        nested = storage == "nf4 double-quantized"
        owners["packed weights"] = sum(-(-n // 2) for n in sizes)
        owners["absmax"] = sum(b + 4 * -(-b // NESTED_BLOCK_SIZE) + 4 if nested else 4 * b for b in blocks)
    owners["embeddings, head, norms"] = (config.n_parameters - sum(sizes)) * _DENSE_BYTES[dense]
    if lora is not None:
        adapter = config.n_layers * lora.rank * sum(sum(shapes[t]) for t in lora.targets) * 4
        owners |= {"adapters": adapter, "gradients": adapter, "optimizer": 2 * adapter}
    return owners


def measure(model: nn.Module) -> dict[str, int]:
    """Bytes by owner of a model's tensors, counted once each, with the owners that `predict` has."""
    owners: dict[str, int] = {}
    seen: set[int] = set()

    def add(owner: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            owners[owner] = owners.get(owner, 0) + tensor.nbytes

    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            add("packed weights", module.packed)
            for part in (module.absmax, module.nested_absmax, module.nested_offset):
                add("absmax", part)
        elif isinstance(module, LoRALinear):
            for parameter in (module.lora_A, module.lora_B):
                add("adapters", parameter)
                add("gradients", parameter.grad)
        else:
            is_block_linear = isinstance(module, nn.Linear) and name.startswith("layers.")
            for parameter in module.parameters(recurse=False):
                add("linear weights" if is_block_linear else "embeddings, head, norms", parameter)
    return owners


def private_bytes() -> int:
    """Memory that is this process's own (RssAnon): without mapped files, which the system can take back at any time."""
    status = Path("/proc/self/status")
    if not status.exists():
        return max_rss_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def max_rss_bytes() -> int:
    """The most memory this process ever had resident, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class PeakMemory:
    """The largest reading at the moments that `note` is called, and on a GPU the allocator's own peak."""

    device: torch.device
    private: int = field(default=0)

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def note(self) -> None:
        self.private = max(self.private, private_bytes())

    def now_bytes(self) -> int:
        """What counts on this device: its allocated memory, or a CPU process's private memory."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else private_bytes()

    def summary(self) -> dict[str, int]:
        peaks = {"private": self.private, "max_rss": max_rss_bytes()}
        if self.device.type == "cuda":
            peaks["device_allocated"] = torch.cuda.max_memory_allocated(self.device)
            peaks["device_reserved"] = torch.cuda.max_memory_reserved(self.device)
        return peaks
