"""`explain` prints what nf4.py, linear.py and lora.py compute: its output is read back and held against them."""

import re
from functools import cache
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor

from minilora.config import ModelConfig
from minilora.dynamic_8bit import dynamic_map
from minilora.errors import UserError
from minilora.linear import NF4Linear
from minilora.model import Mistral
from minilora.nf4 import CPU, quantize_nf4
from minilora.report.explain import _small_layer, explain

NUMBER = r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def output(
    weight: Tensor | None, *, name: str = "given", block: int = 0, seed: int = 0, width: int = 80, colour: bool = False
) -> str:
    file = StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    explain(weight, name=name, block=block, seed=seed, console=console)
    return file.getvalue()


@cache
def shown(case: str) -> str:
    weight, block = WEIGHTS[case]
    return output(weight, block=block)


def part(text: str, number: int) -> list[str]:
    """The lines below the heading "3  codes, ..." of a part."""
    found = re.search(rf"\n{number}  .*?(?=\n\n\d  |\n\nOne layer|\Z)", text, re.DOTALL)
    assert found, f"part {number} is missing"
    return found.group().splitlines()[2:]


def bf16_weight_of_a_model() -> Tensor:
    model = Mistral(ModelConfig(dim=32, n_layers=1, head_dim=8, hidden_dim=100, n_heads=4, n_kv_heads=2, vocab_size=9))
    model.init_weights(3)
    weight: Tensor = model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr, assignment]
    return weight.to(torch.bfloat16)


WEIGHTS = {
    "of a model, bf16": (bf16_weight_of_a_model(), 7),
    "random, many nested blocks": (torch.randn(300, 128, generator=torch.Generator().manual_seed(1)), 257),
    "a short last block": (torch.randn(3, 31, generator=torch.Generator().manual_seed(2)) * 30, 1),
    "three values": (torch.tensor([0.1, -0.2, 0.003]), 0),
    "one value": (torch.tensor([-3.0]), 0),
    "tiny": (1e-20 * torch.randn(64, generator=torch.Generator().manual_seed(3)), 0),
    "huge": (1e20 * torch.randn(64, generator=torch.Generator().manual_seed(3)), 0),
    "zeros": (torch.zeros(64), 0),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_bytes_and_numbers_are_those_of_nf4(case: str) -> None:
    weight, block = WEIGHTS[case]
    quantized = quantize_nf4(weight, double_quant=False)
    start, stop = block * 64, min(block * 64 + 64, weight.numel())
    values = weight.detach().float().view(-1)[start:stop]
    decoded = quantized.dequantize(torch.float32).view(-1)[start:stop]
    absmax = float(quantized.absmax[block])
    lines = part(shown(case), 3)
    unit = re.search(r"in\s+units\s+of\s+(\S+)\.", " ".join(lines))
    scale = float(unit[1]) if unit else 1.0

    read: dict[str, list[float]] = {"w": [], "scaled": [], "code": [], "back": [], "error": []}
    n_bytes, last = 0, stop - start - 1
    for line in lines:
        if not re.match(r" ?\d+ +[+-]\d+\.\d{3}", line):
            continue
        found = re.findall(rf"\b[0-9a-f]{{2}}\b(?= +[+-])|{NUMBER}", line)
        n = 1 if int(found[0]) == last else 2
        assert len(found) == 2 + 5 * n, line
        w, scaled, code, byte, back, error = (
            found[1 : 1 + n], found[1 + n : 1 + 2 * n], found[1 + 2 * n : 1 + 3 * n], found[1 + 3 * n],
            found[2 + 3 * n : 2 + 4 * n], found[2 + 4 * n :],
        )  # fmt: skip
        assert int(byte, 16) == quantized.packed[start // 2 + n_bytes]
        n_bytes += 1
        for key, numbers in zip(read, (w, scaled, code, back, error), strict=True):
            read[key] += [float(x) for x in numbers]

    assert n_bytes == (stop - start + 1) // 2
    assert read["code"] == quantized.codes()[start:stop].tolist()
    rounding = scale * 0.6 * 10.0 ** -(5 if absmax / scale < 10 else 4 if absmax / scale < 100 else 3)
    tolerance = rounding + 1e-6 * absmax
    assert torch.tensor(read["w"]).mul(scale).tolist() == pytest.approx(values.tolist(), abs=tolerance)
    assert torch.tensor(read["back"]).mul(scale).tolist() == pytest.approx(decoded.tolist(), abs=tolerance)
    assert read["scaled"] == pytest.approx((values / (absmax or 1)).tolist(), abs=6e-4)
    assert read["error"] == pytest.approx((100 * (decoded - values) / (absmax or 1)).tolist(), abs=0.06)


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_histogram_counts_the_block(case: str) -> None:
    weight, block = WEIGHTS[case]
    codes = quantize_nf4(weight).codes()[block * 64 : block * 64 + 64]
    rows = [line.split() for line in part(shown(case), 2) if re.match(r" +\d+  [01]{4} ", line)]
    assert [row[0] for row in rows] == [str(code) for code in range(16)]
    assert [row[1] for row in rows] == [f"{code:04b}" for code in range(16)]
    counts = [int(re.sub(r"█+", "", " ".join(row)).split()[-1]) for row in rows]
    assert counts == codes.int().bincount(minlength=16).tolist()
    bars = [" ".join(row).count("█") for row in rows]
    assert bars == [round(24 * count / max(counts)) for count in counts]


@pytest.mark.parametrize("case", WEIGHTS)
def test_double_quantization_is_that_of_nf4(case: str) -> None:
    weight, block = WEIGHTS[case]
    plain, nested = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
    lines = part(shown(case), 4)
    text = " ".join(lines)
    assert nested.nested_offset is not None
    assert nested.nested_absmax is not None
    offset, scale = re.findall(rf"absmax = ({NUMBER}|0)", text)[:2]
    assert float(offset) == pytest.approx(float(nested.nested_offset), rel=1e-7)
    assert float(scale) == pytest.approx(float(nested.nested_absmax[block // 256]), rel=1e-7)
    rows = [line.split() for line in lines if re.match(r" *\d+ +\S+ +[+-]\S+ +\d+ +[+-]", line)]
    assert str(block) in [row[0] for row in rows]
    for b, absmax, _, code, level, rebuilt, _ in rows:
        assert float(absmax) == pytest.approx(float(plain.absmax[int(b)]), rel=1e-5)
        assert int(code) == nested.absmax[int(b)]
        assert float(level) == pytest.approx(float(dynamic_map(CPU)[int(code)]), abs=1e-6)
        assert float(rebuilt) == pytest.approx(float(nested.block_absmax()[int(b)]), rel=1e-5)
    assert len({int(row[0]) // 256 for row in rows}) == 1  # blocks that share a nested absmax


def test_bits_a_weight() -> None:
    weight, _ = WEIGHTS["random, many nested blocks"]
    bits = [float(line.split()[-1]) for line in part(output(weight), 5) if re.search(r"\d\.\d{3}", line)]
    stored = [quantize_nf4(weight, double_quant=nested).nbytes for nested in (False, True)]
    assert bits == pytest.approx([16.0, *(8 * n / weight.numel() for n in stored)], abs=5e-4)


def matrices(lines: list[str]) -> dict[str, Tensor]:
    found: dict[str, list[list[float]]] = {}
    label = ""
    for line in lines:
        match = re.match(r"(\S*) +((?:[+-]\d+\.\d{3} *)+)", line)
        if match:
            label = match[1] or label
            found.setdefault(label, []).append([float(x) for x in match[2].split()])
    return {label: torch.tensor(rows) for label, rows in found.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_layer_is_nf4_linear_and_lora_linear(seed: int) -> None:
    text = output(None, seed=seed)
    forward, backward = matrices(part(text, 6)), matrices(part(text, 7))
    layer, x = _small_layer(seed)
    y = layer(x)
    (y.pow(2).sum() / 2).backward()
    base = layer.base
    assert isinstance(base, NF4Linear)
    assert x.grad is not None
    expected = {
        "x": x, "W'": base.weight.dequantize(), "W'x": base(x), "A": layer.lora_A, "B": layer.lora_B, "y": y,
        "dL/dx": x.grad, "dL/dA": layer.lora_A.grad, "dL/dB": layer.lora_B.grad, "dL/dy": y,
    }  # fmt: skip
    shown = forward | backward
    for label, tensor in expected.items():
        assert tensor is not None
        torch.testing.assert_close(shown[label], tensor.detach().view(shown[label].shape), rtol=0, atol=6e-4)
    # and it is the arithmetic that the page says it is, to the digits printed
    w, a, b, g = shown["W'"].double(), shown["A"].double(), shown["B"].double(), shown["dL/dy"].double()
    x64 = shown["x"].double()
    expected_y = x64 @ w.T + 2 * (x64 @ a.T @ b.T)
    torch.testing.assert_close(shown["y"].double(), expected_y, rtol=0, atol=0.02)
    torch.testing.assert_close(shown["dL/dx"].double(), g @ w + 2 * (g @ b @ a), rtol=0, atol=0.02)
    torch.testing.assert_close(shown["dL/dA"].double(), 2 * (g @ b).T @ x64, rtol=0, atol=0.02)
    torch.testing.assert_close(shown["dL/dB"].double(), 2 * g.T @ (x64 @ a.T), rtol=0, atol=0.02)


@pytest.mark.parametrize("case", WEIGHTS)
def test_piped_output_is_plain_and_narrow(case: str) -> None:
    weight, block = WEIGHTS[case]
    for width in (80, 100, 200):
        text = output(weight, block=block, name="layers.31.mlp.down_proj.weight", width=width)
        assert "\x1b" not in text
        assert "…" not in text  # nothing is cut off
        assert max(len(line) for line in text.splitlines()) <= min(width, 100)


def test_a_terminal_gets_colour_and_the_same_text() -> None:
    plain, coloured = output(None), output(None, colour=True)
    assert "\x1b[38;2;" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_the_random_weight_is_a_function_of_the_seed() -> None:
    assert output(None, name="random", seed=4) == output(None, name="random", seed=4)
    assert output(None, name="random", seed=4) != output(None, name="random", seed=5)


@pytest.mark.parametrize("block", [-1, 2, 10**9])
def test_a_block_that_is_not_there_is_refused(block: int) -> None:
    with pytest.raises(UserError, match=rf"no block {block} in some\.weight: it has 2"):
        output(torch.ones(100), name="some.weight", block=block)


def test_brackets_in_a_name_are_text() -> None:
    assert "[bold]x[/bold]" in output(torch.ones(3), name="[bold]x[/bold]")
