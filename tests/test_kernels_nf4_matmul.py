"""The matmul kernel against a product in float64: in Triton's interpreter, or on a GPU."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_product, random

from minilora.kernels import nf4_matmul
from minilora.kernels.nf4_matmul import matmul, tile
from minilora.nf4 import NF4Tensor, quantize_nf4

HOPPERS = [(16, 4), (64, 4), (128, 8), (256, 8)]
TILES = {80: (OTHERS := [(16, 4), (64, 8), (128, 8), (128, 8)]), 90: HOPPERS, 103: HOPPERS, 120: OTHERS, 121: OTHERS}


def assert_close(x: torch.Tensor, weight: NF4Tensor) -> None:
    """Each weight is rounded to x's dtype before it is multiplied."""
    assert_product(matmul(x, weight), x, weight.dequantize(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("m", "shape"), [(3, (1, 64)), (16, (127, 128)), (17, (129, 192)), (200, (40, 128))])
def test_any_shape(m: int, shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    weight = quantize_nf4(0.02 * random(*shape), double_quant=double_quant)
    assert_close(random(m, shape[1], seed=1).to(dtype), weight)


@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_any_block_size(block_size: int) -> None:
    assert_close(random(5, 512, seed=1), quantize_nf4(random(40, 512), block_size=block_size))


def test_one_weight_at_a_time() -> None:
    """Unit vectors: all of W', bit for bit, so no weight is at another's place."""
    weight = quantize_nf4(random(3, 64))
    assert torch.equal(matmul(torch.eye(64, device=DEVICE), weight), weight.dequantize(torch.float32).T)


@pytest.mark.parametrize("splits", [2, 3, 7, 100])
def test_split_columns(splits: int) -> None:
    """Parts that are alike and parts that are not, and no more of them than there are tiles."""
    weight = quantize_nf4(random(40, 3 * 256 + 64))
    x = random(5, 3 * 256 + 64, seed=1)
    torch.testing.assert_close(matmul(x, weight, splits=splits), matmul(x, weight, splits=1), rtol=1e-5, atol=1e-4)


def test_strides() -> None:
    weight = quantize_nf4(random(8, 128))
    x = random(128, 5, seed=1)
    assert torch.equal(matmul(x.T, weight), matmul(x.T.contiguous(), weight))


@pytest.mark.parametrize("shape", [(0, 64), (8, 0)])
def test_no_weights(shape: tuple[int, int]) -> None:
    """As torch has it, the sum of nothing is zero."""
    packed = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    nothing = NF4Tensor(packed, torch.empty(0, device=DEVICE), shape, torch.float32)
    assert torch.equal(matmul(random(2, shape[1]), nothing), torch.zeros(2, shape[0], device=DEVICE))


def test_a_negated_view() -> None:
    weight, x = quantize_nf4(random(8, 128)), random(2, 128, seed=1)
    assert torch.equal(matmul(torch._neg_view(x), weight), matmul(-x, weight))


@pytest.mark.parametrize(("arch", "tiles"), TILES.items())
def test_tiles(arch: int, tiles: list[tuple[int, int]]) -> None:
    assert [tile(m, arch, 2) for m in (1, 64, 65, 256)] == tiles
    assert [tile(m, arch, 4) for m in (1, 17, 256)] == [(16, 4), (32, 8), (32, 8)]


def test_a_card_on_which_triton_rounds_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantize_nf4(random(8, 128)), random(3, 128, seed=1)
    monkeypatch.setattr(nf4_matmul, "architecture", lambda _: 100)
    monkeypatch.setattr(nf4_matmul, "TRITON", (3, 7))
    with pytest.raises(ValueError, match="rounds float32 on sm_100"):
        matmul(x, weight)
    assert_close(x.half(), weight)
    monkeypatch.setattr(nf4_matmul, "TRITON", (3, 8))
    assert_close(x, weight)


def test_what_does_not_fit() -> None:
    weight = quantize_nf4(random(8, 128))
    for x in (random(257, 128), random(3, 64), random(128)):
        with pytest.raises(ValueError, match="does not fit a weight of shape"):
            matmul(x, weight)
    for splits in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"splits is {splits}"):
            matmul(random(3, 128), weight, splits=splits)
