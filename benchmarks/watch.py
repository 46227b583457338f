"""Every byte that a real step takes, by owner: what the predictions of `minilora.memory_of_step` are held against.

A `TorchDispatchMode` sees each tensor that torch makes, forward and backward, and a weak reference to its storage tells
when its memory is given back. So what was alive at the worst moment is known exactly, temporaries included. Whose it is
is told by identity (parameters, buffers, gradients, optimizer) or by the function of the package that made it; no
formula and no shape is asked.
"""

import sys
import weakref
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import scratch
from minilora.adamw import FlatAdamW
from minilora.memory import add_up, named_storages


@dataclass(eq=False)
class _Made:
    """Memory that a step took, alive from one of its operators to another."""

    owner: str
    n_bytes: int
    born: int
    died: float = inf


class StepWatch(TorchDispatchMode):
    """While entered, sees all memory that torch takes and gives back, and keeps the moment when most was alive.

    What an operator takes for itself alone is not seen: it is small. The clock counts operators.
    """

    def __init__(self, model: nn.Module, optimizer: FlatAdamW) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._optimizer = model, optimizer
        self._alive: dict[int, tuple[weakref.ref[Any], _Made]] = {}
        self._made: list[_Made] = []
        self._clock = self._bytes = self._most = self._moment = 0
        self._kept = sum(buffer.nbytes for buffer in scratch._held.__dict__.values())  # used again, so not made now

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._clock += 1
        given, new = (
            {s._cdata: s for x in tree_leaves(some) if isinstance(x, Tensor) for s in [x.untyped_storage()]}
            for some in ((args, kwargs), out)
        )
        for address in new.keys() - given.keys() - self._alive.keys():
            made = _Made(_owner(str(func)), new[address].nbytes(), self._clock)
            self._alive[address] = weakref.ref(new[address], partial(self._drop, address)), made
            self._made.append(made)
            self._bytes += made.n_bytes
        if self._bytes > self._most:
            self._most, self._moment = self._bytes, self._clock
        return out

    def _drop(self, address: int, _: Any) -> None:
        _, made = self._alive.pop(address)
        made.died, self._bytes = self._clock + 0.5, self._bytes - made.n_bytes

    def owners(self) -> dict[str, int]:
        """Bytes by owner at that moment."""
        named = named_storages(self._model, self._optimizer)
        always = {made for address, (_, made) in self._alive.items() if address in named}
        then = [made for made in self._made if made.born <= self._moment < made.died and made not in always]
        return add_up(*named.values(), {"scratch": self._kept}, *({made.owner: made.n_bytes} for made in then))


def being_called() -> list[str]:
    """The package's functions that are, by their qualified names, the innermost first."""
    functions, frame = list[str](), sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("minilora."):
            functions.append(frame.f_code.co_qualname)
    return functions


def _owner(operator: str) -> str:
    """What the memory is for that an operator takes now: told by the package's functions that are being called."""
    functions = being_called()
    inner, called, adds = functions[0] if functions else "", set(functions), "add" in operator
    within = next((name for name in functions if name.endswith((".forward", ".backward"))), "")
    in_block = bool(called & {"Block.forward", "FusedBlock.forward"})
    if inner == "decoded":
        return "decoded weights"
    if within.endswith(".backward") or called & {"slices", "scratch"}:
        return "scratch"
    if within == "_TiledCrossEntropy.forward":
        return "logits"
    if "cross_entropy_sum" in called or (within in ("RMSNorm.forward", "_Norm.forward") and not in_block):
        return "final hidden"
    if not in_block and "Mistral.hidden" not in called:
        return "scratch"  # a gradient on its way
    if "embedding" in operator or (adds and inner in ("Block.forward", "_Block.forward", "add_rms_norm")):
        return "residual stream"
    if inner in ("Projections.forward", "Projections._every_a", "LoRALinear.forward") and not adds:
        return "adapter inputs"
    if within == "RMSNorm.forward":
        return "norms"
    attends = "_fill_attention" in called or not called & {"MLP.forward", "_Block.forward"}
    return "attention" if attends else "mlp"
