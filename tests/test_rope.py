"""Rotary embedding: both ways to choose the pairs, the permutation between them, and transformers' own function."""

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

from minilora.rope import (
    apply_rope,
    half_split_to_interleaved,
    interleaved_to_half_split,
    rope_cos_sin,
)

B, T, D, HQ, HKV, DH = 2, 9, 24, 4, 2, 8


def apply_rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (B, T, H, Dh): what Mistral's own files mean."""
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, Dh/2)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(start: int = 0) -> Tensor:
    return torch.stack([torch.arange(start, start + T), torch.arange(3, 3 + T)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_equals_transformers_bit_for_bit(theta: float, dtype: torch.dtype) -> None:
    config = MistralConfig(
        hidden_size=HQ * DH, num_attention_heads=HQ, num_key_value_heads=HKV, head_dim=DH,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    q, k = random(B, T, HQ, DH).to(dtype), random(B, T, HKV, DH, seed=1).to(dtype)
    cos, sin = MistralRotaryEmbedding(config)(q, positions(30_000))
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    cos, sin = rope_cos_sin(positions(30_000), DH, theta, dtype)
    assert torch.equal(apply_rope(q, cos, sin), expected[0])
    assert torch.equal(apply_rope(k, cos, sin), expected[1])


def test_interleaved_pairs_are_complex_numbers_turned() -> None:
    """Mistral's own definition: pair (2i, 2i + 1) as a complex number times e^(i p theta^(-2i / Dh))."""
    x, where = random(B, T, HQ, DH), positions()
    angles = where[..., None].double() * 10_000.0 ** -(torch.arange(0, DH, 2).double() / DH)
    turned = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(angles.new_ones(()), angles)[:, :, None]
    )
    cos, sin = rope_cos_sin(where, DH, 10_000.0, torch.float32)
    # float32 angles of up to 11 radians are off by 1e-6, and numbers are up to 4
    torch.testing.assert_close(
        apply_rope_interleaved(x, cos, sin), torch.view_as_real(turned).flatten(-2).float(), rtol=0, atol=1e-5
    )


def test_permuted_rows_give_equal_products() -> None:
    """A file in Mistral's layout, its rows reordered, has the attention scores that it had before."""
    x = random(B, T, D)
    wq, wk = random(HQ * DH, D, seed=1), random(HKV * DH, D, seed=2)
    cos, sin = rope_cos_sin(positions(), DH, 10_000.0, torch.float32)

    def scores(q_rows: Tensor, k_rows: Tensor, rotate: object) -> Tensor:
        assert callable(rotate)
        q = rotate((x @ q_rows.T).unflatten(-1, (HQ, DH)), cos, sin)
        k = rotate((x @ k_rows.T).unflatten(-1, (HKV, DH)), cos, sin).repeat_interleave(HQ // HKV, dim=2)
        return torch.einsum("bqhd,bkhd->bhqk", q, k)

    interleaved = scores(wq, wk, apply_rope_interleaved)
    half_split = scores(interleaved_to_half_split(wq, HQ), interleaved_to_half_split(wk, HKV), apply_rope)
    assert interleaved.std() > 10  # sums of 8 products of numbers of size sqrt(24)
    torch.testing.assert_close(half_split, interleaved, rtol=1e-5, atol=1e-3)
    assert (scores(wq, wk, apply_rope) - interleaved).abs().max() > 10  # unpermuted rows are wrong


def test_the_permutation_takes_even_rows_first_head_by_head_and_back() -> None:
    rows = torch.arange(2 * 6)[:, None].expand(12, 3)
    permuted = interleaved_to_half_split(rows, 2)
    assert permuted[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(half_split_to_interleaved(permuted, 2), rows)
    assert interleaved_to_half_split(torch.arange(6), 1).tolist() == [0, 2, 4, 1, 3, 5]  # a bias, one-dimensional


@pytest.mark.parametrize("rotate", [apply_rope, apply_rope_interleaved])
def test_products_depend_on_the_distance_alone(rotate: object) -> None:
    assert callable(rotate)
    q, k = random(1, 1, 1, DH).double(), random(1, 1, 1, DH, seed=1).double()

    def product(at_q: int, at_k: int) -> float:
        at = [rope_cos_sin(torch.tensor([[p]]), DH, 10_000.0, torch.float64) for p in (at_q, at_k)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert product(12, 5) == pytest.approx(product(107, 100), abs=1e-4)  # float32 angles near 100 are off by 4e-6
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-12)
    assert product(12, 5) != pytest.approx(product(5, 12), abs=0.1)


def test_lengths_are_kept() -> None:
    x = random(B, T, HQ, DH)
    turned = apply_rope(x, *rope_cos_sin(positions(1_000), DH, 1e6, torch.float32))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
