"""One pass over a base, a block at a time, in which the base, its adapters and every way of merging them go along.

Held-out text goes through the blocks in step: through the base's, through those with their adapters, as they were
trained, and through each way of merging them (`checkpoint/merge.py`). So a block is read once, and no model is ever
whole in memory: a 7B is merged and measured within 2.5 GB.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.backend import product_dtype
from minilora.base import Base
from minilora.checkpoint.adapter_parts import Adapter
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.load import Progress, Storage, fill, skeleton
from minilora.checkpoint.merge import merged_weight, plain_weight, refuse_prefix, requantized_weight
from minilora.checkpoint.names import TensorSpec
from minilora.checkpoint.nf4_file import nf4_tensors
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.safetensors_file import checksum
from minilora.config import Route
from minilora.data.encode import Sample
from minilora.data.pack import batches
from minilora.errors import UserError
from minilora.evaluate.distance import Distance
from minilora.linear import NF4Linear, multiply, product
from minilora.lora import adapters_off
from minilora.loss import IGNORE
from minilora.memory import as_text, free_bytes
from minilora.model import Block, Context
from minilora.nf4 import NF4Tensor

MERGED = torch.bfloat16  # what merged weights are stored in
BASE, ADAPTED = "(base)", "(adapted)"  # no routes
_LOGIT_ROWS = 256  # compared at a time: 34 MB of float32 logits a model, where V = 32768


@dataclass
class MergePass:
    """The pass, with the state of all models that go along. `weights` makes it, once.

    hidden: the hidden states of each batch, by whose they are: `BASE`, `ADAPTED` (the trained model) or a route (the
        one that was merged so); heads: what their logits are made with
    n_bytes: of the weights of each route; sums: checksums of what was stored of each weight by the last of them
    """

    base: Base
    adapter: Adapter
    samples: Sequence[Sample]
    max_seq_len: int
    routes: Sequence[Route]
    progress: Progress

    def __post_init__(self) -> None:
        base, config = self.base, self.base.checkpoint.config
        refuse_prefix(self.adapter.config)
        base.checkpoint.check_tied_head()
        self.config, self.skeleton = config, skeleton(config)
        self.storage = Storage(base.quantize is not None, base.double_quant, base.dtype, base.device)
        self.batches = list(batches(self.samples, self.max_seq_len, 1, base.device))
        n = sum(batch.tokens.numel() for batch in self.batches)
        needed = n * config.dim * base.dtype.itemsize * (2 + len(self.routes))
        if needed > (free := free_bytes(base.device)):
            held = f"the hidden states of {n:,} tokens, prompts included, take {as_text(needed)}"
            raise UserError(f"{held}, {as_text(free)} are free; compare on fewer, with --audit_tokens")
        self.contexts = [Context(config, b.positions, b.segments, None, base.dtype, runs=b.runs) for b in self.batches]
        self.hidden: dict[str, list[Tensor]] = {}
        self.heads: dict[str, Tensor] = {}
        self.n_bytes: dict[Route, int] = dict.fromkeys(self.routes, 0)
        self.sums: dict[str, list[int]] = {}

    def weights(self) -> Iterator[tuple[str, dict[Route, list[Tensor]]]]:
        """Each weight's name, and what of it is stored by each route."""
        done = 0
        for part, specs in groupby(self.base.checkpoint.tensors(), key=_part_of):
            for spec, made in self._part(part, list(specs)).items():
                stored = {route: _stored(weight) for route, weight in made.items()}
                for route, tensors in stored.items():
                    self.n_bytes[route] += sum(tensor.nbytes for tensor in tensors)
                    self.sums[spec.name] = [checksum(tensor) for tensor in tensors]
                yield spec.name, stored
                done += prod(spec.shape)
                self.progress(done, self.config.n_parameters)
        self.base.checkpoint.check_unchanged()

    def may_stop(self) -> None:
        """Let `progress` stop the work, all weights done."""
        self.progress(self.config.n_parameters, self.config.n_parameters)

    def distances(self) -> tuple[dict[Route, Distance], Distance]:
        """Once all weights have gone by: from each merged model, and from the base, to the trained one."""
        totals = dict[str, Distance]()
        for batch in range(len(self.batches)):
            for start in range(0, len(self.hidden[ADAPTED][batch]), _LOGIT_ROWS):
                self.may_stop()
                trained = self._logits(ADAPTED, batch, start)
                for who in (BASE, *self.routes):
                    found = Distance.of(self._logits(who, batch, start), trained)
                    totals[who] = totals[who] + found if who in totals else found
        return {route: totals[route] for route in self.routes}, totals[BASE]

    def reopen(self, folder: Path) -> None:
        """Read back what was written, by one route. Raises UserError if it is not what was meant to be."""
        written = open_checkpoint(folder)
        for spec in written.tensors():
            self.may_stop()
            weight = written.nf4[spec.name].read() if spec.name in written.nf4 else written.read(spec)
            if [checksum(tensor) for tensor in _stored(weight)] != self.sums[spec.name]:
                raise UserError(f"{folder}: read back, {spec.name} differs; is the disk sound? merge again")

    def _part(self, name: str, specs: list[TensorSpec]) -> dict[TensorSpec, dict[Route, Tensor | NF4Tensor]]:
        """The weights of one part of the model, merged, once the hidden states have gone through it."""
        part, plain = self._take(name), self._take(name)
        for spec in specs:
            fill(part, self.base.checkpoint, spec, self.storage)
        self.adapter.attach(part)
        made = {
            spec: {route: self._merged(part, spec, route) for route in self.routes}
            if spec.is_projection  # of what is never quantized all ways make the same
            else dict.fromkeys(self.routes, self._merged(part, spec, "trained"))
            for spec in specs
        }
        self._go(ADAPTED, name, part)
        with adapters_off(part):
            self._go(BASE, name, part)
        for route in self.routes:
            for spec in specs:
                _set_weight(plain, spec, made[spec][route], self.storage.dtype)
            self._go(route, name, plain)
        return made

    def _take(self, name: str) -> nn.Module:
        """A part of the model out of the skeleton, under its own name in a module that holds nothing else."""
        parent, part = nn.Module(), deepcopy(self.skeleton.get_submodule(name))
        above, _, last = name.rpartition(".")
        parent.add_module(above, nn.ModuleDict({last: part})) if above else parent.add_module(last, part)
        return parent

    def _merged(self, part: nn.Module, spec: TensorSpec, route: Route) -> Tensor | NF4Tensor:
        layer = part.get_submodule(spec.module)
        if route == "requantized":
            return requantized_weight(layer, self.base.double_quant, MERGED)
        original = self.base.checkpoint.read(spec).to(self.base.device) if route == "original" else None
        merged = merged_weight(layer, original).to(MERGED)
        refuse_not_finite(merged, spec.name, "the adapter's numbers are too large; its training has failed")
        return merged

    def _go(self, who: str, name: str, parent: nn.Module) -> None:
        """Take the hidden states through a part of the model: a block; or the embedding, norm or head."""
        module = parent.get_submodule(name)
        if isinstance(module, Block):
            hidden = self.hidden[who]
            for i, context in enumerate(self.contexts):  # one by one: what was before a block goes as what comes behind
                hidden[i] = module(hidden[i], context)
        elif name == "embed_tokens":
            self.hidden[who] = [module(batch.tokens).to(self.storage.dtype) for batch in self.batches]
        elif name == "norm":
            states = zip(self.hidden[who], self.batches, strict=True)
            self.hidden[who] = [module(x[batch.labels != IGNORE]) for x, batch in states]
        if name == "lm_head" or (name == "embed_tokens" and self.config.tied_embeddings):
            self.heads[who] = plain_weight(module)

    def _logits(self, who: str, batch: int, start: int) -> Tensor:
        rows = self.hidden[who][batch][start : start + _LOGIT_ROWS]
        return multiply(rows.to(product_dtype(rows)), self.heads[who]).float()


class _Rounded(nn.Module):
    """A linear layer whose weight is stored in fewer bits than it is used in."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def _set_weight(part: nn.Module, spec: TensorSpec, weight: Tensor | NF4Tensor, dtype: torch.dtype) -> None:
    """Give a layer of `part` what was stored of it, to be computed with in `dtype`."""
    if isinstance(weight, NF4Tensor):
        part.set_submodule(spec.module, NF4Linear(weight))
    elif spec.is_projection:
        part.set_submodule(spec.module, _Rounded(weight))
    else:  # a norm; of embedding and head there is no copy
        kept = weight.to(dtype) if weight.dim() == 1 else weight
        part.get_submodule(spec.module).register_parameter("weight", nn.Parameter(kept, requires_grad=False))


def _part_of(spec: TensorSpec) -> str:
    """The block that the weight lies in, or its own module: what hidden states go through in one step."""
    return ".".join(spec.module.split(".")[:2]) if spec.module.startswith("layers.") else spec.module


def _stored(weight: Tensor | NF4Tensor) -> list[Tensor]:
    """The tensors that a file has of it."""
    return nf4_tensors(weight) if isinstance(weight, NF4Tensor) else [weight]
