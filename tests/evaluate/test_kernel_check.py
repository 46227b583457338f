"""`minilora verify kernels`: what it says of kernels that are right, and of one that is not."""

from typing import Any

import pytest
import torch
from marks import interpreted

from minilora.cli import main
from minilora.evaluate import kernel_check
from minilora.evaluate.kernel_check import Check
from minilora.kernels import nf4_dequantize, nf4_matmul, nf4_matvec, norm, rope, swiglu

pytestmark = interpreted
ELEMENTWISE = {"rms_norm", "add_rms_norm", "rms_norm_backward", "rotate", "rotate_back", "swiglu", "swiglu_backward"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "SHAPES", ((3, 64), (20, 128)))
    monkeypatch.setattr(kernel_check, "LAYERS", ())
    monkeypatch.setattr(kernel_check, "ROWS", (1, 3))
    monkeypatch.setattr(kernel_check, "COLUMNS", (77,))
    monkeypatch.setenv("COLUMNS", "100")  # no row in two


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is off is found on the first."""
    monkeypatch.setattr(kernel_check, "SHAPES", ((3, 64),))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "SHAPES", ())
    monkeypatch.setattr(kernel_check, "COLUMNS", ())


@pytest.mark.slow
def test_kernels_that_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "kernels"]) == 0
    out = capsys.readouterr().out
    words = (
        "computed by torch: the kernels are for GPUs",
        "sm_90",
        "an estimate",
        "matvec",
        "backward",
        "softmax",
        *ELEMENTWISE,
        "checks passed",
    )
    for each in (*words, *ELEMENTWISE):
        assert each in out
    assert "failed" not in out


@pytest.mark.usefixtures("one_shape")
def test_a_bit_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = nf4_dequantize.dequantize

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = right(*args, **kwargs)
        out.view(-1)[5] = torch.nextafter(out.view(-1)[5].float(), torch.tensor(9.0)).to(out.dtype) + 2**-14
        return out

    monkeypatch.setattr(nf4_dequantize, "dequantize", wrong)
    assert main(["verify", "kernels"]) == 1
    captured = capsys.readouterr()
    assert "2 of 2 failed" in captured.out
    assert captured.err.startswith("minilora verify: ")
    assert "the first: dequantize in float16, 3 x 64: 1 where 0 is allowed" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.usefixtures("one_shape")
def test_a_product_that_is_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = nf4_matmul.matmul
    monkeypatch.setattr(nf4_matmul, "matmul", lambda *a: (right(*a).double() * (1 + 2**-9)).to(a[0].dtype))
    nf4_matmul.matmul.__name__ = "matmul"
    assert main(["verify", "kernels"]) == 1
    assert "the first: matmul in float16, 3 rows, 3 x 64" in capsys.readouterr().err


@pytest.mark.usefixtures("no_weights")
def test_what_is_elementwise_and_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = swiglu.swiglu_backward

    def wrong(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h, d_gate, d_up = right(*args)
        return h, d_gate, d_up.double().mul(1 + 2**-8).to(d_up.dtype)

    monkeypatch.setattr(swiglu, "swiglu_backward", wrong)
    assert main(["verify", "kernels"]) == 1
    assert "the first: swiglu_backward in float32, 5x3x34" in capsys.readouterr().err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_what_is_off_where_rows_have_room_behind_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is written with room behind it the room's size is lost, of what is read the strides of the rows are."""
    module = next(module for module in (norm, rope, swiglu) if hasattr(module, name))
    right = getattr(module, name)

    def wrong(*args: Any) -> Any:
        if isinstance(args[-1], int) and args[-1]:
            results = right(*args)
            for each in (results,) if isinstance(results, torch.Tensor) else results:
                each[1] = each[0].clone()
            return results
        first, *rest = args
        width = rest[0].shape[1] if name == "swiglu_backward" else first[0].numel()
        return right(torch.as_strided(first, first.shape, (width, *first.stride()[1:])), *rest)

    monkeypatch.setattr(module, name, wrong)
    failed = [check for check in kernel_check.check_kernels(torch.device("cpu")) if not check.passed]
    assert {(check.operation, check.case) for check in failed} == {(name, "5x3x34, 16 columns behind")}


@pytest.mark.usefixtures("one_shape")
def test_columns_behind_decoded_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = nf4_dequantize.dequantize

    def wrong(weight: Any, dtype: Any, out: Any = None, columns: torch.Tensor | None = None) -> torch.Tensor:
        return right(weight, dtype, out, None if columns is None else columns.roll(1))

    monkeypatch.setattr(nf4_dequantize, "dequantize", wrong)
    assert main(["verify", "kernels"]) == 1
    assert "the first: dequantize in float32, 3 x 64, nested, 16 columns behind" in capsys.readouterr().err


@pytest.mark.usefixtures("one_shape")
def test_a_card_whose_table_has_no_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_matvec, "architecture", lambda _: 75)
    operations = {check.operation for check in kernel_check.check_kernels(torch.device("cpu"))}
    assert operations == {
        "quantize",
        "dequantize",
        "matvec",
        "backward",
        "softmax",
        "loss",
        "adamw",
        "adamw_8bit",
        *ELEMENTWISE,
    }


def test_no_number_does_not_pass() -> None:
    assert not Check("matmul", "float32", "", float("nan"), 1.0).passed
