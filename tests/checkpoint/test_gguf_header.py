"""GGUF's header: what the package that owns the format reads, and lengths that lie."""

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from minilora.checkpoint.gguf_file import read_gguf
from minilora.errors import UserError

KEYS: dict[str, tuple[str, Any]] = {
    "a.uint8": ("add_uint8", 200),
    "a.int8": ("add_int8", -7),
    "a.uint16": ("add_uint16", 40_000),
    "a.int16": ("add_int16", -300),
    "a.uint32": ("add_uint32", 2**32 - 1),
    "a.int32": ("add_int32", -(2**31)),
    "a.uint64": ("add_uint64", 2**64 - 1),
    "a.int64": ("add_int64", -(2**63)),
    "a.float32": ("add_float32", 0.1),
    "a.float64": ("add_float64", 0.1),
    "a.bool": ("add_bool", True),
    "a.text": ("add_string", "日本\n"),
    "a.texts": ("add_array", ["a", "", "ü"]),
    "a.numbers": ("add_array", [1.5, -2.0, 0.0]),
    "a.flags": ("add_array", [True, False]),
    "a.whole": ("add_array", [1, -2, 3]),
}


def written(file: Path, alignment: int = 32) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, (add, value) in KEYS.items():
        getattr(writer, add)(key, value)
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("y", np.zeros((4, 64), np.float16))
    q8 = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("z", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("alignment", [32, 256])
def test_every_kind_of_value_is_read_as_its_owner_reads_it(tmp_path: Path, alignment: int) -> None:
    file = written(tmp_path / "m.gguf", alignment)
    theirs = gguf.GGUFReader(file)
    keys, tensors = read_gguf(file)
    expected = {name: field.contents() for name, field in theirs.fields.items()}
    for counted in ("GGUF.tensor_count", "GGUF.kv_count"):
        del expected[counted]
    assert keys == expected
    assert keys["a.uint64"] == 2**64 - 1
    assert tensors == [(t.name, tuple(t.shape[::-1].tolist()), t.tensor_type.name, t.n_bytes) for t in theirs.tensors]


@pytest.mark.parametrize("key", ["a.texts", "a.numbers", "a.flags", "a.whole"])
@pytest.mark.parametrize("length", [4, 10**6, 2**31, 2**62, 2**64 - 1])
def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path: Path, key: str, length: int) -> None:
    """The package's reader goes on beyond the end, an element at a time."""
    file = written(tmp_path / "m.gguf")
    data = bytearray(file.read_bytes())
    struct.pack_into("<Q", data, data.index(key.encode()) + len(key) + 8, length)
    file.write_bytes(data)
    began = time.process_time()
    with pytest.raises(UserError, match=r"m\.gguf: not a whole GGUF file: .*; export it again"):
        read_gguf(file)
    assert time.process_time() - began < 1


def spoilt(data: bytes, at: int, format_: str, value: int) -> bytes:
    made = bytearray(data)
    struct.pack_into(format_, made, at, value)
    return bytes(made)


def test_headers_that_lie(tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf")
    data = file.read_bytes()
    tensor = data.index(struct.pack("<Q", 1) + b"x") + 9  # dimensions, 3, 2, type, offset
    kind = data.index(b"a.uint8") + 7
    for made, says in {
        b"GGML" + data[4:]: "does not begin with GGUF",
        spoilt(data, 4, ">I", 3): "does not begin with GGUF",  # big-endian
        spoilt(data, 8, "<Q", 2**40): "announces 1,099,511,627,776 values",
        spoilt(data, 16, "<Q", 2**63): "announces 9,223,372,036,854,775,808 values",
        spoilt(data, 24, "<Q", 2**50): "ends within 1,125,899,906,842,624 bytes",
        spoilt(data, kind, "<I", 13): "a value of kind 13",
        spoilt(data, data.index(b"a.whole") + 11, "<I", 9): "an array holds arrays",
        data.replace(b"a.int8", b"a.bool"): "the key 'a.bool' stands twice",
        data.replace(b"a.text\x08", b"\xff.text\x08"): "utf-8",
        spoilt(data, tensor, "<I", 2**31): "tensor 'x' has 2,147,483,648 dimensions",
        spoilt(data, tensor + 4, "<Q", 2**62): "it ends before 'x' does",
        spoilt(data, tensor + 20, "<I", 999): "999 is not a valid GGMLQuantizationType",
        spoilt(data, tensor + 20, "<I", 8): "'x' stands twice, or its rows are no whole blocks",
        data.replace(b"\x01\0\0\0\0\0\0\0y", b"\x01\0\0\0\0\0\0\0x"): "'x' stands twice",
        spoilt(data, tensor + 24, "<Q", 2**62): "it ends before 'x' does",
        data[:-65]: "it ends before 'z' does",
    }.items():
        file.write_bytes(made)
        with pytest.raises(UserError, match=f"not a whole GGUF file: .*{says}"):
            read_gguf(file)
    for alignment in (0, 2**31):
        file = written(tmp_path / "aligned.gguf", 64)
        at = file.read_bytes().index(b"general.alignment") + len("general.alignment") + 4
        file.write_bytes(spoilt(file.read_bytes(), at, "<I", alignment))
        with pytest.raises(UserError, match=f"general.alignment is {alignment}"):
            read_gguf(file)
    for missing in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UserError, match=r"not a whole GGUF file: .*(No such file|Is a directory)"):
            read_gguf(missing)
