"""Headers that lie, and writing as the format's owner reads it."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import raw_safetensors

from minilora.checkpoint import files
from minilora.checkpoint.safetensors_file import checksum, read_header, write_safetensors, write_tensors
from minilora.errors import UserError


def line(begin: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: 0 bytes"),
    "short length": (b"\x01\x00", "truncated: 2 bytes"),
    "truncated header": (raw_safetensors({"a": line(0, 16)})[:20], "truncated: the header claims"),
    "truncated data": (raw_safetensors({"a": line(0, 16)}, b"x" * 15), "truncated: the tensors have 16 bytes.* 15"),
    "trailing bytes": (raw_safetensors({"a": line(0, 16)}, b"x" * 17), "1 bytes too many after the last tensor"),
    "length 2^63": (raw_safetensors({}, length=2**63), "header claims 9,223,372,036,854,775,808 bytes"),
    "length 200 MB": (raw_safetensors({}, length=200_000_000), "header claims 200,000,000 bytes; at most"),
    "bad json": (raw_safetensors(b'{"a": '), "bad header: Expecting value"),
    "not an object": (raw_safetensors(b"[]"), "bad header: a JSON object was expected"),
    "not utf-8": (raw_safetensors(b'{"\xff": 1}'), "bad header: .*utf-8"),
    "nested": (raw_safetensors(b"[" * 100_000), "bad header: nested too deeply"),
    "twice": (raw_safetensors(b'{"a": 1, "a": 2}'), "bad header: the key 'a' stands twice"),
    "overlap": (raw_safetensors({"a": line(0, 16), "b": line(8, 24)}, b"x" * 24), "'b': overlaps the one before"),
    "hole": (raw_safetensors({"a": line(0, 16), "b": line(20, 36)}, b"x" * 36), "'b': leaves a hole"),
    "hole at the start": (raw_safetensors({"a": line(4, 20)}, b"x" * 20), "'a': leaves a hole"),
    "too few bytes": (raw_safetensors({"a": line(0, 12)}, b"x" * 12), r"'a': F32 of shape \(4,\) has 16 bytes, not 12"),
    "overflow": (raw_safetensors({"a": line(0, 0, (2**62, 4))}), "'a': F32 of shape .* not 0"),
    "overflow to zero": (raw_safetensors({"a": line(0, 0, (2**32, 2**32))}), "'a': F32 of shape .* not 0"),
    "huge dimension": (raw_safetensors({"a": line(0, 0, (2**63,))}), "'a': bad shape"),
    "negative dimension": (raw_safetensors({"a": line(0, 16, (-4,))}, b"x" * 16), "'a': bad shape"),
    "fractional dimension": (raw_safetensors({"a": line(0, 16, (4.0,))}, b"x" * 16), "'a': bad shape"),
    "shape true": (raw_safetensors({"a": line(0, 4, (True,))}, b"x" * 4), "'a': bad shape"),
    "shape no list": (raw_safetensors({"a": line(0, 16, "4")}, b"x" * 16), "'a': bad shape"),
    "nine dimensions": (raw_safetensors({"a": line(0, 4, (1,) * 9)}, b"x" * 4), "'a': bad shape"),
    "unknown dtype": (raw_safetensors({"a": line(0, 16, dtype="F31")}, b"x" * 16), "'a': unknown dtype 'F31'"),
    "dtype no string": (raw_safetensors({"a": line(0, 16, dtype=["F32"])}, b"x" * 16), "'a': unknown dtype"),
    "offsets reversed": (raw_safetensors({"a": line(16, 0)}, b"x" * 16), "'a': bad data_offsets"),
    "negative offset": (raw_safetensors({"a": line(-16, 0)}, b"x" * 16), "'a': bad data_offsets"),
    "no offsets": (raw_safetensors({"a": {"dtype": "F32", "shape": [4]}}), "'a': dtype, shape and data_offsets"),
    "metadata no object": (raw_safetensors({"__metadata__": ["a"]}), "__metadata__ must be an object of texts"),
    "metadata false": (raw_safetensors({"__metadata__": False}), "__metadata__ must be an object of texts, not False"),
    "metadata no text": (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__ must be an object of texts"),
    "a number": (raw_safetensors({"a": 3}), "'a': dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_refused(tmp_path: Path, case: str) -> None:
    content, reason = CORRUPT[case]
    file = tmp_path / "model-00001-of-00002.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^corrupt safetensors: {file}: .*{reason}"):
        read_header(file)


def test_a_file_that_may_not_be_read_is_not_called_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may read everything, so the system is told to refuse."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"^{file}: cannot be read: Permission denied$"):
        read_header(file)


def test_sound_files_pass(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.zeros(0, 4), "c": torch.ones((), dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert {key: entry.shape for key, entry in entries.items()} == {"a": (3, 5), "b": (0, 4), "c": ()}
    assert torch.equal(entries["a"].read(), tensors["a"])
    first, last = entries["a"].read_ends(5 * 4)
    assert torch.equal(first.view(torch.float32), tensors["a"][0])
    assert torch.equal(last.view(torch.float32), tensors["a"][-1])


def test_a_missing_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    for name in ("none.safetensors", "pipe.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: no such file"):
            read_header(tmp_path / name)


def test_a_file_changed_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, file)
    entry = read_header(file)["a"]
    file.write_bytes(b"gone")
    with pytest.raises(UserError, match=rf"{file}: cannot be read"):
        entry.read()


def test_memory_that_is_not_there_is_no_fault_of_the_file(tmp_path: Path) -> None:
    """Else it would be an OSError, which writers take for one of what they write."""
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(MemoryError):
        read_header(tmp_path / "x.safetensors")["a"].read_bytes(0, 1 << 60)


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "odd.name \N{SNOWMAN}": torch.randn(7, 3),
        "strided": torch.randn(4, 6, dtype=torch.bfloat16).t(),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }
    lines = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", iter(tensors.values()), lines)
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert length % 8 == 0  # so that the data starts aligned
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)
    assert {entry.key for entry in read_header(tmp_path / "x.safetensors").values()} == tensors.keys()


@pytest.mark.parametrize("given", [[], [torch.ones(4)] * 2, [torch.ones(5)], [torch.ones(4).half()]])
def test_tensors_must_be_as_announced(tmp_path: Path, given: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"argument|announced"):
        write_safetensors(tmp_path / "x.safetensors", given, [("a", torch.float32, (4,))])


def test_a_checksum_is_of_all_bytes_as_they_are_written(tmp_path: Path) -> None:
    """Also of more than a piece, of what lies otherwise in memory, and of a single number."""
    long = torch.arange(3 << 20, dtype=torch.float32)
    for tensor in (long.view(3, -1).T, long.bfloat16(), torch.tensor(2.5)):
        write_tensors(tmp_path / "x.safetensors", {"x": tensor})
        data = (tmp_path / "x.safetensors").read_bytes()
        assert checksum(tensor) == zlib.crc32(data[8 + int.from_bytes(data[:8], "little") :])
    changed = long.clone()
    changed[-1] += 1
    assert checksum(changed) != checksum(long)
