"""NF4, the 4-bit NormalFloat of QLoRA (https://arxiv.org/abs/2305.14314), in plain torch: the definition.

A weight is cut into blocks of 64 numbers. Each block keeps its largest magnitude, absmax, and every number becomes
the nearest of 16 fixed levels times that absmax:

    code[i] = number of thresholds strictly below w[i] / absmax[i // 64]
    w'[i]   = LEVELS[code[i]] * absmax[i // 64]

The levels are quantiles of the normal distribution, so that normally distributed weights use them about equally often.
Double quantization stores the absmax themselves in 8 bits: their mean is taken off, and what is left is coded in blocks
of 256 on the dynamic map (`dynamic_8bit.py`):

    absmax[b] = MAP[absmax_code[b]] * nested_absmax[b // 256] + nested_offset

Layout in memory, the bytes of bitsandbytes 0.50: the weight is flattened row by row, blocks run on across row ends, the
last one may be short. Two codes make a byte, the first in the high nibble; an odd last byte is filled with the code of
zero. bits per weight: 4 + 32/64 = 4.5, or with double quantization 4 + 8/64 + 32/(64 * 256) = 4.127.

What differs from bitsandbytes: numbers that are not finite are refused; a block of zeros has code 7 (zero) and absmax 0
in every position (its CUDA code writes code 0, its CPU code an absmax of 1e-38 in a short last block).
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import Tensor

from minilora.compiled import compilable, compiles
from minilora.dynamic_8bit import DYNAMIC_BLOCK_SIZE, dynamic_map, encode_dynamic, in_blocks
from minilora.errors import UserError
from minilora.scratch import scratch

BLOCK_SIZE = 64
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = DYNAMIC_BLOCK_SIZE
# Numbers in work at a time. On a CPU a chunk's temporaries (0.8 to 3 MB) stay in the cache, which is worth a factor of
# three; on a GPU a chunk only has to be worth its launches.
_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 24
_PAIR_INT = {torch.float32: torch.int64, torch.bfloat16: torch.int32}  # holds two, the first in its low half
CPU = torch.device("cpu")

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def derive_levels() -> Tensor:
    """The 16 levels from their derivation, (16,) float32: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.

    Eight quantiles lie above zero and seven below (paper, section 3). The outermost probability, which keeps them
    finite, is ((1 - 1/30) + (1 - 1/32)) / 2, rounded to seven digits as in bitsandbytes' `create_normal_map`.
    """
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8)[:-1].double())
    quantiles = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values.float()
    return quantiles / quantiles.max()


@cache
def levels(device: torch.device = CPU) -> Tensor:
    """LEVELS as a tensor, (16,) float32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def thresholds(device: torch.device = CPU) -> Tensor:
    """Midpoints between neighbouring levels, (15,) float32: where one code ends and the next begins."""
    return (levels(device)[:-1] + levels(device)[1:]) / 2


@cache
def _level_pairs(device: torch.device) -> Tensor:
    """Both levels of every byte, two float32 in one int64, (256,): one look-up decodes two weights."""
    byte = torch.arange(256, device=device)
    return levels(device)[torch.stack([byte >> 4, byte & 15], dim=1)].view(torch.int64).view(-1)


def chunk_of(device: torch.device) -> int:
    """Numbers in work at a time: whole blocks, whatever the block size is."""
    return _CHUNK if device.type == "cpu" else _GPU_CHUNK


@dataclass(frozen=True)
class NF4Tensor:
    """A weight in NF4.

    packed: (ceil(n/2),) uint8, two codes a byte
    absmax: (ceil(n/64),) float32; with double quantization their uint8 codes
    nested_absmax, nested_offset: (ceil(n/64/256),) and () float32, with double quantization only
    shape, dtype: of the weight that was quantized; block_size: numbers that share an absmax
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = BLOCK_SIZE
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def n(self) -> int:
        return prod(self.shape)

    @property
    def parts(self) -> list[Tensor]:
        """All that is stored."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return [part for part in parts if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def codes(self) -> Tensor:
        """The 4-bit codes one by one, (n,) uint8."""
        return unpack(self.packed, self.n)

    def block_absmax(self, first: int = 0, last: int | None = None) -> Tensor:
        """The absmax of the blocks first..last, (last - first,) float32, decoded if they are stored in 8 bits."""
        absmax = self.absmax[first:last]
        if self.nested_absmax is None or self.nested_offset is None:
            return absmax
        scaled = dynamic_map(absmax.device).index_select(0, absmax.int())
        skipped, stop = first % NESTED_BLOCK_SIZE, -(-(first + len(absmax)) // NESTED_BLOCK_SIZE)
        nested = self.nested_absmax[first // NESTED_BLOCK_SIZE : stop].repeat_interleave(NESTED_BLOCK_SIZE)
        return scaled.mul_(nested[skipped : skipped + len(scaled)]).add_(self.nested_offset)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """LEVELS[code] * absmax, computed in float32 and rounded once to `dtype` (the original one if None).

        out: a contiguous tensor of the weight's shape to write into, its dtype then counts. New memory costs a CPU more
            than the decoding: its pages are mapped one by one as they are first touched.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        if tuple(out.shape) != self.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}, the weight has {self.shape}")
        self.decode(0, self.n, out.view(-1))
        return out

    def decode(self, start: int, stop: int, out: Tensor) -> None:
        """Dequantize the numbers start..stop (counted flat) into `out` (stop - start,), of any floating-point dtype.

        start: a multiple of the block size
        """
        device, size = self.packed.device, self.block_size
        if compiles(device) and len(out) % size == 0 and out.dtype in _PAIR_INT and out.storage_offset() % 2 == 0:
            bytes_ = self.packed[start // 2 : stop // 2].view(-1, size // 2)
            into, absmax = out.view(_PAIR_INT[out.dtype]).view(-1, size // 2), self.absmax[start // size : stop // size]
            group, first = divmod(start // size, NESTED_BLOCK_SIZE)
            nested = None if self.nested_absmax is None else self.nested_absmax[group:]
            _decode_pairs(bytes_, absmax, into, dynamic_map(device), nested, self.nested_offset, first)
            return
        pairs, chunk = _level_pairs(device), chunk_of(device)
        index = scratch("index", min(chunk, stop - start + 1) // 2, torch.int32, device)
        decoded = scratch("pairs", len(index), torch.int64, device)
        packed, absmax = self.packed[start // 2 : -(-stop // 2)], self.block_absmax(start // size, -(-stop // size))
        chunks = zip(packed.split(chunk // 2), absmax.split(chunk // size), out.split(chunk), strict=True)
        for codes, scales, into in chunks:
            n_bytes, n = len(codes), len(into)
            torch.index_select(pairs, 0, index[:n_bytes].copy_(codes), out=decoded[:n_bytes])
            values = decoded.view(torch.float32)[:n]
            whole, blocks = n // size * size, (-1, size)
            product = into if into.dtype == torch.float32 else values  # an `out` of 16 bits is slow: rounded after
            torch.mul(values[:whole].view(blocks), scales[: whole // size, None], out=product[:whole].view(blocks))
            if whole < n:  # the short block at the end
                torch.mul(values[whole:], scales[-1], out=product[whole:])
            if product is not into:
                into.copy_(product)


@compilable
def _decode_pairs(
    packed: Tensor, absmax: Tensor, out: Tensor, table: Tensor, nested: Tensor | None, offset: Tensor | None, first: int
) -> None:
    """Both numbers of each byte of packed (blocks, bytes) into out (blocks, bytes), `_PAIR_INT` in one integer.

    absmax: (blocks,) float32; with `nested`, codes uint8 of `table` (256,), times nested (groups,), plus offset ()
    first: the place of `absmax[0]` among the blocks that share `nested[0]`

    Compiled it is one loop of wide instructions, which no look-up in a table of bytes is; else it is slow.
    """
    if nested is not None and offset is not None:
        group = (torch.arange(len(absmax), device=absmax.device) + first) // NESTED_BLOCK_SIZE
        absmax = table[absmax.int()] * nested[group] + offset
    codes, scale = packed.int(), absmax[:, None]
    low, high = ((_level(code) * scale).view(torch.int32) for code in (codes >> 4, codes & 15))
    if out.dtype == torch.int64:
        out.copy_((low.long() & 0xFFFFFFFF) | (high.long() << 32))
    else:  # to the nearest bfloat16, of two to the even one
        low, high = (bits + 0x7FFF + ((bits >> 16) & 1) for bits in (low, high))
        out.copy_(((low >> 16) & 0xFFFF) | (high & ~0xFFFF))


def _level(code: Tensor, bit: int = 8, lowest: int = 0) -> Tensor:
    """The level of each code, int32, by its bits from `bit` down: fifteen choices between two."""
    if bit == 1:
        return torch.where((code & 1) != 0, LEVELS[lowest + 1], LEVELS[lowest])
    zero, one = (_level(code, bit // 2, first) for first in (lowest, lowest + bit))
    return torch.where((code & bit) != 0, one, zero)


def quantize_nf4(weight: Tensor, block_size: int = BLOCK_SIZE, double_quant: bool = True) -> NF4Tensor:
    """Quantize a floating-point tensor of any shape.

    block_size: a power of two from 32 to 4096, as bitsandbytes has it
    Raises UserError for numbers that are not finite, ValueError for what is no weight or no block size.
    """
    check_weight(weight, block_size)
    flat = weight.detach().reshape(-1)
    n, chunk = flat.numel(), chunk_of(flat.device)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, n, chunk):
        codes, block_absmax = _quantize_blocks(flat[start : start + chunk].float(), block_size)
        packed[start // 2 : (start + chunk) // 2] = pack(codes)
        absmax[start // block_size : (start + chunk) // block_size] = block_absmax
    tensor = NF4Tensor(packed, absmax, tuple(weight.shape), weight.dtype, block_size)
    check_absmax(tensor, flat)
    return double_quantize(tensor) if double_quant else tensor


def check_weight(weight: Tensor, block_size: int) -> None:
    """Raise ValueError for what is no weight or no block size."""
    if not weight.is_floating_point() or weight.numel() == 0 or weight.layout != torch.strided or weight.is_meta:
        what = f"{weight.dtype} tensor of shape {tuple(weight.shape)}, {weight.layout}, on {weight.device}"
        raise ValueError(f"cannot quantize a {what}")
    check_block_size(block_size)


def check_block_size(block_size: int) -> None:
    """Raise ValueError for what is no block size."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}, but must be a power of two from 32 to 4096")


def check_absmax(tensor: NF4Tensor, flat: Tensor) -> None:
    """Raise UserError if a number of `flat` (n,) is NaN or infinite: it shows in the absmax of its block."""
    bad = (~tensor.absmax.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0]) * tensor.block_size
        index = first + int((~flat[first : first + tensor.block_size].float().isfinite()).nonzero()[0])
        raise UserError(f"element {index} (counted flat) is {flat[index]:g}; NF4 cannot hold it, fetch the file again")


def _quantize_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and absmax (ceil(n/block_size),) of float32 `values` (n,)."""
    blocks = in_blocks(values, block_size)
    absmax = blocks.abs().amax(dim=1)
    # Below 1e-38 the reciprocal would be infinite; a block of zeros stays zeros.
    scaled = blocks * absmax.clamp(min=1e-38).reciprocal()[:, None]
    # Counting is faster than searching: fifteen passes over numbers in the cache, each of wide instructions, which
    # comparisons have only where what they give is as wide as what they take.
    codes, above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for threshold in thresholds().tolist():
        codes += torch.gt(scaled, threshold, out=above)
    return codes.to(torch.uint8).view(-1)[: values.numel()], absmax


def double_quantize(tensor: NF4Tensor) -> NF4Tensor:
    """The same weight with its absmax in 8 bits. Raises UserError as `mean_absmax` does."""
    offset = mean_absmax(tensor.absmax)
    codes, nested_absmax = encode_dynamic(tensor.absmax - offset)
    return replace(tensor, absmax=codes, nested_absmax=nested_absmax, nested_offset=offset)


def mean_absmax(absmax: Tensor) -> Tensor:
    """The mean of absmax (n,), (). Raises UserError where their sum is more than float32 can hold."""
    mean = absmax.mean()
    if not mean.isfinite():
        largest = f"{absmax.max():g}, the largest of {len(absmax)} absmax"
        raise UserError(f"{largest}, is too large for double quantization: their sum overflows; fetch the file again")
    return mean


def pack(codes: Tensor) -> Tensor:
    """(n,) uint8 codes -> (ceil(n/2),) bytes, the first of two in the high nibble."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)  # the code of zero
    pairs = codes.view(torch.int16)  # first code + 256 * second, on a little-endian machine
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """(ceil(n/2),) bytes -> (n,) uint8 codes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
