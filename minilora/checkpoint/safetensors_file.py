"""One .safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes end to end.

    {"name": {"dtype": "BF16", "shape": [o, i], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}

The header is checked here before anything is read from the file, by the format's own rules
(https://github.com/huggingface/safetensors#format): the tensors cover the data without overlap, hole or rest, and each
has as many bytes as its shape and type say. Reading copies a tensor once, from the file into memory of its own: mapped
memory would change with the file, and a file cut short under a map kills the process. Writing streams: the header is
known beforehand, so one tensor at a time needs memory.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from minilora.checkpoint.files import reading
from minilora.checkpoint.json_file import MAX_BYTES, parse_object, short
from minilora.errors import UserError

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what a weight may be stored in
DTYPES = {**FLOATS, "U8": torch.uint8}  # what we read and write at all
Line = tuple[str, torch.dtype, tuple[int, ...]]  # of a header to write: key, dtype and shape
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_Stamp = tuple[int, int, int]  # inode, size and time of the last change: another one is another file
_LARGE = 1 << 22


@dataclass(frozen=True)
class TensorEntry:
    """One line of a header: where a tensor lies, and what it is. `dtype` is the format's name, such as "BF16"."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    stamp: _Stamp  # of the file when its header was read

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def kind(self) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """dtype and shape of what `read` gives; None for a type that it cannot read."""
        return DTYPES.get(self.dtype), self.shape

    def read(self) -> Tensor:
        """The whole tensor, on the CPU in the file's dtype, which must be one of `DTYPES`."""
        return self.read_bytes(0, self.nbytes).view(DTYPES[self.dtype]).view(self.shape)

    def read_ends(self, n_bytes: int) -> tuple[Tensor, Tensor]:
        """The first and the last `n_bytes` bytes, without touching what lies between."""
        return self.read_bytes(0, n_bytes), self.read_bytes(self.nbytes - n_bytes, n_bytes)

    def read_bytes(self, start: int, n_bytes: int) -> Tensor:
        """Bytes of the tensor, (n_bytes,) uint8. Raises UserError if they cannot be read, or the file has changed."""
        made = _empty(n_bytes)
        with reading(self.file) as opened:
            opened.seek(self.begin + start)
            if opened.readinto(made.numpy().data) < n_bytes:
                raise OSError("it ends too early")
        self.check_unchanged()
        return made

    def check_unchanged(self) -> None:
        """Raise UserError if the file is not the one whose header was read."""
        if not os.path.exists(self.file) or _stamp(self.file) != self.stamp:
            raise UserError(f"{self.file}: changed while it was read; run this again once nothing writes to it")


def _stamp(file: Path) -> _Stamp:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _empty(n_bytes: int) -> Tensor:
    """(n_bytes,) uint8 of memory of its own; huge pages, where the system has them, are filled three times as fast."""
    if n_bytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # no fault of a file, which it would be taken for
        raise MemoryError(f"no {n_bytes:,} bytes to read a tensor into") from error
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors of `file` by key. Raises UserError "corrupt safetensors: FILE: reason" if the header is not sound."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; the checkpoint is not complete")
    try:
        stamp = _stamp(file)
        header, data_begin = _parse_header(file, size=stamp[1])
        tensors = {key: _entry(file, stamp, data_begin, key, line) for key, line in header.items()}
        _check_cover(tensors.values(), data_begin, end=stamp[1])
    except ValueError as error:
        raise UserError(f"corrupt safetensors: {file}: {error}") from None
    return tensors


def _parse_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The lines of the header of `file`, of so many bytes, by key, and where it ends. Raises ValueError."""
    with reading(file) as opened:
        if size < 8:
            raise ValueError(f"truncated: {size} bytes, fewer than the 8 of the header's length")
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > MAX_BYTES:
            raise ValueError(f"the header claims {length:,} bytes; at most {MAX_BYTES:,} are allowed")
        if 8 + length > size:
            raise ValueError(f"truncated: the header claims {length:,} bytes, the file has {size - 8:,} more")
        try:
            header = parse_object(opened.read(length))
        except ValueError as error:
            raise ValueError(f"bad header: {error}") from None
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict | None) or not all(isinstance(text, str) for text in (metadata or {}).values()):
        raise ValueError(f"__metadata__ must be an object of texts, not {short(metadata)}")
    return header, 8 + length


def _entry(file: Path, stamp: _Stamp, data_begin: int, key: str, line: Any) -> TensorEntry:
    """What one line of the header says, each value of the right type and range. Raises ValueError."""
    if not isinstance(line, dict) or set(line) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {short(key)}: dtype, shape and data_offsets were expected, not {short(line)}")
    dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"tensor {short(key)}: unknown dtype {short(dtype)}")
    if not _whole_numbers(shape) or len(shape) > 8:
        raise ValueError(f"tensor {short(key)}: bad shape {short(shape)}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {short(key)}: bad data_offsets {short(offsets)}")
    entry = TensorEntry(file, key, dtype, tuple(shape), data_begin + offsets[0], stamp)
    if entry.nbytes != (n_bytes := offsets[1] - offsets[0]):
        needed = f"{dtype} of shape {short(entry.shape)} has {short(entry.nbytes)} bytes"
        raise ValueError(f"tensor {short(key)}: {needed}, not {n_bytes:,}")
    return entry


def _whole_numbers(value: Any) -> bool:
    """A list of integers from 0 to 2^63 - 1 (`True` is none)."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check_cover(entries: Iterable[TensorEntry], begin: int, end: int) -> None:
    """Raise ValueError unless the tensors cover the file's bytes from `begin` to `end`, each of them once."""
    covered = begin
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.nbytes)):
        if entry.begin != covered:
            fault = "overlaps the one before" if entry.begin < covered else "leaves a hole"
            raise ValueError(f"tensor {short(entry.key)}: {fault}")
        covered += entry.nbytes
    if covered > end:
        raise ValueError(f"truncated: the tensors have {covered - begin:,} bytes, the file holds {end - begin:,}")
    if covered < end:
        raise ValueError(f"{end - covered:,} bytes too many after the last tensor")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are all there, under their keys."""
    lines = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    write_safetensors(file, tensors.values(), lines)


def write_safetensors(file: Path, tensors: Iterable[Tensor], lines: Sequence[Line]) -> None:
    """Write `tensors`, one at a time, under the keys of `lines` and in their order.

    lines: a tensor that differs from its line raises ValueError, as does one too many or too few
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers reads no file
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


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes that a file has of the tensor; a GPU's are copied piece by piece, never all at once."""
    value = 0
    for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(1 << 22):
        value = crc32(piece.cpu().numpy().data, value)
    return value
