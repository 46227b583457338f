"""QLoRA in numbers: one block of weights through NF4, and one layer through a forward and a backward pass.

Everything printed is computed by the functions that train, `nf4.quantize_nf4`, `NF4Linear` and `LoRALinear`; this file
only chooses what to show and lays it out, in at most 80 columns, with colour where the output is a terminal.
"""

from collections.abc import Iterator
from itertools import chain
from math import floor, log10

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import linear

from minilora.backend import dtype_name
from minilora.checkpoint.open import open_checkpoint
from minilora.config import LoraConfig
from minilora.dynamic_8bit import dynamic_map
from minilora.errors import UsageError, UserError
from minilora.linear import NF4Linear
from minilora.lora import LoRALinear
from minilora.nf4 import CPU, LEVELS, NESTED_BLOCK_SIZE, NF4Tensor, levels, quantize_nf4, thresholds

WIDTH = 80
SHOWN_BLOCKS = 8  # of those that share a nested absmax
LONGEST_BAR = 24
OUT, IN, RANK, ALPHA = 4, 6, 2, 4.0  # the small layer
LARGE_NESTED_ERROR = 0.02  # of an absmax, for colour: double quantization's mean error is some 0.2 %
WIDEST_STEP = 1 + LEVELS[1]  # between the two levels that lie furthest apart, -1 and -0.696


def weight_of(numbers: list[float] | None, tensor: str | None, path: str) -> tuple[Tensor | None, str]:
    """What to explain, and what it is called: these numbers, that tensor of the base at `path`, or else random ones.

    Raises UsageError where both are named, or no numbers, and UserError where there is no such tensor.
    """
    if numbers is not None and tensor is not None:
        raise UsageError("--weights and --tensor both name the block; give one of them")
    if numbers is not None:
        if not numbers:
            raise UsageError("--weights is empty; give numbers, such as [0.1,-0.2]")
        return torch.tensor(numbers), "given"
    if tensor is None:
        return None, "random"
    checkpoint, name = open_checkpoint(path), tensor.removeprefix("model.")
    specs = {spec.name: spec for spec in checkpoint.tensors()}
    if name not in specs:
        raise UserError(f"{checkpoint.folder}: no tensor {name!r}; there is {next(iter(specs))}, and others")
    return checkpoint.read(specs[name]), name


def explain(weight: Tensor | None, *, name: str, block: int, seed: int, console: Console) -> None:
    """Print both stories.

    weight: any shape; None is a random (64, 64) matrix with the spread of a trained one, drawn from `seed`
    name: what to call it; block: which of its blocks of 64 to show
    Raises UserError if the weight has no such block, or holds a number that is not finite.
    """
    if weight is None:
        weight = 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    for part in chain(_block(weight, name, block), _layer(seed)):
        console.print(part, width=min(console.width, WIDTH), markup=False, highlight=False)


def _block(weight: Tensor, name: str, block: int) -> Iterator[RenderableType]:
    """One block of `weight` through quantization, packing, dequantization and double quantization."""
    plain, nested = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
    n_blocks = len(plain.absmax)
    if not 0 <= block < n_blocks:
        raise UserError(f"there is no block {block} in {name}: it has {n_blocks}, numbered from 0")
    start = block * plain.block_size
    values = weight.detach().reshape(-1)[start : start + plain.block_size].float()
    yield _heading(f"{name}: block {block} of {n_blocks} through NF4")
    yield (
        f"{name} has shape {tuple(weight.shape)} and dtype {dtype_name(weight.dtype)}. Flattened row "
        f"by row and cut into blocks of {plain.block_size}, its block {block} holds numbers {start} to "
        f"{start + len(values) - 1}."
    )
    at = int(values.abs().argmax())
    yield _step("1  absmax: the block's largest magnitude, kept beside it")
    yield f"absmax = |w[{at}]| = {plain.absmax[block]:.8g}. Divided by it, every number lies from -1 to 1."
    yield from _levels(plain.codes()[start : start + len(values)])
    yield from _bytes(values, plain, block)
    yield from _double_quantization(plain, nested, block)
    yield from _storage(plain, nested)


# Layout


def _heading(text: str) -> Group:
    """A rule with a title, below an empty line."""
    return Group("", Rule(Text(text, style="bold"), align="left", characters="─"))


def _step(text: str) -> Group:
    return Group("", Text(text, style="bold cyan"))


def _table(sides: str, *titles: str) -> Table:
    """A table without lines but the one below its head; sides: of each column "l" or "r", where its text keeps to."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", show_edge=False)
    for side, title in zip(sides, titles, strict=True):
        table.add_column(title, justify="right" if side == "r" else "left", no_wrap=True)
    return table


def _level_style(scaled: float) -> str:
    """The colour of a number: blue below zero, orange above it, the stronger the further away; grey at zero."""
    grey, strong = (140, 140, 140), (60, 130, 255) if scaled < 0 else (255, 130, 30)
    share = min(1.0, abs(scaled)) ** 0.5
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(grey, strong, strict=True))
    return f"rgb({red},{green},{blue})"


def _error_style(error: float, largest: float) -> str:
    share = abs(error) / largest if largest else 0.0
    return "green" if share < 1 / 4 else "yellow" if share < 1 / 2 else "red"


def _unit(absmax: float) -> float:
    """What the numbers of a block are printed in: 1, or the power of ten below an absmax that is far from 1."""
    return 1.0 if absmax == 0 or 1e-2 <= absmax < 1e3 else float(10.0 ** floor(log10(absmax)))


def _number(value: float, absmax: float) -> str:
    """8 characters for numbers up to absmax < 1000, which has been divided by its unit."""
    return f"{value:+.{5 if absmax < 10 else 4 if absmax < 100 else 3}f}"


# The block


def _levels(codes: Tensor) -> Iterator[RenderableType]:
    yield _step("2  16 levels: quantiles of the normal distribution, and zero")
    yield "code = number of thresholds strictly below w / absmax; thresholds lie midway between levels."
    counts = codes.int().bincount(minlength=16).tolist()
    table = _table("rlrrl", "code", "bits", "above", "level", "in this block")
    lower_ends = ["", *(f"{t:+.6f}" for t in thresholds().tolist())]
    for code, (low, level, count) in enumerate(zip(lower_ends, levels().tolist(), counts, strict=True)):
        bar = Text(f"{count:3} ") + Text("█" * round(LONGEST_BAR * count / max(counts)), style=_level_style(level))
        table.add_row(f"{code}", f"{code:04b}", low, Text(f"{level:+.6f}", style=_level_style(level)), bar)
    yield table


def _bytes(values: Tensor, plain: NF4Tensor, block: int) -> Iterator[RenderableType]:
    """A table with two numbers a row, as they share a byte."""
    start, absmax = block * plain.block_size, float(plain.absmax[block])
    stop, unit = start + len(values), _unit(absmax)
    codes, packed = plain.codes()[start:stop], plain.packed[start // 2 : (stop + 1) // 2]
    decoded = plain.dequantize(torch.float32).view(-1)[start:stop]
    yield _step("3  codes, packed two a byte, the first in the high nibble; and decoded again")
    in_units = f" w and w' are in units of {unit:g}." if unit != 1 else ""
    yield f"w' = LEVELS[code] * absmax; error = w' - w, in % of absmax.{in_units}"
    table = _table("rllllll", "", "w", "w / absmax", "code", "hex", "w'", "error")
    rows = zip(values.tolist(), codes.tolist(), decoded.tolist(), strict=True)
    cells = [_number_cells(w, code, back, absmax or 1.0, unit) for w, code, back in rows]
    for i, byte in enumerate(packed.tolist()):
        first, second = [*cells, [Text("")] * 5][2 * i : 2 * i + 2]
        w, scaled, code, back, error = (Text(" ").join(pair) for pair in zip(first, second, strict=True))
        table.add_row(f"{2 * i}", w, scaled, code, Text(f"{byte:02x}", style="bold"), back, error)
    yield table
    if len(values) % 2:
        yield f"The last byte's low nibble has no number; it holds {packed[-1] & 15}, the code of zero."
    errors = (decoded - values).abs()
    share = float(errors.mean() / values.abs().mean()) if values.any() else 0.0
    yield (
        f"mean |error| = {errors.mean():.4g}, {share:.1%} of the mean |w|; largest {errors.max():.4g}. It can be "
        f"{50 * WIDEST_STEP:.1f} % of absmax at most, half the step from -1 to -0.696; green is below a quarter of "
        "that, red above half of it."
    )


def _number_cells(w: float, code: int, back: float, absmax: float, unit: float) -> list[Text]:
    """w, w / absmax, code, w', error: one number's share of a row."""
    error = (back - w) / absmax
    return [
        Text(_number(w / unit, absmax / unit)),
        Text(f"{w / absmax:+.3f}", style=_level_style(w / absmax)),
        Text(f"{code:2}", style=_level_style(LEVELS[code])),
        Text(_number(back / unit, absmax / unit), style=_level_style(back / absmax)),
        Text(f"{100 * error:+5.1f}", style=_error_style(error, WIDEST_STEP / 2)),
    ]


def _double_quantization(plain: NF4Tensor, nested: NF4Tensor, block: int) -> Iterator[RenderableType]:
    _, codes, nested_absmax, mean = nested.parts
    group = block // NESTED_BLOCK_SIZE
    first = max(group * NESTED_BLOCK_SIZE, min(block - SHOWN_BLOCKS // 2, len(plain.absmax) - SHOWN_BLOCKS))
    shown = range(first, min(first + SHOWN_BLOCKS, (group + 1) * NESTED_BLOCK_SIZE, len(plain.absmax)))
    offset, scale = float(mean), float(nested_absmax[group])
    rebuilt = nested.block_absmax()
    yield _step("4  double quantization: the absmax themselves in 8 bits")
    yield (
        f"offset, the mean of all {len(plain.absmax)} absmax = {offset:.8g}. What is left is cut into blocks of "
        f"{NESTED_BLOCK_SIZE}; the largest magnitude in this one, its nested absmax = {scale:.8g}. "
        "absmax' = level * nested absmax + offset."
    )
    table = _table("rrrrrrr", "block", "absmax", "- offset", "code", "level", "absmax'", "error")
    for b in shown:
        absmax, code, back = float(plain.absmax[b]), int(codes[b]), float(rebuilt[b])
        level = float(dynamic_map(CPU)[code])
        error = back / absmax - 1 if absmax else back
        table.add_row(
            *(f"{b}", f"{absmax:.6g}", f"{absmax - offset:+.6g}", f"{code}"),
            *(Text(f"{level:+.6f}", style=_level_style(level)), f"{back:.6g}"),
            Text(f"{error:+.3%}", style=_error_style(error, LARGE_NESTED_ERROR)),
            style="bold" if b == block else "",
        )
    yield table


def _storage(plain: NF4Tensor, nested: NF4Tensor) -> Iterator[RenderableType]:
    yield _step("5  what is stored")
    table = _table("lrr", "", "bytes", "bits a weight")
    stored = {"bfloat16": 2 * plain.n, "NF4": plain.nbytes, "NF4, double quantization": nested.nbytes}
    for label, n_bytes in stored.items():
        table.add_row(label, f"{n_bytes:,}", f"{8 * n_bytes / plain.n:.3f}")
    yield table


# The layer


def _layer(seed: int) -> Iterator[RenderableType]:
    """A forward and a backward pass of one small QLoRA layer."""
    layer, x = _small_layer(seed)
    assert isinstance(layer.base, NF4Linear)
    weight, packed = layer.base.weight, layer.base.packed
    yield _heading("One layer through QLoRA")
    yield (
        f"W is {OUT} by {IN}, frozen, in NF4; A is {RANK} by {IN} and B {OUT} by {RANK}, float32, and they learn. B "
        "starts at zero, so that training starts from the base's outputs; here it has moved a little."
    )
    y = layer(x)
    with torch.no_grad():
        reduced = linear(x, layer.lora_A)
        forward = [
            ("x", x, f"{IN} activations"),
            ("W'", weight.dequantize(), f"from {packed.nbytes} bytes of codes"),
            ("W'x", layer.base(x), "NF4Linear"),
            ("A", layer.lora_A, "learns"),
            ("Ax", reduced, "rank numbers"),
            ("B", layer.lora_B, "learns"),
            ("B(Ax)", linear(reduced, layer.lora_B), ""),
            ("y", y, "LoRALinear"),
        ]
    yield _step(f"6  forward: y = W'x + scale * B(Ax), scale = alpha/rank = {ALPHA:g}/{RANK} = {layer.scale:g}")
    yield _matrices(forward)
    loss = y.pow(2).sum() / 2
    db, da, dx = torch.autograd.grad(loss, (layer.lora_B, layer.lora_A, x))
    backward = [
        ("dL/dy", y, "= y for this loss"),
        ("dL/dB", db, "scale dL/dy (Ax)^T"),
        ("dL/dA", da, "scale B^T dL/dy x^T"),
        ("dL/dx", dx, "(W' + scale BA)^T dL/dy"),
    ]
    yield _step(f"7  backward: L = |y|^2 / 2 = {loss.item():.4f}; W' is decoded once more, for dL/dx")
    yield _matrices(backward)
    yield (
        f"dL/dW' is never computed: W has no gradient and no optimizer state, only {packed.numel()} bytes of "
        f"{dtype_name(packed.dtype)} codes (requires_grad = {packed.requires_grad}) and their absmax."
    )


def _small_layer(seed: int) -> tuple[LoRALinear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((OUT, IN), (RANK, IN), (OUT, RANK), (IN,))
    weight, a, b, x = (torch.randn(*size, generator=generator) for size in sizes)
    layer = LoRALinear(NF4Linear(quantize_nf4(weight)), LoraConfig(rank=RANK, alpha=ALPHA))
    layer.lora_A.data, layer.lora_B.data = a / IN**0.5, 0.1 * b
    return layer, x.requires_grad_()


def _matrices(rows: list[tuple[str, Tensor, str]]) -> Table:
    """One line a matrix row, a vector as one line."""
    table = _table("lll", "", "", "")
    table.show_header = False
    for label, tensor, note in rows:
        numbers = tensor.detach().view(-1, tensor.shape[-1]).tolist()
        lines = (Text(" ").join(Text(f"{v:+7.3f}", style=_level_style(v)) for v in row) for row in numbers)
        table.add_row(Text(label, style="bold"), Text("\n").join(lines), Text(note, style="dim"))
    return table
