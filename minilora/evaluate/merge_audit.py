"""Merging with an audit: one pass over the base (`merge_pass.py`) makes the merged files and says what they lost.

The measure: KL(merged, trained) against KL(base, trained), on held-out text. Above a tenth of it, or of an adapter that
changes nothing above what rounding to bfloat16 costs, the merge has lost too much, and nothing is left on the disk
unless that is forced.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from minilora.base import Base
from minilora.checkpoint.adapter_parts import Adapter
from minilora.checkpoint.card import license_of, write_card
from minilora.checkpoint.chat_template import template_warnings, write_tokenizer
from minilora.checkpoint.config_files import read_eos
from minilora.checkpoint.load import Progress, unheard
from minilora.checkpoint.provenance import template_of, tokenizer_of
from minilora.checkpoint.save import plan_hf, write_plan
from minilora.checkpoint.write import check_target
from minilora.config import Route, TooLong
from minilora.data.encode import Sample, read_samples
from minilora.errors import UserError
from minilora.evaluate.distance import Distance, first_tokens
from minilora.evaluate.merge_pass import BASE, MERGED, MergePass
from minilora.memory import as_text

LARGEST_SHARE = 0.1
# Nats a token that storing in bfloat16 may cost: KL ~ error^2 / 2, where logits are off by 2^-5, a step of it at 8.
ROUNDING = 2.0**-11


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
        """Rows of a table under COLUMNS, one for each way and one for the base: KL in nats a token; the share of
        tokens with the same likeliest next; the largest difference of logits."""

        def figures(d: Distance) -> tuple[str, ...]:
            return f"{d.mean_kl:.3g}", f"{d.max_kl:.3g}", f"{d.top1_agreement:.2%}", f"{d.max_logit_difference:.3g}"

        merged = (
            (who, *figures(d), as_text(self.n_bytes[who]), "passed" if self.passed(who) else "failed")
            for who, d in self.routes.items()
        )
        return [*merged, (BASE, *figures(self.base), "", "")]

    def to_dict(self, route: Route) -> dict[str, Any]:
        merged = asdict(self.routes[route]) | {"bytes": self.n_bytes[route]}
        return {"route": route, "merged": merged, "base": asdict(self.base)}


def held_out(
    base: Base, adapter: Adapter, text: str | None, max_seq_len: int, too_long: TooLong, n_tokens: int
) -> list[Sample]:
    """The first samples of the file `text` that have n_tokens targets; None: of the validation of the adapter's run."""
    if not (text := text or adapter.provenance.get("validation_path")):
        raise UserError(f"{base.adapter}: names no validation file; give held-out text with --text")
    return first_tokens(read_samples(text, base.tokenizer, max_seq_len, too_long), n_tokens)


@torch.no_grad()
def audit_routes(
    base: Base, adapter: Adapter, samples: Sequence[Sample], max_seq_len: int, progress: Progress = unheard
) -> MergeAudit:
    """What each way of merging that this base allows would lose; nothing is written."""
    run = MergePass(base, adapter, samples, max_seq_len, _possible(base), progress)
    for _ in run.weights():
        pass
    return MergeAudit(*run.distances(), run.n_bytes)


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
    run, audits = MergePass(base, adapter, samples, max_seq_len, (route,), progress), list[MergeAudit]()
    dtypes = {spec.name: MERGED for spec in base.checkpoint.tensors()}
    double_quant = base.double_quant if route == "requantized" else None
    # What learnt our template ends with </s>.
    eos = 2 if template_of(adapter.provenance) else read_eos(base.checkpoint.folder, base.checkpoint.config)
    plan = plan_hf(base.checkpoint.config, dtypes, double_quant, eos=eos)

    def finish(folder: Path) -> None:
        audits.append(audit := MergeAudit(*run.distances(), run.n_bytes))
        if not (force or audit.passed(route)):
            lost = f"the merge lost too much (--force overrides this): {audit.text(route)}"
            raise UserError(f"{out}: not written, {lost}")
        run.reopen(folder)
        _describe(folder, out.name, route, base, adapter, audit)

    parts = ((name, stored[route]) for name, stored in run.weights())
    write_plan(plan, out, parts, overwrite=overwrite, finish=finish)
    return audits[0]


def _possible(base: Base) -> tuple[Route, ...]:
    """The ways that differ: without NF4 the original is what was trained beside, and NF4 files do not hold it."""
    return get_args(Route) if base.quantize and not base.checkpoint.nf4 else ("trained", "requantized")


def _describe(folder: Path, name: str, route: Route, base: Base, adapter: Adapter, audit: MergeAudit) -> None:
    """Put beside the merged weights the tokenizer, the card, and where it all comes from."""
    kind = "bnb-4bit" if route == "requantized" else "hf"
    export = {"to": kind, "from": base.checkpoint.name, "adapter": Path(base.adapter or "").name, "onto": route}
    facts = {"license": license_of(base.checkpoint.folder), **adapter.provenance}
    facts |= {"tokenizer": tokenizer_of(base.tokenizer), "export": export, "audit": audit.to_dict(route)}
    template = base.tokenizer.template
    notes = [f"{text}." for text in template_warnings(base.checkpoint.folder, template, adapter.provenance)]
    write_card(folder, name, kind, base.checkpoint.config, facts, template, notes)
    write_tokenizer(base.tokenizer, folder)
