"""Who sees whom, against a loop over all pairs; and attention, against a softmax written out in float64."""

from itertools import product
from math import exp

import pytest
import torch
from torch import Tensor

from minilora import attention
from minilora.attention import attend, attend_back, attend_kept, has_flash_attention
from minilora.visible import QUERIES, Pieces, Runs, visible


def sees(q: int, k: int, window: int | None, same_segment: bool) -> bool:
    """The rule in words: a key is seen from its own position on, for `window` tokens, within its segment."""
    if q == k and same_segment:
        return window is None or window > 0
    return k >= 0 and k <= q and same_segment and (window is None or k > q - window)


def loop(
    q_positions: Tensor, k_positions: Tensor, window: int | None, q_segments: Tensor, k_segments: Tensor
) -> Tensor:
    B, Tq, Tk = *q_positions.shape, k_positions.shape[1]
    mask = torch.zeros(B, 1, Tq, Tk, dtype=torch.bool)
    for b, i, j in product(range(B), range(Tq), range(Tk)):
        same = bool(q_segments[b, i] == k_segments[b, j])
        mask[b, 0, i, j] = sees(int(q_positions[b, i]), int(k_positions[b, j]), window, same)
    return mask


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 100])
def test_visible_equals_a_loop_over_all_pairs(window: int | None) -> None:
    positions = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5, 6, 7],  # one sample
            [0, 1, 2, 0, 1, 2, 3, 0],  # three, packed
            [-3, -2, -1, 0, 1, 2, 3, 4],  # one, filled from the left
        ]
    )
    segments = torch.tensor([[0] * 8, [0, 0, 0, 1, 1, 1, 1, 2], [0] * 8])
    expected = loop(positions, positions, window, segments, segments)
    assert torch.equal(visible(positions, positions, window, segments), expected)
    assert expected.any(-1).all()  # no row is empty: softmax over nothing is NaN
    one_segment = torch.zeros_like(segments)
    without = loop(positions, positions, window, one_segment, one_segment)
    assert torch.equal(visible(positions, positions, window), without)


@pytest.mark.parametrize("window", [None, 1, 3, 4])
def test_visible_with_keys_of_a_rolling_buffer(window: int | None) -> None:
    """Keys out of order, empty slots, and more keys than queries."""
    q = torch.tensor([[5, 6], [0, 1]])
    k = torch.tensor([[3, 4, 2, 5, 6], [-(2**31), -(2**31), -1, 0, 1]])
    nothing = torch.zeros(2, 2), torch.zeros(2, 5)
    assert torch.equal(visible(q, k, window), loop(q, k, window, *nothing))


def test_a_window_of_w_is_w_tokens_with_oneself() -> None:
    positions = torch.arange(6)[None]
    assert visible(positions, positions, 3)[0, 0].sum(-1).tolist() == [1, 2, 3, 3, 3, 3]


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query, one head at a time, in Python floats."""
    B, Tq, Hq, Dh = q.shape
    y = torch.zeros(B, Tq, Hq, Dh, dtype=torch.float64)
    for b, i, h in product(range(B), range(Tq), range(Hq)):
        kv_head = h // (Hq // k.shape[2])
        seen = [j for j in range(k.shape[1]) if mask[b, 0, i, j]]
        weights = [exp(float(q[b, i, h].double() @ k[b, j, kv_head].double()) / Dh**0.5) for j in seen]
        for j, weight in zip(seen, weights, strict=True):
            y[b, i, h] += weight / sum(weights) * v[b, j, kv_head].double()
    return y


def random_heads(Hq: int, Hkv: int, T: int, Dh: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(Hq + Hkv)
    q, k, v = (torch.randn(2, T, H, Dh, generator=generator) for H in (Hq, Hkv, Hkv))
    return q, k, v


@pytest.mark.parametrize(("Hq", "Hkv"), [(2, 2), (4, 1), (8, 2), (8, 1), (16, 2)])
@pytest.mark.parametrize("window", [None, 3])
def test_attend_equals_a_softmax_by_hand(Hq: int, Hkv: int, window: int | None) -> None:
    q, k, v = random_heads(Hq, Hkv, T=7, Dh=6)
    positions = torch.stack([torch.arange(7), torch.arange(7) - 2])
    mask = visible(positions, positions, window)
    y = attend(q, k, v, mask)
    assert y.shape == q.shape
    torch.testing.assert_close(y.double(), softmax_by_hand(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_attend_with_more_keys_than_queries() -> None:
    q, k, v = random_heads(8, 2, T=7, Dh=6)
    positions = torch.arange(7).expand(2, 7)
    mask = visible(positions[:, 5:], positions, 4)
    torch.testing.assert_close(
        attend(q[:, 5:], k, v, mask), attend(q, k, v, visible(positions, positions, 4))[:, 5:], rtol=1e-5, atol=1e-5
    )


def test_an_unseen_token_changes_nothing_and_gets_no_gradient() -> None:
    q, k, v = random_heads(4, 1, T=6, Dh=8)
    positions = torch.arange(6).expand(2, 6)
    mask = visible(positions, positions, 2)
    k, v = k.requires_grad_(), v.requires_grad_()
    attend(q, k, v, mask)[:, 4].sum().backward()  # token 4 sees tokens 3 and 4
    for gradient in (k.grad, v.grad):
        assert gradient is not None
        assert (gradient[:, [0, 1, 2, 5]] == 0).all()
        assert (gradient[:, [3, 4]] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_of_its_rounding(dtype: torch.dtype) -> None:
    """Outputs are means of numbers below 4: two roundings (weights, output) of 2^-8 or 2^-11 each."""
    q, k, v = random_heads(8, 2, T=7, Dh=6)
    positions = torch.arange(7).expand(2, 7)
    mask = visible(positions, positions, 3)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    error = attend(q, k, v, mask).double() - softmax_by_hand(q, k, v, mask)
    assert error.abs().max() <= 4 * 2 * torch.finfo(dtype).eps


def rows_of(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and segments of rows that are packed from samples of these lengths."""
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in rows]
    segments = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in rows]
    return torch.stack(positions), torch.stack(segments)


LONG = 2 * QUERIES + 90
PACKED = [
    ([12],), ([6, 6], [6, 6]), ([5, 7], [12], [1, 10, 1]),  # pieces that are runs, or several short ones
    ([LONG],), ([LONG - 90, 90],), ([1, 70, LONG - 75, 4], [LONG]), (*([30] * (LONG // 30) + [LONG % 30],) * 2,),
]  # fmt: skip


def both_ways(
    rows: tuple[list[int], ...], window: int | None, dtype: torch.dtype, drawn: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of packed rows, in pieces and under the mask, of numbers that `drawn` holds."""
    positions, segments = rows_of(*rows)
    lengths = [n for row in rows for n in row]
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(rows), sum(rows[0]), heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, dy = (torch.randn(shape, generator=generator).to(drawn).to(dtype) for shape in shapes)
    results = []
    for who in (Pieces.of(lengths, window), visible(positions, positions, window, segments)):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, who)  # type: ignore[arg-type]
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    return results[0], results[1]


@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("window", [None, 1, 5, 100, 300, 10_000])
def test_pieces_see_what_the_mask_says(rows: tuple[list[int], ...], window: int | None) -> None:
    """Windows below a run's length and above, of less and of more than a piece's queries."""
    for fast, expected in zip(*both_ways(rows, window, torch.float64), strict=True):
        assert fast.allclose(expected, atol=1e-12)
    for fast, expected in zip(*both_ways(rows, window, torch.float32), strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_in_16_bits_err_no_more_than_the_mask(dtype: torch.dtype) -> None:
    """Against float64 on the same numbers."""
    rows = ([1, 70, LONG - 75, 4], [LONG])
    exact = both_ways(rows, 300, torch.float64, dtype)[1]
    for reference, fast, plain in zip(exact, *both_ways(rows, 300, dtype, dtype), strict=True):
        assert fast.dtype == dtype
        assert 0 < (fast - reference).norm() <= 2 * (plain - reference).norm()


@pytest.mark.parametrize("window", [100, 300])
def test_beyond_the_window_nothing_grows_but_with_the_tokens(window: int) -> None:
    """Of a run: keys that are looked at, and masks, which are views of one."""
    sizes = []
    for n in (8, 16, 32):
        made = Pieces.of((n * QUERIES,), window)
        assert made.mask_bytes == 4 * QUERIES * (QUERIES + window - 1)
        sizes.append(sum((p.stop - p.start) * (p.stop - p.first) for p in made.pieces))
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])
    short = [Pieces.of((10, 30) * n).mask_bytes for n in (20, 40)]  # nor where many short runs share a piece
    assert short[1] <= 2.1 * short[0]


def test_lengths_are_of_the_runs_that_have_a_token() -> None:
    assert Runs(torch.tensor([0, 5, 5, 12, 12, 12], dtype=torch.int32), 7).lengths == [5, 7]
    assert Runs.of_rows(3, 70).lengths == [70, 70, 70]
    assert Runs.of_rows(3, 70).longest == 70


def test_an_unpacked_row_is_one_piece() -> None:
    made = Pieces.of(Runs.of_rows(3, 70).lengths)
    assert (made.rows, made.mask_bytes) == (3, 0)
    assert [(p.start, p.stop, p.first) for p in made.pieces] == [(0, 70, 0)]


def test_short_runs_share_a_piece_of_128_tokens_wherever_they_lie() -> None:
    pieces = Pieces.of((200, 40, 40, 40, 40, 65, 64, 64, 1)).pieces
    assert [(p.start, p.stop) for p in pieces] == [(0, 200), (200, 320), (320, 360), (360, 425), (425, 553), (553, 554)]


@pytest.mark.parametrize(("device", "heads"), [("cpu", 2), ("meta", 4)])
def test_keys_are_repeated_where_no_fast_kernel_takes_fewer(
    device: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask and fewer key heads than query heads, a GPU would fall back to T x T scores of every head. (A device
    without memory stands for it.)"""
    seen: list[int] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, **_: object) -> Tensor:
        assert v.shape == k.shape
        assert enable_gqa == (k.shape[1] != q.shape[1])
        seen.append(k.shape[1])
        return q

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    q, k, v = (torch.empty(1, 8, n, 4, device=device) for n in (4, 2, 2))
    attend(q, k, v, torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device))
    assert seen == [heads]


@pytest.mark.parametrize(("runs", "window"), [((90,), None), ((300,), None), ((300,), 100)])
def test_backward_is_the_same_where_threads_get_copies_of_key_heads(
    runs: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three key heads of three query heads: by whole key heads, one of two threads would do 6 query heads, not 5."""
    grads = []
    for threads, copies in ((1, 1), (2, 3), (3, 1), (5, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert attention.copies_for_threads(1, 9, 3) == copies
        q, k, v = (x[:1].requires_grad_() for x in random_heads(9, 3, T=runs[0], Dh=8))
        dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad(attend(q, k, v, Pieces.of(runs, window)), (q, k, v), dy))
    for made in grads[1:]:
        torch.testing.assert_close(made, grads[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(grads[0][1], grads[1][1])  # summed up in another order, so it was another way


@pytest.mark.parametrize("who", [Pieces.of((12, 12)), Pieces.of((12, 7, 5), 5), "mask"])
def test_by_hand_it_gives_what_autograd_gives(who: Pieces | Tensor | str) -> None:
    positions = torch.arange(12).expand(2, 12)
    who = visible(positions, positions, 5) if isinstance(who, str) else who
    q, k, v = (x.requires_grad_() for x in random_heads(4, 2, T=12, Dh=8))
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    y = attend(q, k, v, who)
    by_hand, rest = attend_kept(q, k, v, who)
    assert torch.equal(by_hand, y)
    assert not by_hand.requires_grad
    expected = torch.autograd.grad(y, (q, k, v), dy)
    assert all(map(torch.equal, attend_back(dy, q, k, v, by_hand, rest, who), expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's FlashAttention is for GPUs")
@pytest.mark.parametrize("rows", [([256],), ([100, 156], [256]), ([1, 3, 250, 2], [7, 249])])
@pytest.mark.parametrize("window", [None, 1, 16, 100])
@pytest.mark.parametrize("empty", [0, 3])
def test_on_a_gpu_all_runs_at_once_err_no_more_than_the_mask(
    rows: tuple[list[int], ...], window: int | None, empty: int
) -> None:
    """Against float64, forward and backward; runs without a token change nothing."""
    positions, segments = (x.cuda() for x in rows_of(*rows))
    stops = torch.tensor([0, *(n for row in rows for n in row), *[0] * empty]).cumsum(0).int().cuda()
    mask = visible(positions, positions, window, segments)
    runs = Runs(stops, 256, window)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(len(rows), 256, heads, 64) for heads in (8, 2, 2, 8)]
    q, k, v, dy = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
    assert has_flash_attention(q.device, q.dtype, 64)

    def results(dtype: torch.dtype, who: Runs | Tensor) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, who)  # type: ignore[arg-type]
        return [x.double() for x in (y, *torch.autograd.grad(y, inputs, dy.to(dtype)))]

    by_hand, rest = attend_kept(q, k, v, runs)
    ours = [x.double() for x in (by_hand, *attend_back(dy, q, k, v, by_hand, rest, runs))]
    exact, masked, flash = results(torch.float64, mask), results(torch.bfloat16, mask), results(torch.bfloat16, runs)
    for reference, plain, *fast in zip(exact, masked, flash, ours, strict=True):
        for each in fast:
            assert (each - reference).norm() <= 2 * (plain - reference).norm()
