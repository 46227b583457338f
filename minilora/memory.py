"""Where the memory goes, measured: bytes by owner of a model's tensors; what this process takes, and what there is.

The owners are those of the predictions, `memory_at_rest.py` and `memory_of_step.py`. What a real step takes,
benchmarks/watch.py sees, without their formulas.
"""

import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.adamw import FlatAdamW
from minilora.linear import NF4Linear
from minilora.lora import Added, LoRALinear

CGROUPS = (  # what a container may have, has, and has of files: version 2 and 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
)


def measure(model: nn.Module, optimizer: FlatAdamW | None = None) -> dict[str, int]:
    """Bytes by owner of a model's tensors, counted once each, with the owners that `memory_at_rest.predict` has."""
    return add_up(*named_storages(model, optimizer).values())


def named_storages(model: nn.Module, optimizer: FlatAdamW | None = None) -> dict[int, dict[str, int]]:
    """Bytes by owner of a model's tensors, their gradients and an optimizer's state, by the address of the storage that
    they lie in, which several may share."""
    owned = list[tuple[str, Tensor | None]]()
    for name, module in model.named_modules():
        owner = "embeddings, head, norms"
        if isinstance(module, NF4Linear):
            absmax = (module.absmax, module.nested_absmax, module.nested_offset)
            owned += [("packed weights", module.packed), *(("absmax", part) for part in absmax)]
        elif isinstance(module, Added):
            owner = "adapters"
            owned += [(owner, module.squared_rows)] if isinstance(module, LoRALinear) else []
        elif isinstance(module, nn.Linear) and name.startswith("layers."):
            owner = "linear weights"
        for parameter in module.parameters(recurse=False):
            owned += [(owner, parameter), ("gradients", parameter.grad)]
    for moments in optimizer.state.values() if optimizer else ():
        owned += [("optimizer", moment) for moment in moments.values()]
    found = dict[int, dict[str, int]]()
    for owner, part in {part.data_ptr(): (owner, part) for owner, part in owned if part is not None}.values():
        owners = found.setdefault(part.untyped_storage()._cdata, {})
        owners[owner] = owners.get(owner, 0) + part.nbytes
    return found


def add_up(*parts: dict[str, int]) -> dict[str, int]:
    """Owner by owner."""
    owners = dict.fromkeys(owner for part in parts for owner in part)
    return {owner: sum(part.get(owner, 0) for part in parts) for owner in owners}


def one_line(predicted: Mapping[str, int]) -> str:
    """The prediction in one line."""
    shares = ", ".join(f"{owner} {as_text(n)}" for owner, n in predicted.items())
    return f"memory: {as_text(sum(predicted.values()))} predicted at its peak: {shares}"


def as_text(n_bytes: float) -> str:
    """In GB (1e9 bytes), small numbers in MB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def free_bytes(device: torch.device) -> float:
    """What a run can have: a GPU's free memory; on a CPU what the system, or a container's limit, leaves, and what this
    process has of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = [n_bytes for name, n_bytes in _proc_bytes("meminfo").items() if name == "MemAvailable"]
    for folder, limit, used, cache in CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # there is none; or its limit is "max"
            found = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            limit_bytes, used_bytes = (int(Path(folder, name).read_text()) for name in (limit, used))
            available.append(limit_bytes - used_bytes + int(found[cache]))  # which the system takes back
    return min(available) + private_bytes() if available else inf


def private_bytes() -> int:
    """Memory that is this process's own (RssAnon): without mapped files, which the system can take back at any time."""
    return _proc_bytes("self/status").get("RssAnon") or max_rss_bytes()


def _proc_bytes(file: str) -> dict[str, int]:
    """What a file of /proc says of memory; nothing where there is none."""
    path = Path("/proc", file)
    lines = (line.split() for line in path.read_text().splitlines()) if path.exists() else ()
    return {name[:-1]: 1024 * int(rest[0]) for name, *rest in lines if rest[1:] == ["kB"]}


def max_rss_bytes() -> int:
    """The most memory this process had resident, mapped files included, since `PeakMemory.start` or ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class PeakMemory:
    """The most private memory between any `start` and `note`, and on a GPU the allocator's own peaks.

    Linux counts a process's largest resident size and begins anew when told so; mapped files are taken off. Where it
    cannot be told, what is private at the moments of `note` counts.
    """

    device: torch.device
    private: int = 0
    resident: int = 0  # the most before the count began anew, which resets the system's own
    device_allocated: int = 0
    device_reserved: int = 0
    _counts_anew: bool = False

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.resident = max(self.resident, max_rss_bytes())
        with suppress(OSError):
            self._counts_anew = Path("/proc/self/clear_refs").write_text("5") == 1

    def note(self) -> None:
        status = _proc_bytes("self/status")
        resident = status["VmHWM"] - status["RssFile"] - status["RssShmem"] if self._counts_anew else 0
        self.private = max(self.private, private_bytes(), resident)
        if self.device.type == "cuda":
            self.device_allocated = max(self.device_allocated, torch.cuda.max_memory_allocated(self.device))
            self.device_reserved = max(self.device_reserved, torch.cuda.max_memory_reserved(self.device))

    def now_bytes(self) -> int:
        """What counts on this device: its allocated memory, or a CPU process's private memory."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else private_bytes()

    def summary(self) -> dict[str, int]:
        of_device = {"device_allocated": self.device_allocated, "device_reserved": self.device_reserved}
        own = {"private": self.private, "max_rss": max(self.resident, max_rss_bytes())}
        return own | (of_device if self.device_reserved else {})


def peak_bytes(summary: Mapping[str, int]) -> int:
    """Of a `PeakMemory.summary` what counts: a GPU's allocated memory, or a CPU process's private one; 0 if it has
    neither."""
    return summary.get("device_allocated", summary.get("private", 0))
