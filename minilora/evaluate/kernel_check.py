"""What this machine's kernels are off by: each against its definition, and against float64.

Quantizing and dequantizing must give the bits of the definition. A product, forward and backward, must be off by no
more than twice what plain torch is off by in the same dtype, or than K terms summed in float32 are in any order: both
against the same product in float64. So must what is elementwise, or than ten roundings to float32 are, and the
gradients and losses of logits. Where there is no GPU, the interpreter of Triton runs the kernels, in the dtypes that it
computes rightly.

Triton compiles a kernel for each dtype and way, and again for sizes that are 1 or multiples of 16, which is what the
time goes to. So not every pair is tried of what knows nothing of each other: absmax without a second quantization, and
a layer's size, with a dtype that the card does not train in, or the first with the shuffle or with columns behind the
rows. Weights of one row are left to each kernel's tests.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import unwrap
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional

from minilora import adamw
from minilora.backend import dtype_name
from minilora.dispatch import entry_for, launcher
from minilora.errors import UserError
from minilora.loss import IGNORE
from minilora.nf4 import NF4Tensor
from minilora.nf4 import quantize_nf4 as quantize_by_definition
from minilora.norm import add_rms_norm, rms_norm, rms_norm_backward
from minilora.rope import apply_rope, rotate, rotate_back
from minilora.softmax_gradient import softmax_gradient_
from minilora.swiglu import swiglu, swiglu_backward

# (N, K): rows of one block, tails of every tile; on a GPU layers, too, for which the interpreter would take minutes
SHAPES = ((3, 64), (129, 192), (40, 576))
LAYERS = ((4096, 4096), (14336, 4096))
ROWS = (1, 2, 3, 100, 256)
COLUMNS = (1, 999, 4097)  # of logits
VOCABULARIES = (32000, 32768, 131072)
# (N, H, Dh) of what is elementwise: no multiples of 16; on a GPU a layer's, too
SMALL, WIDE = (5, 3, 34), (512, 32, 128)
ROOM = 16  # columns behind rows, which a kernel leaves alone
EPS = 1e-5
TWICE = 2.0
ROUNDINGS = 10 * 2**-24


@dataclass(frozen=True)
class Check:
    """An operation, on what, and its error: how many numbers differ, or the largest error, as a share of the largest
    number or, of a product, of the largest sum of its terms' magnitudes; with 8 bits that of p and of codes."""

    operation: str
    dtype: str
    case: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN is not


def refuse_failed(checks: Sequence[Check]) -> None:
    """Raise UserError if one of them failed."""
    if failed := [check for check in checks if not check.passed]:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(checks)} checks failed, the first: {first.operation} in {first.dtype}, "
            f"{first.case}: {first.error:.2g} where {first.allowed:.2g} is allowed; do not train with them, report it"
        )


def check_kernels(device: torch.device) -> Iterator[Check]:
    """Each check as it is done. On a CPU, switches Triton's interpreter on for the process."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, which the functions below do
    dtypes = [torch.float32, torch.float16]
    if on_gpu and torch.cuda.get_device_capability(device) >= (8, 0):
        dtypes.append(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for n, k in (*SHAPES, *(LAYERS if on_gpu else ())):
        dense = (0.02 * torch.randn(n, k, generator=generator)).to(device)
        for double_quant in (False, True):
            weight = quantize_by_definition(dense, double_quant=double_quant)
            case = f"{n} x {k}" + ", nested" * double_quant
            yield _quantized(dense, weight, case)
            for dtype in dtypes if double_quant and (n, k) not in LAYERS else dtypes[-1:]:
                yield from _dequantized(weight, dtype, case)
                for m in ROWS:
                    x = torch.randn(m, k, generator=generator).to(device, dtype)
                    yield from _products(x, weight, f"{m} rows, {case}")
    for v in (*COLUMNS, *(VOCABULARIES if on_gpu else ())):
        for dtype in dtypes:
            yield from _softmax((4 * torch.randn(8, v, generator=generator)).to(device, dtype))
    for dtype in dtypes:
        yield from _elementwise(*SMALL, dtype, device, generator)
    if on_gpu:
        yield from _elementwise(*WIDE, dtypes[-1], device, generator)
    yield from _adamw([torch.randn(5000, generator=generator).abs().to(device) for _ in range(4)])


def _quantized(dense: Tensor, weight: NF4Tensor, case: str) -> Check:
    from minilora.kernels.nf4_quantize import quantize_nf4

    ours = quantize_nf4(dense, double_quant=weight.nested_absmax is not None)
    pairs = zip(ours.parts, weight.parts, strict=True)
    return Check("quantize", "float32", case, sum(int((a != b).sum()) for a, b in pairs), 0)


def _dequantized(weight: NF4Tensor, dtype: torch.dtype, case: str) -> Iterator[Check]:
    from minilora.kernels.nf4_dequantize import dequantize

    for more in (0, ROOM)[: 1 + (weight.nested_absmax is not None)]:  # columns behind the rows, as adapters have them
        rows = weight.dequantize(dtype)
        columns = rows[:, :more].contiguous()
        ours = dequantize(weight, dtype, None, columns if more else None)
        differ = int((ours != torch.cat([rows, columns], dim=1)).sum())
        yield Check("dequantize", dtype_name(dtype), case + f", {more} columns behind" * bool(more), differ, 0)


def _products(x: Tensor, weight: NF4Tensor, case: str) -> Iterator[Check]:
    """y = x W'^T by the kernel for so many rows, if it has a place in the table of ways, and dx = y W' by decoding with
    the kernel."""
    from minilora.kernels.nf4_dequantize import dequantize
    from minilora.kernels.nf4_matmul import is_exact, matmul
    from minilora.kernels.nf4_matvec import MAX_VECTORS, architecture, matvec, shuffle_is_right

    arch = architecture(x.device)
    takes_matmul = is_exact(x.dtype, arch) and any(row.matmul > row.matvec for row in entry_for(arch).limits)
    reference = weight.dequantize(torch.float32)
    plain = x @ weight.dequantize(x.dtype).T
    may_shuffle = weight.nested_absmax is not None and x.device.type == "cuda" and shuffle_is_right(x.device)
    operation = matvec if len(x) <= MAX_VECTORS else matmul
    for shuffle in (False, True)[: 1 + may_shuffle] if operation is matvec or takes_matmul else ():
        name, y = operation.__name__ + ", shuffle" * shuffle, operation(x, weight, shuffle)
        yield _compared(name, case, y, plain, x, reference.T)
    dy = plain
    plain = dy @ weight.dequantize(x.dtype)
    yield _compared("backward", case, dy @ dequantize(weight, x.dtype), plain, dy, reference)


def _softmax(logits: Tensor) -> Iterator[Check]:
    """Gradients and losses of logits, every fourth of whose rows has no target. Errors are shares of the largest."""
    labels = torch.arange(len(logits), device=logits.device) * 7919 % logits.shape[1]
    labels[3::4] = IGNORE
    made = [logits.clone(), logits.clone(), logits.double()]
    plain = unwrap(softmax_gradient_)
    functions = (launcher(softmax_gradient_), plain, plain)
    losses = [function(z, labels, IGNORE) for function, z in zip(functions, made, strict=True)]
    of_exponential = 64 * 2**-24  # whose argument is 64 at most
    for name, results in (("softmax", made), ("loss", losses)):
        yield _beside(name, logits.dtype, f"{logits.shape[1]} columns", results, of_exponential)


def _adamw(parts: list[Tensor]) -> Iterator[Check]:
    """p, m and v after an update by a learning rate that is large enough for an error of it to show in p; of moments in
    8 bits, too, whose codes may be one level off where rounding puts a number on the other side of a threshold."""
    update, plain = adamw.Update(0.1, 0.9, 0.999, 1e-8, 0.1, 3, 0.5), unwrap(adamw.adamw_)
    made = [[part.clone() for part in parts], [part.clone() for part in parts], [part.double() for part in parts]]
    for function, given in zip((launcher(adamw.adamw_), plain, plain), made, strict=True):
        function(*given, update)
    for i, name in ((0, "p"), (2, "m"), (3, "v")):
        yield _beside("adamw", torch.float32, name, [each[i] for each in made], 16 * 2**-24)  # of its roundings
    n = len(parts[0]) // 256 * 256
    codes = (torch.arange(n, device=parts[0].device) * 7919 % 256).to(torch.uint8)
    absmax = torch.ones(n // 256, device=codes.device)
    in_8_bits = [*(part[:n] for part in parts[:2]), codes, codes.flip(0), absmax, absmax]
    ours, theirs = made = [[part.clone() for part in in_8_bits] for _ in range(2)]
    for function, given in zip((launcher(adamw.adamw_8bit_), unwrap(adamw.adamw_8bit_)), made, strict=True):
        function(*given, update)
    for i, name, allowed in ((0, "p", 32 * 2**-24 * float(theirs[0].abs().max())), (2, "m", 1), (3, "v", 1)):
        yield Check("adamw_8bit", "float32", name, float((ours[i].double() - theirs[i]).abs().max()), allowed)


def _compared(operation: str, case: str, y: Tensor, plain: Tensor, a: Tensor, b: Tensor) -> Check:
    """y and plain torch's own against a @ b in float64."""
    a, b = a.double(), b.double()
    terms = float((a.abs() @ b.abs()).max())
    in_float32 = a.shape[1] ** 0.5 * 2**-24  # as roundings add up that do not know of each other
    return _beside(operation, y.dtype, case, (y, plain, a @ b), in_float32, terms)


def _beside(
    operation: str, dtype: torch.dtype, case: str, results: Sequence[Tensor], floor: float, scale: float | None = None
) -> Check:
    """results: ours, plain torch's and the exact one. Allowed is twice plain torch's error, or `floor`, in shares of
    `scale`, by default the largest exact number."""
    *approximate, exact = results
    scale = scale or max(float(exact.abs().max()), 2.0**-24)
    of_exact = (each.double().narrow(-1, 0, exact.shape[-1]) for each in approximate)  # without the room behind rows
    error, of_torch = (float((each - exact).abs().max()) / scale for each in of_exact)
    return Check(operation, dtype_name(dtype), case, error, max(TWICE * of_torch, floor))


def _elementwise(
    n: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Iterator[Check]:
    """What the fast block does between its products, forward and backward, against autograd in float64; on rows that
    lie one behind the other, and on some with room behind them."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    d = heads * head_dim
    x, dy, gate, up = (draw(n, d) for _ in range(4))
    weight, angles = draw(d), draw(n, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    x64, dy64, gate64, up64 = (tensor.double().requires_grad_() for tensor in (x, dy, gate, up))

    def turned(x: Tensor) -> Tensor:
        return apply_rope(x.view(1, n, heads, head_dim), cos[None].double(), sin[None].double()).view(n, d)

    def normed(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.rms_norm(x, (d,), weight.double(), EPS), (x.square().mean(1, keepdim=True) + EPS).rsqrt()

    of_x, total, h64 = normed(x64), x + dy, functional.silu(gate64) * up64
    inverse, [back], [dx] = of_x[1].detach().float(), grad(turned(x64), x64, dy64), grad(of_x[0], x64, dy64)
    by_head = (n, heads, head_dim)
    for room in (0, ROOM):
        roomy_x, roomy_dy, roomy_up = (functional.pad(tensor, (0, room), value=nan) for tensor in (x, dy, up))
        heads_of_x, heads_of_dy = (tensor[:, :d].unflatten(1, by_head[1:]) for tensor in (roomy_x, roomy_dy))
        for definition, given, exact in (
            (rms_norm, (x, weight, EPS, dtype, None, room), of_x),
            (rms_norm, (x, weight, EPS, dtype, inverse, room), of_x),
            (add_rms_norm, (x, dy, weight, EPS, dtype, room), (x64 + dy64, *normed(total.double()))),
            (rms_norm_backward, (dy, x, weight, inverse, roomy_up[:, :d], room), (dx + up64, of_x[0])),
            (rotate, (heads_of_x, cos, sin), (turned(x64).view(by_head),)),
            (rotate_back, (heads_of_dy, cos, sin, room), (back,)),
            (swiglu, (gate, up, room), (h64,)),
            (swiglu_backward, (roomy_dy, gate, up), (h64, *grad(h64, (gate64, up64), dy64, retain_graph=True))),
        ):
            case = "x".join(map(str, by_head)) + f", {room} columns behind" * bool(room)
            yield _no_worse(definition, given, [tensor.detach() for tensor in exact], case)


def _no_worse(definition: Callable[..., Any], given: tuple[Any, ...], exact: Sequence[Tensor], case: str) -> Check:
    """The worst of a kernel's results, each beside the definition's own error."""
    made = []
    for function in (launcher(definition), unwrap(definition)):
        result = function(*deepcopy(given))  # in the same strides, which `clone` would make plain
        made.append((result,) if isinstance(result, Tensor) else result)
    name, dtype = definition.__name__, given[0].dtype
    checks = [_beside(name, dtype, case, results, ROUNDINGS) for results in zip(*made, exact, strict=True)]
    return max(checks, key=lambda check: (not check.passed, check.error / check.allowed))
