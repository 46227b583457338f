"""bitsandbytes' 4-bit files: a weight in NF4 and what stands beside it, read strictly and written.

    X.weight                                (n/2, 1) uint8, or the same bytes under the name of another type
    X.weight.absmax                         (blocks,) float32, or their uint8 codes with double quantization
    X.weight.quant_map                      (16,) float32, the levels
    X.weight.nested_absmax                  (blocks/256,) float32       both with double quantization only
    X.weight.nested_quant_map               (256,) float32, the 8-bit map
    X.weight.quant_state.bitsandbytes__nf4  a JSON object as uint8: quant_type, blocksize, dtype, shape, and with double
                                            quantization nested_blocksize, nested_dtype, nested_offset

The bytes are those of `minilora.nf4`, so nothing is repacked. Source: `QuantState.as_dict` and `from_dict` in
https://github.com/bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from minilora.backend import dtype_name
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.json_file import parse_object, short
from minilora.checkpoint.safetensors_file import FLOATS, Line, TensorEntry
from minilora.dynamic_8bit import dynamic_map
from minilora.errors import UserError
from minilora.nf4 import BLOCK_SIZE, CPU, NESTED_BLOCK_SIZE, NF4Tensor, levels

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
_NESTED = {"nested_absmax", "nested_quant_map"}
_NESTED_FIXED = {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
_STATE_BYTES = 256  # as we write it, filled with spaces: its size must stand in the header before the offset is known
_MAX_STATE_BYTES = 4096
_DAMAGED = "the file is damaged, fetch it again"


@dataclass(frozen=True)
class NF4Entry:
    """Where the parts of one weight lie, and what its state says; `read` gives the weight."""

    packed: TensorEntry
    parts: Mapping[str, TensorEntry]
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    nested_offset: float | None

    def read(self) -> NF4Tensor:
        """The weight, its bytes as they are. Raises UserError that names the tensor with wrong numbers in it."""
        self._check_map("quant_map", levels())
        packed, absmax = self.packed.read_bytes(0, self.packed.nbytes), self.parts["absmax"].read()
        if self.nested_offset is None:
            refuse_not_finite(absmax, _where(self.parts["absmax"]), _DAMAGED)
            return NF4Tensor(packed, absmax, self.shape, self.dtype, self.block_size)
        self._check_map("nested_quant_map", dynamic_map(CPU))
        nested_absmax = self.parts["nested_absmax"].read()
        refuse_not_finite(nested_absmax, _where(self.parts["nested_absmax"]), _DAMAGED)
        offset = torch.tensor(self.nested_offset, device=CPU)
        return NF4Tensor(packed, absmax, self.shape, self.dtype, self.block_size, nested_absmax, offset)

    def ends(self) -> tuple[Tensor, ...]:
        """Of the codes and of the absmax, the first and last bytes: at most as many as the codes of a row have."""
        n_bytes = max(1, self.shape[-1] // 2)
        both = (self.packed, self.parts["absmax"])
        return tuple(end for entry in both for end in entry.read_ends(min(n_bytes, entry.nbytes)))

    def _check_map(self, part: str, expected: Tensor) -> None:
        entry = self.parts[part]
        if not torch.allclose(entry.read(), expected, rtol=1e-6, atol=1e-9):  # some writers round it otherwise
            raise UserError(f"{_where(entry)} is not NF4's; only the maps that bitsandbytes writes can be read")


def is_packed(key: str, held: Mapping[str, TensorEntry]) -> bool:
    """Is the weight `key` quantized? Anything beside it says so."""
    return any(f"{key}.{part}" in held for part in PARTS)


def open_nf4(key: str, shape: tuple[int, ...], held: Mapping[str, TensorEntry]) -> NF4Entry:
    """The weight `key`, which shall have `shape`, from the tensors `held`; only its state is read.

    Raises UserError that names file and tensor if a part is missing, misshapen or of a wrong type, or the state is no
    JSON of NF4 in blocks that we know.
    """
    parts = {part: held[f"{key}.{part}"] for part in PARTS if f"{key}.{part}" in held}
    packed, nested = held[key], bool(_NESTED & parts.keys()) or ("absmax" in parts and parts["absmax"].dtype == "U8")
    for part in PARTS:
        if part not in parts and (nested or part not in _NESTED):
            raise UserError(f"{packed.file}: lacks {key}.{part}, without which {key} cannot be dequantized")
    state = _read_state(parts[STATE], shape, nested)
    n, block_size = prod(shape), state["blocksize"]
    for part, (dtype, expected) in _part_lines(n, block_size, nested).items():
        if (entry := parts[part]).kind != (dtype, expected):
            found, wanted = f"{entry.dtype} {short(entry.shape)}", f"{dtype_name(dtype)} {expected}"
            raise UserError(f"{_where(entry)} is {found}; a weight of shape {shape} wants {wanted}")
    if packed.nbytes != (n + 1) // 2:  # of whatever type
        found = f"{packed.nbytes:,} bytes of {packed.dtype}"
        raise UserError(f"{_where(packed)} has {found}; a weight of shape {shape} in NF4 has {(n + 1) // 2:,}")
    dtype = getattr(torch, state["dtype"])
    return NF4Entry(packed, parts, shape, dtype, block_size, float(state["nested_offset"]) if nested else None)


def nf4_lines(key: str, shape: tuple[int, ...], nested: bool) -> list[Line]:
    """The lines of a header that the weight `key` takes."""
    parts = _part_lines(prod(shape), BLOCK_SIZE, nested) | {STATE: (torch.uint8, (_STATE_BYTES,))}
    lines = [(f"{key}.{part}", dtype, part_shape) for part, (dtype, part_shape) in parts.items()]
    return [(key, torch.uint8, ((prod(shape) + 1) // 2, 1)), *lines]


def nf4_tensors(weight: NF4Tensor) -> list[Tensor]:
    """The tensors that belong into `nf4_lines`, in their order."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": dtype_name(weight.dtype),
        "shape": list(weight.shape),
    }
    tensors = [weight.packed[:, None], weight.absmax, levels()]
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        state |= {**_NESTED_FIXED, "nested_offset": weight.nested_offset.item()}
        tensors += [weight.nested_absmax, dynamic_map(CPU)]
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    return [*tensors, torch.frombuffer(bytearray(text), dtype=torch.uint8)]


def _part_lines(n: int, block_size: int, nested: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of what stands beside a weight of n numbers, without its state."""
    n_blocks = -(-n // block_size)
    lines: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "absmax": (torch.uint8 if nested else torch.float32, (n_blocks,)),
        "quant_map": (torch.float32, (16,)),
    }
    if nested:
        lines["nested_absmax"] = (torch.float32, (-(-n_blocks // NESTED_BLOCK_SIZE),))
        lines["nested_quant_map"] = (torch.float32, (256,))
    return lines


def _read_state(entry: TensorEntry, shape: tuple[int, ...], nested: bool) -> dict[str, Any]:
    """The object in the state, every key of it checked."""
    if entry.dtype != "U8" or entry.nbytes > _MAX_STATE_BYTES:
        found = f"{entry.nbytes:,} bytes of {entry.dtype}"
        raise UserError(f"{_where(entry)} has {found}; at most {_MAX_STATE_BYTES:,} of U8 are read")
    try:
        state = parse_object(bytes(entry.read_bytes(0, entry.nbytes).numpy()))
    except ValueError as error:
        raise UserError(f"{_where(entry)} is not a readable JSON object: {error}") from None
    allowed: dict[str, list[Any]] = {
        "quant_type": ["nf4"],
        "blocksize": [2**i for i in range(5, 13)],
        "dtype": [*map(dtype_name, FLOATS.values())],
        "shape": [list(shape)],
    }
    if nested:
        offset: Any = state.get("nested_offset")
        if type(offset) not in (int, float) or not abs(offset) < torch.finfo(torch.float32).max:  # false for NaN, too
            raise UserError(f"{_where(entry)}: nested_offset is {short(offset)}, but must be a finite number")
        allowed |= {key: [value] for key, value in {**_NESTED_FIXED, "nested_offset": offset}.items()}
    for key in sorted(allowed.keys() | state.keys()):
        if repr(state.get(key)) not in map(repr, allowed.get(key, [])):  # 64.0 and true are other values than 64 and 1
            wanted = " or ".join(map(str, allowed.get(key, ["absent"])))
            raise UserError(f"{_where(entry)}: {key} is {short(state.get(key))}; it must be {wanted}")
    return state


def _where(entry: TensorEntry) -> str:
    return f"{entry.file}: {entry.key}"
