"""NF4 against its derivation, the stored vectors and bitsandbytes on the CPU, bit for bit where bits are defined."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from minilora import nf4
from minilora.dynamic_8bit import dynamic_map
from minilora.errors import UserError
from minilora.nf4 import CPU, NF4Tensor, quantize_nf4

STORED = json.loads((Path(__file__).parent / "vectors" / "nf4_vectors.json").read_text())
CONSTANTS, VECTORS = STORED["meta"], {vector["name"]: vector for vector in STORED["vectors"]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAP_GAP = 0.0141  # between the two levels of the 8-bit map that lie furthest apart: 0.9 / 2^6, rounded up


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def float32(base64_text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(base64_text), "<f4").copy())


def uint8(base64_text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(base64_text), np.uint8).copy())


def bnb_quantize(weight: Tensor, block_size: int = 64, nested: bool = False) -> tuple[Tensor, Any]:
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=nested)
    return packed.view(-1), state


# The code book


def test_levels_are_the_derived_quantiles_and_bitsandbytes_constants_bit_for_bit() -> None:
    assert torch.equal(nf4.derive_levels(), nf4.levels())
    assert torch.equal(nf4.levels(), float32(CONSTANTS["code_f32_le"]))
    assert torch.equal(nf4.levels(), bnb.get_4bit_type("nf4", device="cpu"))


def test_thresholds_are_the_float32_midpoints() -> None:
    assert torch.equal(nf4.thresholds(), float32(CONSTANTS["thresholds_f32_le"]))


def test_a_tie_takes_the_lower_code() -> None:
    """A block that holds 1 has absmax 1, so its numbers are compared with the thresholds as they are."""
    at = nf4.thresholds()
    above = torch.nextafter(at, torch.tensor(2.0))
    below = torch.nextafter(at, torch.tensor(-2.0))
    weight = torch.cat([torch.ones(1), below, at, above])
    codes = quantize_nf4(weight, double_quant=False).codes().tolist()
    steps = list(range(15))
    assert codes == [15, *steps, *steps, *(s + 1 for s in steps)]


# Bytes and absmax


@pytest.mark.parametrize("name", VECTORS)
def test_stored_vectors(name: str) -> None:
    vector = VECTORS[name]
    dtype = getattr(torch, vector["dtype"])
    weight = float32(vector["input_f32_le"]).reshape(vector["shape"]).to(dtype)
    quantized = quantize_nf4(weight, vector["blocksize"], double_quant=False)
    assert torch.equal(quantized.packed, uint8(vector["packed_bnb_cpu"]))
    assert (quantized.shape, quantized.dtype) == (tuple(vector["shape"]), dtype)
    if "nested_absmax" not in vector:  # where the absmax stored are those after double quantization
        assert torch.equal(quantized.absmax, float32(vector["absmax_f32_le"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 130, 1000, 4096, 4097])
def test_bytes_absmax_and_dequantized_equal_bitsandbytes(n: int, dtype: torch.dtype) -> None:
    weight = random_weight(n, dtype=dtype, seed=n)
    for block_size in BLOCK_SIZES:
        packed, state = bnb_quantize(weight, block_size)
        ours = quantize_nf4(weight, block_size, double_quant=False)
        assert torch.equal(ours.packed, packed), block_size
        assert torch.equal(ours.absmax, state.absmax), block_size
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed.view(-1, 1), state).view(-1)), block_size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_is_flattened_row_by_row_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    weight = random_weight(24, 192, dtype=dtype)
    packed, state = bnb_quantize(weight)
    ours = quantize_nf4(weight, double_quant=False)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed.view(-1, 1), state))
    transposed = quantize_nf4(weight.T, double_quant=False)  # not contiguous
    assert torch.equal(transposed.packed, quantize_nf4(weight.T.contiguous(), double_quant=False).packed)


def test_where_blocks_go_over_the_ends_of_rows_bitsandbytes_errs_on_a_cpu_with_avx512() -> None:
    """The bytes are the same. Once this fails, README and the note of `minilora export` can go."""
    weight = random_weight(64, 144)
    packed, state = bnb_quantize(weight)
    ours = quantize_nf4(weight, double_quant=False)
    assert torch.equal(ours.packed, packed)
    assert (ours.dequantize() - weight).norm() < 0.1 * weight.norm()
    theirs = bnb.dequantize_4bit(packed.view(-1, 1), state)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # as bitsandbytes asks
        assert (theirs - weight).norm() > 0.2 * weight.norm()
    else:
        assert torch.equal(ours.dequantize(), theirs)


@pytest.mark.parametrize("storage", DTYPES)
def test_bitsandbytes_storage_dtypes_are_views_of_the_same_bytes(storage: torch.dtype) -> None:
    weight = random_weight(8, 64)
    stored, _ = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    assert stored.dtype == storage
    assert torch.equal(stored.view(torch.uint8).view(-1), quantize_nf4(weight).packed)


def test_every_byte_decodes_to_its_two_levels() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.ones(8)
    values = NF4Tensor(packed, absmax, (512,), torch.float32).dequantize()
    expected = [level for byte in range(256) for level in (nf4.LEVELS[byte >> 4], nf4.LEVELS[byte & 15])]
    assert torch.equal(values, torch.tensor(expected))
    assert torch.equal(quantize_nf4(values, double_quant=False).codes()[:32], nf4.unpack(packed, 512)[:32])


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 999])
def test_pack_and_unpack_are_inverse(n: int) -> None:
    codes = torch.randint(16, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    packed = nf4.pack(codes)
    assert packed.shape == ((n + 1) // 2,)
    assert packed[0] >> 4 == codes[0]
    assert torch.equal(nf4.unpack(packed, n), codes)
    if n % 2:
        assert packed[-1] & 15 == 7  # the missing number is a zero


@pytest.mark.parametrize("block_size", [64, 4096])
def test_the_border_of_a_chunk_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, block_size: int) -> None:
    weight = random_weight((1 << 20) + 4096 + 77)
    chunked = quantize_nf4(weight, block_size)
    values = chunked.dequantize()
    monkeypatch.setattr(nf4, "_CHUNK", 1 << 21)
    whole = quantize_nf4(weight, block_size)
    assert torch.equal(chunked.packed, whole.packed)
    assert torch.equal(chunked.absmax, whole.absmax)
    assert torch.equal(values, whole.dequantize())


def test_every_number_goes_to_its_nearest_level() -> None:
    weight = random_weight(64 * 50)
    quantized = quantize_nf4(weight, double_quant=False)
    scaled = weight.view(-1, 64).double() / quantized.absmax[:, None].double()
    distance = (scaled[..., None] - nf4.levels().double()).abs()
    chosen = distance.gather(2, quantized.codes().view(-1, 64, 1).long())[..., 0]
    assert (chosen <= distance.amin(-1) + 2**-23).all()  # float32 rounds the scaled number and the midpoint


def test_mean_error_of_normal_weights() -> None:
    """0.0728 of a standard deviation in blocks of 64, as measured with bitsandbytes; rounded, and a sample of 2^20."""
    weight = random_weight(1 << 20)
    error = (quantize_nf4(weight, double_quant=False).dequantize() - weight).abs().view(-1, 64).mean(1)
    sigma = error.std() / len(error) ** 0.5  # the blocks are independent
    assert abs(error.mean() - 0.0728) < 4 * sigma + 0.00005


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_float32_once(dtype: torch.dtype, double_quant: bool) -> None:
    quantized = quantize_nf4(random_weight(7, 65, dtype=dtype), double_quant=double_quant)
    assert quantized.dequantize().dtype == dtype
    assert quantized.dequantize().shape == (7, 65)
    exact = nf4.levels()[quantized.codes().long()] * quantized.block_absmax().repeat_interleave(64)[: 7 * 65]
    for out in DTYPES:
        assert torch.equal(quantized.dequantize(out), exact.view(7, 65).to(out))


# Edge cases


def test_zeros_have_code_7_and_absmax_0_in_every_block() -> None:
    """bitsandbytes' CPU code stores 1e-38 for a short last block of zeros; we store what is there."""
    for n in (1, 64, 65, 128):
        quantized = quantize_nf4(torch.zeros(n), double_quant=False)
        assert (quantized.codes() == 7).all()
        assert (quantized.absmax == 0).all()
        assert torch.equal(quantized.packed, bnb_quantize(torch.zeros(n))[0])
        assert torch.equal(quantize_nf4(torch.zeros(n)).dequantize(), torch.zeros(n))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 5e-39, 1e-38, 2e-38])
def test_denormal_blocks_stay_finite_and_equal_bitsandbytes(magnitude: float) -> None:
    weight = magnitude * random_weight(64).clamp(-1, 1)
    packed, state = bnb_quantize(weight)
    quantized = quantize_nf4(weight, double_quant=False)
    assert torch.equal(quantized.packed, packed)
    assert torch.equal(quantized.absmax, state.absmax)
    assert quantized.dequantize().isfinite().all()


def test_a_short_last_block_counts_no_filling() -> None:
    weight = torch.cat([random_weight(64), torch.tensor([-0.25, 0.125, 0.5])])
    quantized = quantize_nf4(weight, double_quant=False)
    assert quantized.absmax[1] == 0.5
    assert quantized.dequantize()[-1] == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 63, 64, 199, (1 << 20) + 3])
def test_what_is_not_finite_is_refused_with_its_flat_index(index: int, value: float) -> None:
    weight = torch.zeros(index + 10)
    weight[index] = weight[-1] = value  # the first one is named
    with pytest.raises(UserError, match=rf"element {index} .*{str(value).strip('-')}.* fetch the file again"):
        quantize_nf4(weight.view(2, -1) if len(weight) % 2 == 0 else weight)


def test_a_float64_beyond_float32_is_refused_too() -> None:
    weight = torch.zeros(70, dtype=torch.float64)
    weight[65] = 1e300
    with pytest.raises(UserError, match="element 65 "):
        quantize_nf4(weight)


@pytest.mark.parametrize("weight", [torch.zeros(0), torch.ones(4, dtype=torch.int8), torch.ones(4, dtype=torch.bool)])
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot quantize"):
        quantize_nf4(weight)


@pytest.mark.parametrize("block_size", [0, -64, 16, 48, 100, 8192])
def test_block_sizes_that_bitsandbytes_has_not_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size"):
        quantize_nf4(torch.ones(64), block_size)


def test_the_weight_is_left_alone() -> None:
    weight = torch.nn.Parameter(random_weight(130))
    before = weight.detach().clone()
    quantized = quantize_nf4(weight)
    assert torch.equal(weight, before)
    assert not quantized.dequantize().requires_grad


# Double quantization


@pytest.mark.parametrize("shape", [(1,), (64,), (160, 128), (300, 1024), (777, 1000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_absmax_agrees_with_bitsandbytes_within_one_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Its CPU code rounds through a table of 65536 entries, and so is one level off now and then."""
    weight = random_weight(*shape, dtype=dtype) * 0.02
    packed, state = bnb_quantize(weight, nested=True)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.packed, packed)
    assert ours.nested_absmax is not None
    assert ours.nested_offset is not None
    torch.testing.assert_close(ours.nested_offset, state.offset.view(()), rtol=2**-22, atol=0)  # another order of sums
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2).view(-1) + state.offset
    step = MAP_GAP * ours.nested_absmax.repeat_interleave(256)[: len(theirs)]
    assert ((ours.block_absmax() - theirs).abs() <= step + 2**-20 * theirs.abs()).all()
    differ = (ours.absmax.int() - state.absmax.view(-1).int()).abs()
    if len(theirs) > 1000:
        assert differ.max() <= 1
        assert differ.float().mean() < 0.01


def test_nested_vector() -> None:
    vector = VECTORS["nested_f32_160x128"]
    ours = quantize_nf4(float32(vector["input_f32_le"]).reshape(vector["shape"]))
    assert ours.nested_absmax is not None
    assert ours.nested_offset is not None
    assert torch.equal(ours.nested_absmax, float32(vector["nested_absmax"]))
    assert ours.nested_offset.item() == pytest.approx(vector["nested_offset"], rel=2**-22)
    assert (ours.absmax.int() - uint8(vector["absmax_u8"]).int()).abs().max() <= 1
    step = MAP_GAP * ours.nested_absmax.repeat_interleave(256)[: len(ours.absmax)]
    assert ((ours.block_absmax() - float32(vector["absmax_f32_le"])).abs() <= step).all()


def test_nested_codes_are_the_nearest_levels_and_reconstruct_exactly() -> None:
    weight = random_weight(500, 200)  # 1563 blocks of 64, in 7 blocks of 256, both with a short end
    plain, nested = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
    assert nested.nested_absmax is not None
    assert nested.nested_offset is not None
    assert (nested.absmax.dtype, nested.absmax.shape) == (torch.uint8, (1563,))
    assert nested.nested_absmax.shape == (7,)
    assert nested.nested_offset.shape == ()

    residual = (plain.absmax - plain.absmax.mean()).numpy()
    scale = np.array([abs(residual[i : i + 256]).max() for i in range(0, 1563, 256)], dtype=np.float32)
    assert np.array_equal(nested.nested_absmax.numpy(), scale)
    scale = scale.repeat(256)[:1563]
    distance = abs((residual / scale)[:, None].astype(np.float64) - dynamic_map(CPU).numpy())
    chosen = np.take_along_axis(distance, nested.absmax.numpy()[:, None].astype(int), axis=1)[:, 0]
    assert (chosen <= distance.min(axis=1) + 2**-24).all()

    rebuilt = dynamic_map(CPU).numpy()[nested.absmax.numpy()] * scale + nested.nested_offset.numpy()
    assert np.array_equal(nested.block_absmax().numpy(), rebuilt)
    assert (abs(rebuilt - plain.absmax.numpy()) <= MAP_GAP / 2 * scale + 2**-22).all()


def test_double_quantization_of_equal_absmax_is_exact() -> None:
    weight = torch.full((64 * 300,), 0.125)
    assert torch.equal(quantize_nf4(weight).dequantize(), weight)


def test_bits_per_weight() -> None:
    weight = random_weight(256, 64 * 64, dtype=torch.bfloat16)
    assert quantize_nf4(weight, double_quant=False).nbytes * 8 == weight.numel() * 4.5
    nested_bits = (quantize_nf4(weight).nbytes - 4) * 8 / weight.numel()  # less the one offset
    assert nested_bits == 4 + 8 / 64 + 32 / (64 * 256)


def test_sizes_of_the_parts() -> None:
    quantized = quantize_nf4(random_weight(3, 5, 7))
    assert (quantized.n, quantized.packed.shape, quantized.absmax.shape) == (105, (53,), (2,))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (5, 13), (1,), (129,)])
def test_dequantizing_into_a_buffer_gives_the_same(shape: tuple[int, ...], double_quant: bool) -> None:
    tensor = nf4.quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)), double_quant=double_quant)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full(shape, 7.0, dtype=dtype)
        assert tensor.dequantize(out=out) is out
        assert torch.equal(out, tensor.dequantize(dtype))
    with pytest.raises(ValueError, match="out has shape"):
        tensor.dequantize(out=torch.empty(2, 2))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights larger than a chunk, with a short last one, are what they are in one piece."""
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = nf4.quantize_nf4(weight)
    expected = whole.dequantize()
    monkeypatch.setattr(nf4, "_CHUNK", 192)
    pieces = nf4.quantize_nf4(weight)
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.absmax, whole.absmax)
    assert torch.equal(pieces.dequantize(), expected)
    part = torch.empty(300)
    whole.decode(128, 428, part)
    assert torch.equal(part, expected[128:428])


@pytest.mark.parametrize(("first", "last"), [(0, 600), (0, 1), (255, 257), (256, 512), (300, 301), (511, 600)])
def test_part_of_the_absmax_is_a_part(first: int, last: int) -> None:
    weight = torch.randn(600 * 64, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        tensor = nf4.quantize_nf4(weight, double_quant=double_quant)
        assert torch.equal(tensor.block_absmax(first, last), tensor.block_absmax()[first:last])
