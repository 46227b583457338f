"""Merging with an audit: the merged files are read back and compared with the model that was trained, then they stay.

A merge may round away what was learnt. The measure: KL(merged, trained) against KL(base, trained), both on held-out
text. Above a tenth of it, the merge has lost too much, and nothing is left on the disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minilora.checkpoint.load import load_model
from minilora.checkpoint.merge import merged_weights
from minilora.checkpoint.save import save_hf
from minilora.checkpoint.write import atomic_folder
from minilora.data.encode import Sample
from minilora.errors import UserError
from minilora.evaluate.distance import Distance, base_predictor, distance, predictor
from minilora.model import Mistral

LARGEST_SHARE = 0.1


@dataclass(frozen=True)
class MergeAudit:
    """Distances to the trained model: of the merged one, and of the base, which has learnt nothing."""

    merged: Distance
    base: Distance

    @property
    def passed(self) -> bool:
        return self.merged.mean_kl <= LARGEST_SHARE * self.base.mean_kl

    def text(self) -> str:
        m, b = self.merged, self.base
        return (
            f"merged against trained, on {m.n_tokens} held-out tokens: largest logit difference "
            f"{m.max_logit_difference:.3g}, KL {m.mean_kl:.3g} nats a token (base against trained: {b.mean_kl:.3g}), "
            f"top-1 agreement {m.top1_agreement:.2%}"
        )


def merge_with_audit(
    model: Mistral,
    out: Path,
    samples: Sequence[Sample],
    max_seq_len: int,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> MergeAudit:
    """Write base plus adapter in bf16 to `out` in Hugging Face's layout, if the audit on `samples` passes.

    Raises UserError, and leaves nothing behind, if it does not.
    """
    trained = predictor(model)
    with atomic_folder(out, overwrite=overwrite) as folder:
        save_hf(model, folder, weights=merged_weights(model), tokenizer=tokenizer)
        # On the CPU, since a GPU that holds the trained model may have no space for a second one.
        merged = load_model(folder, dtype=model.embed_tokens.weight.dtype, device="cpu")
        audit = MergeAudit(
            merged=distance(predictor(merged), trained, samples, max_seq_len),
            base=distance(base_predictor(model), trained, samples, max_seq_len),
        )
        if not audit.passed:
            raise UserError(f"{out}: not written, the merge lost too much: {audit.text()}")
    return audit
