"""A GPU that is pretended, so that what a step would launch on one can be counted: used by `count_step`.

While a `PretendedGPU` is entered every tensor says that it lies on a GPU, so minilora goes the way that it goes there,
line by line; but all memory is the CPU's, Triton's kernels run under its interpreter, and torch's operators on the CPU.
So everything is executed, and each launch is seen as it happens: torch's operators by a dispatch mode (views and new
memory are none), Triton's by a hook around the interpreter.

What a CPU does not have is computed otherwise, and counted as what it stands for. FlashAttention over runs is the CPU's
attention (`visible.Pieces`); it counts as torch's launches on a GPU, one forward, three back and two that add up the
query heads of a key head, and moves the bytes that its definition reads and writes. A product of 16 bits added to
float32 is one launch, as it is on a GPU. No batch is small: weights are decoded for every product.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.watch import being_called
from minilora import attention, backend, linear, model
from minilora.attention import attend_back, attend_kept
from minilora.visible import Pieces, Runs

GPU = torch.device("cuda", 0)
CAPABILITY = (9, 0)
KINDS = ("products", "adapters", "dequantize", "attention", "elementwise", "loss", "optimizer")
BACK_LAUNCHES, GROUPED_LAUNCHES = 3, 2  # of torch's FlashAttention: dy y, dq dk dv, dq to 16 bits; and sums of dk, dv
FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")
# Operators that launch nothing on a GPU, but for views, which their schema tells.
NO_LAUNCH = (
    *("empty", "new_empty", "empty_like", "resize_", "set_"),
    *("detach", "lift_fresh", "_local_scalar_dense", "_unsafe_view"),
)
OVERWRITTEN = ("copy_", "zero_", "fill_")  # in place, without reading what was there
WRITES = {  # of Triton's kernels: what they write, and of that what they read too
    "dequantize_kernel": ("out",),
    "normalize_kernel": ("normed", "total", "inverse"),
    "normalize_back_kernel": ("dx", "normed"),
    "rotate_kernel": ("out",),
    "swiglu_kernel": ("h",),
    "swiglu_back_kernel": ("gate", "dh", "up"),
    "softmax_gradient_kernel": ("logits", "losses"),
    "adamw_kernel": ("p", "m", "v"),
}
READ_TOO = {"gate", "dh", "up", "logits", "p", "m", "v"}


@dataclass(frozen=True)
class Launch:
    """One kernel: bytes of the distinct memory that it reads, and that it writes; and its products' FLOPs."""

    kind: str
    name: str
    read: int
    written: int
    flops: int = 0


class PretendedGPU(TorchDispatchMode):
    """Entered, it is there, and `launches` grows. Not on a machine with a GPU, and Triton must interpret."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self._aside = 0  # within the computing of what counts as one launch
        self._stack = ExitStack()

    def __enter__(self) -> "PretendedGPU":
        from triton.runtime.interpreter import InterpretedFunction

        here = Tensor.device
        real: Callable[[Tensor], torch.device] = here.__get__

        def device(tensor: Tensor) -> torch.device:
            return real(tensor) if self._aside else GPU

        runs, ran = InterpretedFunction.run, self._triton
        patches: tuple[Any, ...] = (
            *(mock.patch.object(torch, name, _on_the_cpu(getattr(torch, name))) for name in FACTORIES),
            mock.patch.object(Tensor, "to", _on_the_cpu(Tensor.to)),
            mock.patch.object(Tensor, "device", property(device)),
            mock.patch.object(torch.cuda, "get_device_capability", _always(CAPABILITY)),
            mock.patch.object(torch.cuda, "device", _always(nullcontext())),
            mock.patch.object(backend, "compiler_lacks", _always(None)),  # the interpreter compiles nothing
            mock.patch.object(model, "has_flash_attention", _always(True)),
            mock.patch.object(attention, "_flash", self._flash),
            mock.patch.object(torch.ops.aten, "_flash_attention_backward", self._flash_back),
            mock.patch.object(linear, "fused_product", _always(None)),
            mock.patch.object(InterpretedFunction, "run", lambda *args, **kwargs: ran(runs, *args, **kwargs)),
        )
        for patch in patches:
            self._stack.enter_context(patch)
        backend.backend_for.cache_clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        backend.backend_for.cache_clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens while entered is not counted, and on the CPU."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    # -- torch's operators

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func is torch.ops.aten.addmm.dtype_out:
            to, a, b = kwargs["out"], args[1], args[2]
            with self.aside():
                made = torch.mm(a.float(), b.float()).mul_(kwargs.get("alpha", 1))
                to.add_(made)
            self._note(name, [to, a, b], [to], 2 * a.shape[0] * a.shape[1] * b.shape[1])
            return to
        out = func(*args, **kwargs)
        writes = [argument for argument in func._schema.arguments if _is_written(argument)]
        is_view = not writes and any(value.alias_info is not None for value in func._schema.returns)
        if is_view or name in NO_LAUNCH:
            return out
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [named[argument.name] for argument in writes] or out
        unread = [named.get(a.name) for a in writes if a.is_out or name in OVERWRITTEN or named.get("beta") == 0]
        if name == "ones_like":
            unread = _tensors(named)
        read = [x for x in _tensors(named) if not any(x is other for other in unread)]
        if name in ("embedding", "index_select"):  # some rows of a table
            read = [*_tensors(out), *(x for x in read if not x.is_floating_point())]
        self._note(name, read, _tensors(written), _flops(name, args))
        return out

    def _note(self, name: str, read: list[Tensor], written: list[Tensor], flops: int = 0) -> None:
        if kind := _kind(name):
            self.launches.append(Launch(kind, name, _bytes(read), _bytes(written), flops))

    # -- Triton's kernels

    def _triton(self, run: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(function.arg_names, args, strict=False)) | kwargs
        name, tensors = function.fn.__name__, {key: x for key, x in named.items() if isinstance(x, Tensor)}
        writes = set(WRITES[name])
        if name == "normalize_kernel":  # of what the two forms of it leave out
            writes -= ({"total"} if named["y"] is None else set()) | ({"inverse"} if named["IS_KNOWN"] else set())
            tensors = {key: x for key, x in tensors.items() if key != "total" or "total" in writes}
        read = [x for key, x in tensors.items() if key not in writes or key in READ_TOO]
        self._note(name, read, [x for key, x in tensors.items() if key in writes])
        with self.aside():
            return run(function, *args, **kwargs)

    # -- attention

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> tuple[Tensor, ...]:
        """In the place of `attention._flash`."""
        with self.aside():
            sees = Pieces.of(runs.lengths, runs.window)
            y, sums = attend_kept(q, k, v, sees)
        logsumexp = torch.empty(q.shape[2], q.shape[0] * q.shape[1])  # what a GPU's would be
        read, written = _bytes([q, k, v, runs.stops]), _bytes([y, logsumexp])
        self.launches.append(Launch("attention", "flash", read, written, 4 * _pairs(sees) * q.shape[2] * q.shape[3]))
        return y.flatten(0, 1), logsumexp, sums, logsumexp  # type: ignore[return-value]

    def _flash_back(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, *,
        cum_seq_q: Tensor, max_q: int, window_size_left: int, rng_state: tuple[Tensor, ...], **_: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """In the place of torch's operator, whose arguments are these."""
        runs = Runs(cum_seq_q, max_q, None if window_size_left < 0 else window_size_left + 1)
        with self.aside():
            sees = Pieces.of(runs.lengths, runs.window)
            grads = attend_back(dy[None], q[None], k[None], v[None], y[None], rng_state, sees)
        read, written = _bytes([dy, q, k, v, y, logsumexp, cum_seq_q]), _bytes(list(grads))
        more = BACK_LAUNCHES - 1 + (GROUPED_LAUNCHES if q.shape[1] != k.shape[1] else 0)
        flops = 10 * _pairs(sees) * q.shape[1] * q.shape[2]
        self.launches.append(Launch("attention", "flash back", read, written, flops))
        self.launches += [Launch("attention", "flash back", 0, 0)] * more
        return tuple(grad[0] for grad in grads)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def _on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with the CPU where it is told of the GPU. (A mode for functions does not reach into backward.)"""

    def here(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) and value == GPU else value

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*map(here, args), **{name: here(value) for name, value in kwargs.items()})

    return called


def _pairs(sees: Pieces) -> int:
    """Of a query and a key that it sees."""
    pairs = 0
    for piece in sees.pieces:
        n = piece.stop - piece.start
        pairs += n * (n + 1) // 2 if piece.mask is None else int((piece.mask == 0).sum())
    return sees.rows * pairs


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of the distinct memory that they show: what is repeated by a stride of 0 is there once."""
    found = {}
    for x in tensors:
        n = x.element_size()
        for size, stride in zip(x.shape, x.stride(), strict=True):
            n *= size if stride or not size else 1
        found[x.data_ptr(), tuple(x.shape), x.stride()] = n
    return sum(found.values())


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _flops(name: str, args: Any) -> int:
    """Of a product of matrices."""
    if name not in ("mm", "addmm", "addmm_"):
        return 0
    a, b = args[-2:]
    return int(2 * a.shape[0] * a.shape[1] * b.shape[1])


def _kind(name: str) -> str:
    """Whose launch it is, told by the package's functions that are being called; nothing where it is none."""
    functions = being_called()
    called, is_product = set(functions), name in ("mm", "addmm", "addmm_")
    if "PackedBatch.n_targets" in called:  # the host's, before the batch goes to a GPU
        return ""
    if name == "dequantize_kernel":
        return "dequantize"
    if any(function.startswith("FlatAdamW.") for function in functions):
        return "optimizer"
    if is_product and (called & {"multiply", "multiply_back", "_WholeRowCrossEntropy.forward"}):
        return "products"
    if is_product or functions[:1] in (["Projections.forward"], ["_decode_with"]):
        return "adapters"
    if any("CrossEntropy" in function for function in functions):
        return "loss"
    return "elementwise"
