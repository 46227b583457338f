"""One .safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes end to end.

    {"name": {"dtype": "BF16", "shape": [o, i], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}

The header is checked here before anything is read from the file, by the format's own rules
(https://github.com/huggingface/safetensors#format): the tensors cover the data without overlap, hole or rest, and each
has as many bytes as its shape and type say. Writing streams: the header is known beforehand, so one tensor at a time
needs memory.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.checkpoint.json_file import MAX_BYTES, parse_object, short
from minilora.errors import UserError

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what a weight may be stored in
_NAME_OF = {dtype: name for name, dtype in FLOATS.items()}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """One line of a header: where a tensor lies, and what it is. `dtype` is the format's name, such as "BF16"."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The whole tensor, on the CPU in the file's dtype."""
        with _open(self.file) as file:
            tensor: Tensor = file.get_tensor(self.key)
        return tensor

    def read_ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last row (a vector's first and last number), without touching what lies between."""
        with _open(self.file) as file:
            rows = file.get_slice(self.key)
            return rows[:1], rows[self.shape[0] - 1 :]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """`safe_open`, which can still fail where the file changed after its header was read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors of `file` by key. Raises UserError "corrupt safetensors: FILE: reason" if the header is not sound."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; the checkpoint is not complete")
    try:
        header, data_bytes = _parse_header(file)
        return {key: TensorEntry(file, key, *found) for key, found in _tensors(header, data_bytes).items()}
    except (OSError, ValueError) as error:
        raise UserError(f"corrupt safetensors: {file}: {error}") from None


def _parse_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of `file`, and the number of bytes that follow it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size < 8:
            raise ValueError(f"truncated: {size} bytes, fewer than the 8 of the header's length")
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > MAX_BYTES:
            raise ValueError(f"the header claims {length:,} bytes; at most {MAX_BYTES:,} are allowed")
        if 8 + length > size:
            raise ValueError(f"truncated: the header claims {length:,} bytes, the file has {size - 8:,} more")
        try:
            return parse_object(opened.read(length)), size - 8 - length
        except ValueError as error:
            raise ValueError(f"bad header: {error}") from None


def _tensors(header: dict[str, Any], data_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape by key, after every rule about offsets. Raises ValueError."""
    header.pop("__metadata__", None)
    spans = []
    tensors = {}
    for key, line in header.items():
        dtype, shape, begin, end = _parse_line(key, line)
        needed = prod(shape) * _ITEM_BYTES[dtype]
        if end - begin != needed:
            raise ValueError(
                f"tensor {short(key)}: {dtype} of shape {short(shape)} has {short(needed)} bytes, not {end - begin:,}"
            )
        spans.append((begin, end, key))
        tensors[key] = (dtype, shape)
    covered = 0
    for begin, end, key in sorted(spans):
        if begin != covered:
            raise ValueError(
                f"tensor {short(key)}: {'overlaps the one before' if begin < covered else 'leaves a hole'}"
            )
        covered = end
    if covered > data_bytes:
        raise ValueError(f"truncated: the tensors have {covered:,} bytes, the file holds {data_bytes:,}")
    if covered < data_bytes:
        raise ValueError(f"{data_bytes - covered:,} bytes too many after the last tensor")
    return tensors


def _parse_line(key: str, line: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one tensor, each of the right type and range. Raises ValueError."""
    if not isinstance(line, dict) or set(line) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {short(key)}: dtype, shape and data_offsets were expected, not {short(line)}")
    dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"tensor {short(key)}: unknown dtype {short(dtype)}")
    if not _whole_numbers(shape) or len(shape) > 8:
        raise ValueError(f"tensor {short(key)}: bad shape {short(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {short(key)}: bad data_offsets {short(offsets)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _whole_numbers(value: Any) -> bool:
    """A list of integers from 0 to 2^63 - 1 (`True` is none)."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def write_safetensors(
    file: Path,
    tensors: Iterable[Tensor],
    lines: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> None:
    """Write `tensors`, one at a time, under the keys of `lines` and in their order.

    lines: key, dtype and shape of each; a tensor that differs raises ValueError, as does one too many or too few
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, dtype, shape in lines:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data then starts aligned
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(encoded)) + encoded)
        for (key, dtype, shape), tensor in zip(lines, tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, but {dtype} {shape} was announced")
            opened.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
