"""What a device can do: which one is used, and what it computes in."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from shutil import which
from sysconfig import get_path
from typing import Literal

import torch

from minilora.compiled import compiles
from minilora.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """The named device; "auto" is the `default_device`. Raises UserError if it is not there.

    A GPU that is named by its number becomes torch's current one: kernels are launched and numbers drawn there.
    """
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device {name!r} cannot be used: {str(error).partition('. ')[0]}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def abilities(device: torch.device) -> str:
    """What the device is: its name, and of a GPU its compute capability, memory in GiB, and whether it has bfloat16."""
    if device.type != "cuda":
        return f"{device.type}, {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_properties(device)
    bfloat16 = "bfloat16" if card.major >= 8 else "no bfloat16"
    return f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB, {bfloat16}"


@dataclass(frozen=True)
class Backend:
    """What computes with NF4, and why."""

    name: Literal["triton", "torch"]
    reason: str


@cache
def backend_for(device: torch.device) -> Backend:
    """The Triton kernels on NVIDIA GPUs since Turing, else the definitions in plain torch."""
    if device.type != "cuda":
        return Backend("torch", "the kernels are for GPUs")
    if torch.version.hip is not None:
        return Backend("torch", "the kernels are counted and tested for NVIDIA's GPUs only")
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return Backend("torch", f"compute capability {capability[0]}.{capability[1]} is below 7.5")
    if find_spec("triton") is None:
        return Backend("torch", "Triton is not installed")
    if lacks := compiler_lacks():
        return Backend("torch", f"Triton finds no {lacks}")
    return Backend("triton", f"compute capability {capability[0]}.{capability[1]}")


def compiler_lacks() -> str | None:
    """What Triton does not find; before its first launch it compiles C that hands kernels to the driver."""
    if not any(map(which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "C compiler (gcc, clang or CC)"
    named = os.pathsep.join(os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")).split(os.pathsep)
    folders = [get_path("include", "posix_prefix"), *filter(None, named)]
    return None if any(os.path.exists(f"{folder}/Python.h") for folder in folders) else "Python.h (python3-dev)"


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels compute there."""
    return backend_for(device).name == "triton"


def told(device: torch.device) -> str:
    """The device, and what computes there, in one line."""
    backend, compiled = backend_for(device), ", what is elementwise compiled to C++" if compiles(device) else ""
    return f"device: {abilities(device)}; computed by {backend.name}{compiled}: {backend.reason}"


def pick_dtype(device: torch.device, name: str = "auto") -> tuple[torch.dtype, str]:
    """The compute dtype and, in a few words, why.

    "auto" is bfloat16 on GPUs that multiply matrices in it (since Ampere), float16 with loss scaling on older ones,
    float32 on a CPU.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        widened = product_dtype_of(dtype, device) != dtype
        return dtype, "asked for" + (", but this CPU multiplies in float32: less memory, no faster" if widened else "")
    if device.type != "cuda":
        return torch.float32, "a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} multiplies in bfloat16"
    return torch.float16, f"compute capability {major}.{minor} has no bfloat16 product; the loss is scaled"


def dtype_name(dtype: torch.dtype) -> str:
    """As files and tables have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products of x are computed in."""
    return product_dtype_of(x.dtype, x.device)


def product_dtype_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of matrices in `dtype` are computed in: that, but float32 on a CPU without 16-bit instructions.

    There torch falls back to loops: on an AVX2 machine a bfloat16 product ran at 1 to 20 GFLOP/s where float32 reached
    180, on one with AVX512 but not AVX512_BF16 at 50 where it reached 240. A product in float32 of numbers rounded to
    16 bits is the same product, summed more exactly.
    """
    return _cpu_product_dtype(dtype) if device.type == "cpu" else dtype


def padded_rows(n: int, dtype: torch.dtype) -> int:
    """How many rows to multiply where there are n: for 16-bit dtypes n rounded up to a multiple of 32, so that on a CPU
    oneDNN meets few sizes of products.

    It makes machine code for each of them, one to two MB, and keeps a thousand.
    """
    return n if dtype.itemsize > 2 else -(-n // 32) * 32


@cache
def _cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bfloat16:
        # oneDNN says yes to any AVX512, and where AVX512_BF16 is missing makes do with float32's.
        emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
        return dtype if not emulated and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if dtype == torch.float16:
        return dtype if torch.ops.mkldnn._is_mkldnn_fp16_supported() else torch.float32
    return dtype
