"""What products are computed in: the dtype itself wherever the hardware has it."""

import pytest
import torch

from minilora import backend
from minilora.backend import pick_device, pick_dtype, product_dtype, product_dtype_of


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_products_stay(dtype: torch.dtype) -> None:
    assert product_dtype(torch.empty(1, dtype=dtype)) == dtype
