"""Eight codes of a 32-bit word to eight levels, and the device of a launch: what the kernels share.

Plain: eight look-ups in the table of 16 levels, some five instructions a weight. By shuffle: lane i of a warp keeps
level i mod 16 in a register, and a look-up is an exchange between lanes, `shfl.idx`, whose index is the word, shifted;
only its lowest five bits count, and since the table stands twice in 32 lanes, bit four may be anything. Some two.

Triton has no word for that, so it is PTX. `tests/test_kernels_nf4_table.py` emulates it instruction by instruction.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

LANE_LEVEL = tl.constexpr(
    """
{
    .reg .b32 lane;
    .reg .b64 at;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 at, lane, 4, $1;
    ld.global.nc.f32 $0, [at];
}
"""
)

LOOK_UP = tl.constexpr(
    """
{
    .reg .b32 code;
    shr.u32 code, $8, 4;
    shfl.sync.idx.b32 $0, $9, code, 31, -1;
    shfl.sync.idx.b32 $1, $9, $8, 31, -1;
    shr.u32 code, $8, 12;
    shfl.sync.idx.b32 $2, $9, code, 31, -1;
    shr.u32 code, $8, 8;
    shfl.sync.idx.b32 $3, $9, code, 31, -1;
    shr.u32 code, $8, 20;
    shfl.sync.idx.b32 $4, $9, code, 31, -1;
    shr.u32 code, $8, 16;
    shfl.sync.idx.b32 $5, $9, code, 31, -1;
    shr.u32 code, $8, 28;
    shfl.sync.idx.b32 $6, $9, code, 31, -1;
    shr.u32 code, $8, 24;
    shfl.sync.idx.b32 $7, $9, code, 31, -1;
}
"""
)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Where a launch stands: Triton launches on the current GPU, whatever GPU the tensors are on.

    Raises ValueError where no kernel runs.
    """
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type != "cpu" or isinstance(decode_kernel, triton.JITFunction):
        raise ValueError(f"the kernels run on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1), not on {device}")
    return nullcontext()


@triton.jit
def decode_kernel(words, levels, out, n_words, WORDS: tl.constexpr, SHUFFLE: tl.constexpr):
    """words (n_words,) int32 -> out (8, n_words) float32."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    found = decode(table(levels, SHUFFLE), tl.load(words + at), SHUFFLE)
    for j in tl.static_range(8):
        tl.store(out + j * n_words + at, found[j])


@triton.jit
def table(levels, SHUFFLE: tl.constexpr):
    """What `decode` looks up in: the pointer itself, or the level of this lane."""
    if SHUFFLE:
        entries = tl.inline_asm_elementwise(LANE_LEVEL, "=f,l", [levels], dtype=tl.float32, is_pure=True, pack=1)
    else:
        entries = levels
    return entries


@triton.jit
def decode(entries, word, SHUFFLE: tl.constexpr):
    """Levels of the eight codes of `word`, eight float32 tensors of its shape, in the order of the weights: the first
    is in the high nibble of the lowest byte."""
    if SHUFFLE:
        found = tl.inline_asm_elementwise(
            LOOK_UP,
            "=f,=f,=f,=f,=f,=f,=f,=f,r,f",
            [word, entries],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        found = (
            tl.load(entries + ((word >> 4) & 15)),
            tl.load(entries + (word & 15)),
            tl.load(entries + ((word >> 12) & 15)),
            tl.load(entries + ((word >> 8) & 15)),
            tl.load(entries + ((word >> 20) & 15)),
            tl.load(entries + ((word >> 16) & 15)),
            tl.load(entries + ((word >> 28) & 15)),
            tl.load(entries + ((word >> 24) & 15)),
        )
    return found


@triton.jit
def apart(v):
    """(..., 2, 2, 2) -> its eight tensors (...), in order: what `joined` takes."""
    even, odd = tl.split(v)
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def joined(v):
    """Eight tensors of one shape (...), in order, -> (..., 2, 2, 2)."""
    # A join adds a last dimension of two, so the parts joined first differ in the highest bit of the weight's number.
    even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
    odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    return tl.join(even, odd)
