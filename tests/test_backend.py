"""What products are computed in: the dtype itself wherever the hardware has it."""

import pytest
import torch

from minilora.backend import product_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_product_is_widened_only_where_the_cpu_lacks_it(dtype: torch.dtype) -> None:
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    native = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    assert product_dtype(torch.empty(1, dtype=dtype)) == (dtype if native else torch.float32)
    assert product_dtype(torch.empty(1, dtype=dtype, device="meta")) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_products_stay(dtype: torch.dtype) -> None:
    assert product_dtype(torch.empty(1, dtype=dtype)) == dtype
