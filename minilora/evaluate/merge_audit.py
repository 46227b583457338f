"""Merging with an audit, block by block: one pass over the base makes the merged files and says what they lost.

Held-out text goes through the blocks in step: through the base's, through those with their adapters, as they were
trained, and through each way of merging them (`checkpoint/merge.py`). So a block is read once, and no model is ever
whole in memory: a 7B is merged and measured within 2.5 GB. The measure: KL(merged, trained) against KL(base, trained).
Above a tenth of it, or of an adapter that changes nothing above what rounding to bfloat16 costs, the merge has lost too
much, and nothing is left on the disk unless that is forced.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, get_args
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from minilora.backend import product_dtype
from minilora.base import Base
from minilora.checkpoint.adapter_parts import Adapter
from minilora.checkpoint.card import license_of, write_card
from minilora.checkpoint.chat_template import write_tokenizer
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.load import Progress, Storage, fill, set_layer, skeleton, unheard
from minilora.checkpoint.merge import merged_weight, plain_weight, refuse_prefix, requantized_weight
from minilora.checkpoint.names import TensorSpec
from minilora.checkpoint.nf4_file import nf4_tensors
from minilora.checkpoint.open import open_checkpoint
from minilora.checkpoint.save import plan_hf, write_plan
from minilora.checkpoint.write import check_target
from minilora.config import Route, TooLong
from minilora.data.encode import Sample, encode_records
from minilora.data.pack import batches
from minilora.data.records import read_records
from minilora.errors import UserError
from minilora.evaluate.distance import Distance, first_tokens
from minilora.linear import NF4Linear, multiply
from minilora.lora import adapters_off
from minilora.loss import IGNORE
from minilora.memory import as_text
from minilora.model import Block, Context
from minilora.nf4 import NF4Tensor
from minilora.norm import RMSNorm

LARGEST_SHARE = 0.1
# Nats a token that storing in bfloat16 may cost: KL ~ error^2 / 2, where logits are off by 2^-5, a step of it at 8.
ROUNDING = 2.0**-11
MERGED = torch.bfloat16  # what merged weights are stored in
_BASE, _ADAPTED = "(base)", "(adapted)"  # no routes
_LOGIT_ROWS = 256  # compared at a time: 34 MB of float32 logits a model, where V = 32768


@dataclass(frozen=True)
class MergeAudit:
    """Distances to the trained model, on held-out text: of each way of merging, and of the base, which has learnt
    nothing; and the bytes that the weights of each way take."""

    COLUMNS = ("merged onto", "mean KL", "max KL", "top-1", "logits", "weights", "audit")

    routes: dict[Route, Distance]
    base: Distance
    n_bytes: dict[Route, int]

    def passed(self, route: Route) -> bool:
        return self.routes[route].mean_kl <= (LARGEST_SHARE * self.base.mean_kl or ROUNDING)

    def text(self, route: Route) -> str:
        m, b = self.routes[route], self.base
        return (
            f"merged against trained, on {m.n_tokens} held-out tokens: largest logit difference "
            f"{m.max_logit_difference:.3g}, KL {m.mean_kl:.3g} nats a token, {m.max_kl:.3g} at most "
            f"(base against trained: {b.mean_kl:.3g}), top-1 agreement {m.top1_agreement:.2%}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """For a table under COLUMNS: a line for each way, and one for the base. KL in nats a token; the share of tokens
        with the same likeliest next; the largest difference of logits."""

        def figures(d: Distance) -> tuple[str, ...]:
            return f"{d.mean_kl:.3g}", f"{d.max_kl:.3g}", f"{d.top1_agreement:.2%}", f"{d.max_logit_difference:.3g}"

        merged = (
            (who, *figures(d), as_text(self.n_bytes[who]), "passed" if self.passed(who) else "failed")
            for who, d in self.routes.items()
        )
        return [*merged, (_BASE, *figures(self.base), "", "")]

    def to_dict(self, route: Route) -> dict[str, Any]:
        merged = asdict(self.routes[route]) | {"bytes": self.n_bytes[route]}
        return {"route": route, "merged": merged, "base": asdict(self.base)}


def held_out(
    base: Base, adapter: Adapter, text: str | None, max_seq_len: int, too_long: TooLong, n_tokens: int
) -> list[Sample]:
    """The first samples of the file `text` that have n_tokens targets; None: of the validation of the adapter's run."""
    if not (text := text or adapter.provenance.get("validation_path")):
        raise UserError(f"{base.adapter}: names no validation file; give held-out text with --text")
    return first_tokens(encode_records(read_records(text), base.tokenizer, max_seq_len, too_long), n_tokens)


@torch.no_grad()
def audit_routes(
    base: Base, adapter: Adapter, samples: Sequence[Sample], max_seq_len: int, progress: Progress = unheard
) -> MergeAudit:
    """What each way of merging that this base allows would lose; nothing is written."""
    run = _Pass(base, adapter, samples, max_seq_len, _possible(base), progress)
    for _ in run.weights():
        pass
    return run.audit()


@torch.no_grad()
def merge_with_audit(
    base: Base,
    adapter: Adapter,
    out: Path,
    samples: Sequence[Sample],
    max_seq_len: int,
    *,
    route: Route = "trained",
    overwrite: bool = False,
    force: bool = False,
    progress: Progress = unheard,
) -> MergeAudit:
    """Write base plus adapter to `out`, in Hugging Face's layout, with a card, if the audit on `samples` passes.

    base: where and how it lies (it is not loaded); route: see `checkpoint/merge.py`; force: write it in any case

    Raises UserError, and leaves nothing behind, if it does not.
    """
    if route not in _possible(base):
        why = "in NF4 here; name the one that this was made from" if base.checkpoint.nf4 else "what was trained beside"
        raise UserError(f"{base.checkpoint.folder}: the original base is {why}; merge onto trained")
    check_target(out, overwrite, [base.checkpoint.folder, *([base.adapter] if base.adapter else [])])
    run, audits = _Pass(base, adapter, samples, max_seq_len, (route,), progress), list[MergeAudit]()
    dtypes = {spec.name: MERGED for spec in base.checkpoint.tensors()}
    double_quant = base.double_quant if route == "requantized" else None
    plan = plan_hf(base.checkpoint.config, dtypes, double_quant=double_quant)

    def finish(folder: Path) -> None:
        audits.append(audit := run.audit())
        if not (force or audit.passed(route)):
            lost = f"the merge lost too much (--force overrides this): {audit.text(route)}"
            raise UserError(f"{out}: not written, {lost}")
        run.reopen(folder)
        _describe(folder, out.name, route, base, adapter, audit)

    parts = ((name, stored[route]) for name, stored in run.weights())
    write_plan(plan, out, parts, overwrite=overwrite, finish=finish)
    return audits[0]


def _possible(base: Base) -> tuple[Route, ...]:
    """Those that differ: without NF4 the original is what was trained beside, and NF4 files do not hold it."""
    return get_args(Route) if base.quantize and not base.checkpoint.nf4 else ("trained", "requantized")


class _Pass:
    """One pass over the base, a block at a time, in which every way of merging goes along.

    hidden: the hidden states of each batch, by whose they are: `_BASE`, `_ADAPTED` (the trained model) or a route (the
        one that was merged so)
    """

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        samples: Sequence[Sample],
        max_seq_len: int,
        routes: Sequence[Route],
        progress: Progress,
    ) -> None:
        refuse_prefix(adapter.config)
        base.checkpoint.check_tied_head()
        self.base, self.adapter, self.routes, self.progress = base, adapter, routes, progress
        self.config = config = base.checkpoint.config
        self.skeleton = skeleton(config)
        self.storage = Storage(base.quantize is not None, base.double_quant, base.dtype, base.device)
        self.batches = list(batches(samples, max_seq_len, 1, base.device))
        self.contexts = [Context(config, b.positions, b.segments, None, base.dtype, runs=b.runs) for b in self.batches]
        self.hidden: dict[str, list[Tensor]] = {}
        self.heads: dict[str, Tensor] = {}
        self.n_bytes: dict[Route, int] = dict.fromkeys(routes, 0)
        self.sums: dict[str, list[int]] = {}

    def weights(self) -> Iterator[tuple[str, dict[Route, list[Tensor]]]]:
        """Each weight's name, and what of it is stored by each route."""
        done = 0
        for part, specs in groupby(self.base.checkpoint.tensors(), key=_part_of):
            for spec, made in self._part(part, list(specs)).items():
                stored = {route: _stored(weight) for route, weight in made.items()}
                for route, tensors in stored.items():
                    self.n_bytes[route] += sum(tensor.nbytes for tensor in tensors)
                    self.sums[spec.name] = [_checksum(tensor) for tensor in tensors]
                yield spec.name, stored
                done += prod(spec.shape)
                self.progress(done, self.config.n_parameters)
        self.base.checkpoint.check_unchanged()

    def may_stop(self) -> None:
        """Let `progress` stop the work, all weights done."""
        self.progress(self.config.n_parameters, self.config.n_parameters)

    def audit(self) -> MergeAudit:
        """Once all weights have gone by: the distances from the base and the merged models to the trained one."""
        totals = dict[str, Distance]()
        for batch in range(len(self.batches)):
            for start in range(0, len(self.hidden[_ADAPTED][batch]), _LOGIT_ROWS):
                self.may_stop()
                trained = self._logits(_ADAPTED, batch, start)
                for who in (_BASE, *self.routes):
                    found = Distance.of(self._logits(who, batch, start), trained)
                    totals[who] = totals[who] + found if who in totals else found
        return MergeAudit({route: totals[route] for route in self.routes}, totals[_BASE], self.n_bytes)

    def reopen(self, folder: Path) -> None:
        """Read back what was written, by one route. Raises UserError if it is not what was meant to be."""
        written = open_checkpoint(folder)
        for spec in written.tensors():
            self.may_stop()
            weight = written.nf4[spec.name].read() if spec.name in written.nf4 else written.read(spec)
            if [_checksum(tensor) for tensor in _stored(weight)] != self.sums[spec.name]:
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
        module = part.get_submodule(name)
        if isinstance(module, Block):
            self._go(_ADAPTED, module)
            with adapters_off(part):
                self._go(_BASE, module)
            for route in self.routes:
                for spec in specs:
                    _set_weight(plain, spec, made[spec][route], self.storage.dtype)
                self._go(route, plain.get_submodule(name))
        else:
            self._go_outside(name, _ADAPTED, plain_weight(module))
            with adapters_off(part):
                self._go_outside(name, _BASE, plain_weight(module))
            for route, weight in made[specs[0]].items():
                assert isinstance(weight, Tensor)
                self._go_outside(name, route, weight)
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

    def _go(self, who: str, block: nn.Module) -> None:
        pairs = zip(self.hidden[who], self.contexts, strict=True)
        self.hidden[who] = [block(x, context) for x, context in pairs]

    def _go_outside(self, name: str, who: str, weight: Tensor) -> None:
        """Through what is no block: embedding, norm or head, which has this weight."""
        if name == "embed_tokens":
            self.hidden[who] = [embedding(batch.tokens, weight).to(self.storage.dtype) for batch in self.batches]
        elif name == "norm":
            norm = RMSNorm(self.config.dim, self.config.norm_eps)
            norm.weight = nn.Parameter(weight.to(self.storage.dtype))
            pairs = zip(self.hidden[who], self.batches, strict=True)
            self.hidden[who] = [norm(x[batch.labels != IGNORE]) for x, batch in pairs]
        if name == "lm_head" or (name == "embed_tokens" and self.config.tied_embeddings):
            self.heads[who] = weight

    def _logits(self, who: str, batch: int, start: int) -> Tensor:
        rows = self.hidden[who][batch][start : start + _LOGIT_ROWS]
        return multiply(rows.to(product_dtype(rows)), self.heads[who]).float()


class _Rounded(nn.Module):
    """A linear layer whose weight is stored in fewer bits than it is used in."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x))
        return multiply(rows, self.weight).to(x.dtype).view(*x.shape[:-1], -1)


def _set_weight(part: nn.Module, spec: TensorSpec, weight: Tensor | NF4Tensor, dtype: torch.dtype) -> None:
    """Give a layer of `part` what was stored of it, to be computed with in `dtype`."""
    if isinstance(weight, NF4Tensor):
        set_layer(part, spec, NF4Linear(weight))
    elif spec.is_projection:
        set_layer(part, spec, _Rounded(weight))
    else:
        part.get_submodule(spec.module).register_parameter("weight", nn.Parameter(weight.to(dtype)))


def _part_of(spec: TensorSpec) -> str:
    """The block that the weight lies in, or its own module: what hidden states go through in one step."""
    return ".".join(spec.module.split(".")[:2]) if spec.module.startswith("layers.") else spec.module


def _stored(weight: Tensor | NF4Tensor) -> list[Tensor]:
    """The tensors that a file has of it."""
    return nf4_tensors(weight) if isinstance(weight, NF4Tensor) else [weight]


def _checksum(tensor: Tensor) -> int:
    return crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _describe(folder: Path, name: str, route: Route, base: Base, adapter: Adapter, audit: MergeAudit) -> None:
    """Put beside the merged weights the tokenizer, the card, and where it all comes from."""
    kind = "bnb-4bit" if route == "requantized" else "hf"
    made = {"to": kind, "from": base.checkpoint.name, "adapter": Path(base.adapter or "").name, "onto": route}
    facts = {"license": license_of(base.checkpoint.folder), **adapter.provenance}
    facts |= {"export": made, "audit": audit.to_dict(route)}
    write_card(folder, name, kind, base.checkpoint.config, facts, base.tokenizer.template, [])
    write_tokenizer(base.tokenizer, folder)
