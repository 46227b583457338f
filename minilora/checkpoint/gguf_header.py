"""What a GGUF file says before its tensors' bytes, read within limits.

    "GGUF"  u32 version 2 or 3   u64 tensors   u64 keys   every number little-endian
    a key      text, u32 kind, value      a text is u64 bytes and UTF-8, an array u32 kind, u64 length and its values
    a tensor   text, u32 dimensions, u64 for each (the last one first), u32 type, u64 where its bytes begin
    then, from the next multiple of general.alignment (32) on, those bytes

The package `gguf` makes an object of each element of an array and believes the lengths that a file states: such as go
beyond its end keep it busy for hours. So the header is read here, by the format's own rules
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minilora.checkpoint.json_file import short

MAX_VALUES = 1 << 22  # of all arrays together: a vocabulary of 131,072 with texts, scores and kinds takes a tenth
_KINDS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
Line = tuple[str, tuple[int, ...], int, int]  # of a tensor: name, shape, number of its type, where its bytes begin


def read_gguf_header(file: Path) -> tuple[dict[str, Any], list[Line]]:
    """The keys of the file, and a line for each tensor. Raises OSError and ValueError."""
    with file.open("rb") as opened:
        header = _Header(opened)
        if header.take(4) != b"GGUF" or (version := header.number("<u4")) not in (2, 3):
            raise ValueError("it does not begin with GGUF and version 2 or 3")
        n_tensors, n_keys = header.number("<u8"), header.number("<u8")
        keys: dict[str, Any] = {}
        for _ in range(header.counted(n_keys)):
            if (key := header.text()) in keys:
                raise ValueError(f"the key {short(key)} stands twice")
            keys[key] = header.value(header.number("<u4"))
        lines = [header.line() for _ in range(header.counted(n_tensors))]
        alignment = keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16:
            raise ValueError(f"general.alignment is {short(alignment)}")
        begin = -(-opened.tell() // alignment) * alignment
    return keys | {"GGUF.version": version}, [(*line[:3], begin + line[3]) for line in lines]


class _Header:
    """The values of an open file, one after another. Every method raises ValueError where it ends or is too long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_VALUES

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > 8 * MAX_VALUES or len(data := self._file.read(n_bytes)) < n_bytes:
            raise ValueError(f"it ends within {n_bytes:,} bytes that it announces")
        return data

    def counted(self, n: int) -> int:
        """n, once it is known not to be too many of anything."""
        self._left -= n
        if self._left < 0:
            raise ValueError(f"it announces {n:,} values, more than the {MAX_VALUES:,} that are read")
        return n

    def number(self, kind: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0])

    def text(self) -> str:
        return self.take(self.number("<u8")).decode()

    def value(self, kind: int) -> Any:
        """A value of a kind by the format's numbers; an array as a list."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        inner, n = self.number("<u4"), self.counted(self.number("<u8"))
        if inner == _ARRAY:
            raise ValueError("an array holds arrays")
        return [self.text() for _ in range(n)] if inner == _TEXT else self._numbers(inner, n)

    def line(self) -> Line:
        name, n_dims = self.text(), self.number("<u4")
        if n_dims > 8:
            raise ValueError(f"tensor {short(name)} has {n_dims:,} dimensions")
        dims = self._numbers(10, n_dims)
        return name, tuple(dims[::-1]), self.number("<u4"), self.number("<u8")

    def _numbers(self, kind: int, n: int) -> list[Any]:
        if kind not in _KINDS:
            raise ValueError(f"it has a value of kind {kind}, which is none of the format's")
        values: list[Any] = np.frombuffer(self.take(n * np.dtype(_KINDS[kind]).itemsize), _KINDS[kind]).tolist()
        return values
