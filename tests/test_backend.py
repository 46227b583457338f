"""Which device and what on it computes; and in what: products in the dtype itself wherever the hardware has it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora import backend
from minilora.backend import backend_for, default_device, pick_device, pick_dtype, product_dtype, product_dtype_of


@pytest.mark.parametrize("is_there", [True, False])
def test_auto_is_the_gpu_where_there_is_one(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(backend, "default_device", default_device)  # conftest.py has another
    assert pick_device("auto").type == ("cuda" if is_there else "cpu")


def test_a_gpu_that_is_named_by_its_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = list[str]()
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as if they were there
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    assert [str(pick_device(name)) for name in ("cuda:1", "cuda", "cpu:0")] == ["cuda:1", "cuda", "cpu:0"]
    assert current == ["cuda:1"]


@pytest.mark.parametrize("native", [torch.bfloat16, torch.float16])
def test_a_16_bit_product_is_widened_only_where_the_cpu_lacks_it(
    native: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda dtype=dtype: dtype == native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(backend, "_cpu_product_dtype", backend._cpu_product_dtype.__wrapped__)  # uncached
    for dtype in (torch.bfloat16, torch.float16):
        assert product_dtype(torch.empty(1, dtype=dtype)) == (dtype if dtype == native else torch.float32)
        assert product_dtype(torch.empty(1, dtype=dtype, device="meta")) == dtype
        for device in (torch.device("cpu"), torch.device("meta")):
            assert product_dtype_of(dtype, device) == product_dtype(torch.empty(1, dtype=dtype, device=device))


@pytest.mark.parametrize("native", [False, True])
def test_avx512_alone_does_not_multiply_bfloat16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which oneDNN says that it supports it."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(backend, "_cpu_product_dtype", backend._cpu_product_dtype.__wrapped__)  # uncached
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16)) == (torch.bfloat16 if native else torch.float32)
    dtype, why = pick_dtype(torch.device("cpu"), "bfloat16")
    assert dtype == torch.bfloat16
    assert ("multiplies in float32" in why) != native


Has = Callable[..., str]


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Has:
    """has(card, found, headers=..., CC=..., ...) -> what computes on a GPU of a machine with these programs and
    variables, and why."""
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "Python.h").touch()
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "find_spec", lambda _: object())

    def ask(capability: tuple[int, int], *programs: str, headers: str = "headers", **environment: str) -> str:
        for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(backend, "which", lambda name: name if name in programs else None)
        folders = {("include", "posix_prefix"): str(tmp_path / headers)}  # Debian's default scheme has another
        monkeypatch.setattr(backend, "get_path", lambda *given: folders[given])
        made = backend_for.__wrapped__(torch.device("cuda"))  # uncached
        return f"{made.name}: {made.reason}"

    return ask


def test_a_gpu_has_the_kernels_where_triton_can_compile(has: Has, tmp_path: Path) -> None:
    for programs in (["gcc"], ["clang"], ["gcc", "clang"]):
        assert has((9, 0), *programs) == "triton: compute capability 9.0"
    assert has((7, 5), "/opt/cc", CC="/opt/cc") == "triton: compute capability 7.5"
    for name in ("CPATH", "C_INCLUDE_PATH"):
        path = f"{tmp_path / 'none'}::{tmp_path / 'headers'}"
        assert has((9, 0), "gcc", headers="none", **{name: path}) == "triton: compute capability 9.0"


def test_without_a_compiler_it_has_not(has: Has) -> None:
    """Triton takes CC as it is, and looks for no other."""
    without = "torch: Triton finds no C compiler (gcc, clang or CC)"
    assert has((9, 0), "g++", "cc") == without
    for named in ("none", "", "gcc -m64"):
        assert has((9, 0), "gcc", CC=named) == without


def test_without_python_s_headers_neither(has: Has, tmp_path: Path) -> None:
    without = "torch: Triton finds no Python.h (python3-dev)"
    assert has((9, 0), "gcc", headers="none") == has((9, 0), "gcc", headers="none", CPATH="") == without
    assert has((9, 0), "gcc", headers="none", CPATH=str(tmp_path / "none")) == without


def test_nor_have_other_cards_or_without_triton(has: Has, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has((7, 0), "gcc") == "torch: compute capability 7.0 is below 7.5"
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    assert has((9, 0), "gcc") == "torch: Triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert has((9, 0), "gcc").startswith("torch: the kernels are counted and tested for NVIDIA's")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_products_stay(dtype: torch.dtype) -> None:
    assert product_dtype(torch.empty(1, dtype=dtype)) == dtype
