"""Whether runs may be ranked: their validations must be one, and looked at in one way, through one tokenizer; and
whether a run is still what it was: made of these files.
"""

from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any

from minilora.base import tokenizer_for
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import tokenizer_of
from minilora.config import BaseConfig, RunConfig
from minilora.data.sources import fingerprints
from minilora.errors import UsageError, UserError
from minilora.evaluate.metrics import figure_names

MEASURED_BY = (
    "data.validation", "data.validation_share", "data.general", "data.max_seq_len", "data.too_long",
    "eval.answers", "eval.max_new_tokens", "eval.metrics",
)  # fmt: skip
DRAWN_BY = ("data.train", "data.test_share", "data.split_seed")  # if data.validation_share says so
_BASE = attrgetter("model.path", "model.tokenizer", "model.old_hf_spaces")


def refuse_unranked(runs: Mapping[str, RunConfig], rank_by: str) -> None:
    """Raise UserError if there is nothing to rank these runs by, or not the same in all.

    rank_by: "loss", "perplexity" or a figure of eval.metrics
    """
    config = next(iter(runs.values()))
    if not config.data.validation and not config.data.validation_share:
        raise UserError("runs are ranked on validation; there is none: name data.validation or data.validation_share")
    measured = ["loss", "perplexity", *(figure_names(config.eval.metrics) if config.eval.answers else ())]
    if rank_by not in measured:
        raise UsageError(f"--rank_by {rank_by}: is not measured; there are {', '.join(measured)}; see eval.metrics")
    refuse_unlike(runs)


def refuse_unlike(runs: Mapping[str, RunConfig]) -> None:
    """Raise UserError for the first run that is measured otherwise than one before it. Bases may differ, if their
    tokenizer does not; what a base that cannot be opened has is left out, since its run will fail."""
    tokenizers = {base: _tokenizer(config.model) for base, config in {_BASE(c): c for c in runs.values()}.items()}
    seen = dict[str, Any]()
    for name, config in runs.items():
        keys = (*MEASURED_BY, *(DRAWN_BY if config.data.validation_share else ()))
        measured = {key: attrgetter(key)(config) for key in keys} | {"model.tokenizer": tokenizers[_BASE(config)]}
        for key, value in measured.items():
            if value in ({}, "fail"):  # "fail" of data.too_long: then none is, or the run fails
                continue
            if seen.setdefault(key, value) != value:
                unlike = f"{name} has another {key} than the runs before it, and they are measured by it"
                raise UserError(f"{unlike}, so they cannot be ranked; give all the same --{key}")


def made_of(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run of these files says in its minilora.json that it is made of."""
    return {
        "data": fingerprints(config),
        "base_fingerprint": checkpoint.fingerprint(),
        "tokenizer": _tokenizer(config.model),
    }


def _tokenizer(config: BaseConfig) -> dict[str, Any]:
    """What a run says of its tokenizer; nothing, if there is none to read."""
    with suppress(UserError):
        return tokenizer_of(tokenizer_for(config, open_checkpoint(config.path)))
    return {}
