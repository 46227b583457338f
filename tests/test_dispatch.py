"""Which way a product takes, and that a layer computes the same by each of them: in the interpreter, or on a GPU."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, random

import minilora.dispatch as dispatch
from minilora.backend import backend_for
from minilora.config import LoraConfig
from minilora.dispatch import FLOAT32_ROWS, TABLE, Entry, Limits, entry_for, table
from minilora.errors import UserError
from minilora.kernels import nf4_matmul, nf4_matvec
from minilora.kernels.nf4_matmul import MAX_ROWS, tile
from minilora.kernels.nf4_matvec import MAX_VECTORS
from minilora.linear import NF4Linear
from minilora.lora import LoRALinear
from minilora.nf4 import NF4Tensor, quantize_nf4


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels also where the interpreter runs them."""
    monkeypatch.setattr(dispatch, "has_kernels", lambda _: True)


@pytest.fixture
def table_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is read in place of dispatch.json; it is not there yet."""
    monkeypatch.setattr(dispatch, "TABLE", tmp_path / "dispatch.json")
    table.cache_clear()
    yield tmp_path / "dispatch.json"
    table.cache_clear()


def test_the_table_is_whole() -> None:
    archs = [entry.arch for entry in table()]
    assert archs == sorted(set(archs))
    assert archs[0] == 75
    for entry in table():
        floors = [limits.least_weights for limits in entry.limits]
        assert floors == sorted(set(floors))
        assert floors[0] == 0
        for limits in entry.limits:  # what the launchers take
            assert 0 <= limits.matvec <= MAX_VECTORS
            assert limits.matvec <= limits.matmul <= MAX_ROWS
        # What no card has shown to be right is off.
        assert entry.card is not None or not entry.shuffle
    assert json.loads(TABLE.read_text())


def test_turing_has_no_tensor_cores_in_triton() -> None:
    assert all(limits.matmul <= limits.matvec for limits in entry_for(75).limits)


@pytest.mark.parametrize(("arch", "entry"), [(70, 75), (79, 75), (80, 80), (86, 80), (89, 80), (90, 90), (999, 120)])
def test_an_architecture_has_the_entry_of_the_newest_before_it(arch: int, entry: int) -> None:
    assert entry_for(arch).arch == entry


def test_ways_by_rows_and_weights() -> None:
    entry = Entry(90, None, False, (Limits(0, 2, 2), Limits(1 << 20, 1, 64)))
    in_bfloat16 = partial(entry.way, dtype=torch.bfloat16)
    assert [in_bfloat16(m, 512, 512) for m in (1, 2, 3)] == ["matvec", "matvec", "dequantize"]
    assert [in_bfloat16(m, 1024, 1024) for m in (1, 2, 64, 65)] == ["matvec", "matmul", "matmul", "dequantize"]


def test_float32_has_no_tensor_cores() -> None:
    """One tile of rows, and where the table has no matmul for 16 bits, none."""
    assert tile(256, 80, 4)[0] == tile(256, 90, 4)[0] == FLOAT32_ROWS
    assert [entry_for(80).way(m, 4096, 4096, torch.float32) for m in (2, 3, 32, 33)] == [
        "matvec", "matmul", "matmul", "dequantize",
    ]  # fmt: skip
    assert entry_for(75).way(3, 4096, 4096, torch.float32) == "dequantize"
    assert entry_for(90).way(33, 4096, 4096, torch.float32) == "dequantize"


@pytest.mark.usefixtures("on_triton")
def test_float32_that_triton_rounds_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize_nf4(random(4, 64))
    monkeypatch.setattr(nf4_matvec, "architecture", lambda _: 100)
    monkeypatch.setattr(nf4_matmul, "TRITON", (3, 7))
    taken = [dispatch.fused_product(random(m, 64), weight) is not None for m in (1, 2, 3)]
    assert taken == [True, True, False]
    assert dispatch.fused_product(random(3, 64).half(), weight) is not None


LIMITS = {"least_weights": 0, "matvec": 2, "matmul": 2}
ENTRY = {"arch": 75, "card": None, "shuffle": False, "limits": [LIMITS]}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "7", "{}", "[]", "[7]", '[{"arch": 75}]', "[" * 100_000),
        json.dumps([ENTRY | {"arch": 80}]),
        json.dumps([ENTRY | {"more": 1}]),
        json.dumps([ENTRY | {"arch": "75"}]),
        json.dumps([ENTRY | {"limits": None}]),
        json.dumps([ENTRY | {"limits": []}]),
        json.dumps([ENTRY | {"limits": [{"matvec": 2}]}]),
        json.dumps([ENTRY | {"limits": [LIMITS | {"least_weights": 1}]}]),
        json.dumps([ENTRY | {"limits": [LIMITS | {"matmul": "2"}]}]),
        *(json.dumps([ENTRY | {"limits": [LIMITS | {"matvec": n}]}]) for n in (-1, MAX_VECTORS + 1)),
        json.dumps([ENTRY | {"limits": [LIMITS | {"matmul": MAX_ROWS + 1}]}]),
        json.dumps([ENTRY | {"limits": [LIMITS, LIMITS]}]),
    ],
)
def test_a_damaged_table(text: str, table_file: Path) -> None:
    table_file.write_text(text)
    with pytest.raises(UserError) as told:
        table()
    assert str(told.value).startswith(f"{table_file} is damaged: ")
    assert "install minilora again" in str(told.value)


def test_a_table_that_is_not_there(table_file: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        table()
    table_file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is damaged"):
        table()


def test_entries_in_any_order(table_file: Path) -> None:
    table_file.write_text(json.dumps([ENTRY | {"arch": arch} for arch in (90, 75, 80)]))
    assert [entry.arch for entry in table()] == [75, 80, 90]
    assert entry_for(86).arch == 80


def test_the_table_and_the_launchers_agree() -> None:
    assert (dispatch.MOST_VECTORS, dispatch.MOST_ROWS) == (MAX_VECTORS, MAX_ROWS)


def test_a_cpu_has_the_definitions() -> None:
    assert backend_for(torch.device("cpu")).name == "torch"
    assert dispatch.fused_product(random(1, 64).cpu(), quantize_nf4(random(4, 64).cpu())) is None


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 20, 300])
def test_a_layer_computes_the_same(rows: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and the adapter's branch; 300 rows are more than any kernel takes."""
    weight = quantize_nf4(0.02 * random(40, 128), double_quant=double_quant)
    layer = LoRALinear(NF4Linear(weight), LoraConfig(rank=4, alpha=8)).to(DEVICE)
    torch.nn.init.normal_(layer.lora_B, generator=torch.Generator(DEVICE).manual_seed(0))
    results = []
    for by_kernels in (True, False):
        monkeypatch.setattr(dispatch, "has_kernels", lambda _, answer=by_kernels: answer)
        x = random(rows, 128, seed=1).requires_grad_()
        y = layer(x)
        layer.zero_grad()
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.usefixtures("on_triton")
def test_the_kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test before would compare torch with itself."""
    from minilora.kernels import nf4_dequantize, nf4_matmul, nf4_matvec, nf4_quantize

    called = []

    def spy(module: object, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (called.append(name), function(*a, **k))[1])

    spy(nf4_dequantize, "dequantize")
    spy(nf4_matvec, "matvec")
    spy(nf4_matmul, "matmul")
    spy(nf4_quantize, "quantize_nf4")
    layer = NF4Linear(dispatch.quantize(0.02 * random(40, 128)))
    for rows in (1, 3, 300):
        layer(random(rows, 128))
    assert called == ["quantize_nf4", "matvec", "matmul", "dequantize"]


@pytest.mark.usefixtures("on_triton")
def test_what_the_kernels_do_not_take_is_decoded() -> None:
    """Rows that are not whole blocks, no rows at all, bytes at an odd place."""
    odd = quantize_nf4(random(6, 96))
    assert dispatch.fused_product(random(1, 96), odd) is None
    layer = NF4Linear(odd)
    torch.testing.assert_close(layer(random(2, 96)), random(2, 96) @ odd.dequantize().T, rtol=1e-5, atol=1e-5)
    whole = quantize_nf4(random(4, 64))
    assert NF4Linear(whole)(random(0, 64)).shape == (0, 4)
    moved = torch.empty(len(whole.packed) + 1, dtype=torch.uint8, device=DEVICE)
    moved[1:] = whole.packed
    assert whole.nested_absmax is not None
    parts = whole.shape, whole.dtype, whole.block_size, whole.nested_absmax, whole.nested_offset
    layer = NF4Linear(NF4Tensor(moved[1:], whole.absmax, *parts))
    torch.testing.assert_close(layer(random(2, 64)), random(2, 64) @ whole.dequantize().T, rtol=1e-5, atol=1e-5)
    at_three = torch.frombuffer(bytearray(len(whole.packed) + 4), dtype=torch.uint8, offset=1)[3:]
    at_three.copy_(whole.packed)  # an address of whole words, but no view of 32 bits
    assert dispatch.fused_product(random(1, 64).cpu(), replace(whole, packed=at_three)) is None
    assert dispatch.fused_product(random(1, 64).double(), whole) is None


@pytest.mark.usefixtures("on_triton")
def test_the_same_bytes() -> None:
    weight = 0.02 * random(50, 72)
    ours, plain = dispatch.quantize(weight), quantize_nf4(weight)
    for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name


def test_a_card_that_has_the_exchange_wrong_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilora.kernels import nf4_matvec

    monkeypatch.setattr(nf4_matvec, "shuffle_is_right", lambda _: False)
    dispatch._may_shuffle.cache_clear()
    with pytest.warns(UserWarning, match="the plain one is taken") as told:
        assert [dispatch._may_shuffle(DEVICE) for _ in range(2)] == [False, False]
    assert len(told) == 1
    dispatch._may_shuffle.cache_clear()
