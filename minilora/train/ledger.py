"""Does the run fit? What it will need, by owner, before a weight is loaded, and which settings would make it fit.

Where all activations do not, the fast blocks keep less, one by one, and backward makes it again: as few as must.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import nlargest
from math import ceil, isqrt
from typing import Any

import torch

from minilora.adamw import state_bytes
from minilora.attention import has_flash_attention
from minilora.backend import pick_dtype
from minilora.config import ModelConfig, PrefixConfig, RunConfig
from minilora.data.check import Data
from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, RowSampler, make_batch
from minilora.errors import UserError
from minilora.evaluate.answers import has_prompt
from minilora.evaluate.measure import longest_prompt
from minilora.fused import Keep
from minilora.memory import as_text, free_bytes, private_bytes
from minilora.memory_of_step import StepPlan
from minilora.nf4 import CPU
from minilora.train.graph import space_for
from minilora.train.strategies import learned_names
from minilora.visible import Pieces, Runs

LEAST_LENGTH = 64  # shorter rows are not advised
SPARE = 0.05  # of a GPU's free memory: what its allocator rounds up and libraries take is in no prediction


def predict_on_gpu(config: RunConfig, sizes: ModelConfig) -> dict[str, int]:
    """Bytes by owner on a GPU that need not be here, before there are data: full rows, every token a target.

    `model.dtype` must be named: a card that has bfloat16 has FlashAttention, too.
    """
    shape = (config.train.batch_size, config.data.max_seq_len)
    zeros, positions = torch.zeros(shape, dtype=torch.int64), torch.arange(shape[1]).expand(shape)
    full = PackedBatch(zeros, zeros, positions, zeros.int(), Runs.of_rows(*shape))
    flash = config.model.dtype == "bfloat16"
    return Ledger(config, sizes, torch.device("cuda"), full, shape[1], flash=flash).predict()


def ledger_of(
    config: RunConfig, sizes: ModelConfig, device: torch.device, data: Data, probes: list[Sample], sampler: RowSampler
) -> "Ledger":
    """The ledger of a run on these data, which also answers the probes."""
    first = make_batch(data.learnt, sampler.rows[: config.train.batch_size], config.data.max_seq_len)
    lengths = (chat.length for samples in data.samples.values() for chat in samples if has_prompt(chat))
    prompts = [longest_prompt(data.samples[part], config.eval) for part in ("validation", "test")]
    prompts += [len(probe.tokens) for probe in probes]
    runs = sum(nlargest(len(first.tokens), (len(row) + 1 for row in sampler.rows)))  # and what is left of each row
    n_general = sum(sample.n_targets for sample in data.samples["general"])
    longest, most = max(lengths, default=0), max(prompts)
    return Ledger(config, sizes, device, first, longest, prompt=most, general=n_general, runs=runs)


@dataclass(frozen=True)
class Ledger:
    """The memory of a run, before it.

    first: its first micro-batch, which the others are like
    longest: positions of the longest conversation, which a row must have; raw text is cut
    keep: what each fast block keeps for backward; none: as `train.activation_checkpointing` says
    flash: whether attention goes over runs by FlashAttention; None: if the device has it
    prompt: tokens of the longest prompt that is answered; 0: none is
    general: target tokens of the general text; None: as many as are looked at
    runs: of a micro-batch like the first, the most; 0: as many as that has
    """

    config: RunConfig
    sizes: ModelConfig
    device: torch.device
    first: PackedBatch
    longest: int
    keep: tuple[Keep, ...] = ()
    flash: bool | None = None
    prompt: int = 0
    general: int | None = None
    runs: int = 0

    def predict(self) -> dict[str, int]:
        """Bytes by owner when they are most; on a CPU with what the process holds already."""
        plan, limits = self._plan(), self.config.eval
        scored = replace(plan, rows=limits.batch_size, targets=None)
        in_between = [scored.forward_bytes()] if self._scores() else []
        if self.prompt:
            in_between.append(replace(scored, length=self.prompt).forward_bytes(limits.max_new_tokens))
        on_cpu = self.device.type == "cpu"
        held = {"process": private_bytes()} if on_cpu else {}
        if on_cpu and (of_base := self._base_predictions_bytes()):
            held["base's predictions"] = of_base
        return held | plan.predict(in_between)

    def _base_predictions_bytes(self) -> int:
        """Bytes of what the base says of the general text, which lies in the host's memory."""
        most = self.config.eval.general_tokens
        n_tokens = most if self.general is None else min(most, self.general)
        return 4 * self.sizes.vocab_size * n_tokens if self.config.data.general else 0

    def _plan(self) -> StepPlan:
        model, train, length, first = self.config.model, self.config.train, self.config.data.max_seq_len, self.first
        base_learns, is_prefix, on_cpu = train.base_learns, train.strategy == "prefix", self.device.type == "cpu"
        dtype = torch.float32 if base_learns else pick_dtype(self.device, model.dtype)[0]
        flash = has_flash_attention(self.device, dtype, self.sizes.head_dim) if self.flash is None else self.flash
        in_runs = (on_cpu or flash) and not is_prefix
        in_pieces = [Pieces.of(first.runs.lengths, w) for w in set(self.sizes.windows)] if on_cpu and in_runs else []
        double_quant = model.double_quant if self.config.quantize else None
        added = None if base_learns else PrefixConfig(train.prefix_tokens) if is_prefix else self.config.lora
        runs = ceil((self.runs or len(first.runs.stops) - 1) * train.batch_size * length / first.tokens.numel())
        plan = StepPlan(
            self.sizes, dtype, double_quant, added, train.batch_size, length, keep=self.keep,
            learned=learned_names(self.sizes, train) if base_learns else None,
            targets=round(train.batch_size * length * first.n_targets / first.tokens.numel()),
            sees="runs" if in_runs else "mask", masks=sum(pieces.mask_bytes for pieces in in_pieces),
            checkpointing=train.activation_checkpointing, device=self.device,
            optimizer=train.optimizer, paged=train.paged and not on_cpu, ahead=train.decode_ahead, runs=runs,
        )  # fmt: skip
        recorded = plan.fused and not self.config.lora.modules_to_save and not train.neftune_alpha
        return replace(plan, runs=space_for(runs + 1) - 1) if recorded else plan

    @property
    def decodes_ahead(self) -> bool:
        """Whether there is something to decode while something is multiplied, and `train.decode_ahead` says so."""
        return self._plan().decodes_ahead

    def _scores(self) -> bool:
        data = self.config.data
        return any((data.validation, data.test, data.general, data.validation_share, data.test_share))

    def fitted(self) -> "Ledger":
        """With as little made again in backward as fits, or all of it if nothing does."""
        if self.config.train.activation_checkpointing or not self._plan().fused:
            return self
        free, n = free_bytes(self.device) * (1.0 if self.device.type == "cpu" else 1 - SPARE), self.sizes.n_layers
        ample = replace(self, keep=(Keep.WEIGHTS,) * n)
        if self.config.quantize and 2 * ample._total() <= free:  # who trains a 7B on a PC wants to use the PC, too
            return ample
        fits = bisect_left(range(Keep.ALL * n), True, key=lambda n_steps: self._keeping(n_steps)._total() <= free)
        return self._keeping(fits)

    def _keeping(self, n_steps: int) -> "Ledger":
        """So many steps of `Keep` below everything, the lowest blocks all of theirs first."""
        below = (min(max(n_steps - Keep.ALL * i, 0), Keep.ALL) for i in range(self.sizes.n_layers))
        return replace(self, keep=tuple(Keep(Keep.ALL - n) for n in below))

    def kept(self) -> str:
        """What the fast blocks keep, in words; nothing where they keep everything."""
        counts = [(self.keep.count(keep), keep) for keep in Keep if self.keep.count(keep)]
        if not counts or counts == [(len(self.keep), Keep.ALL)]:
            return ""
        return "kept for backward: " + ", ".join(f"{keep.name.lower()} of {n} blocks" for n, keep in counts)

    def check(self) -> dict[str, int]:
        """The prediction. Raises UserError if it does not fit, with the mildest form of each setting that is enough."""
        predicted, free = self.predict(), free_bytes(self.device)
        if self.device.type != "cpu":
            self._check_host(predicted.get("gradients", 0) // 4)
        if sum(predicted.values()) <= free:
            return predicted
        enough, strongest, together = dict[str, str](), dict[str, str](), self
        for key, value, changes in self._smaller():
            total = self._with(changes)._total()
            if total <= free:
                enough.setdefault(key, f"{key} {value} ({as_text(total)})")
            strongest[key], together = f"{key} {value}", together._with(changes)
        advice = f"it fits with {', or with '.join(enough.values())}"
        if not enough:
            too_much = "" if together._total() <= free else ", too much still: take a smaller model"
            advice = f"even {', '.join(strongest.values()) or 'this'} comes to {as_text(together._total())}{too_much}"
        raise UserError(f"the run needs {as_text(self._total())} of memory, {as_text(free)} are free: {advice}")

    def _check_host(self, n_learned: int) -> None:
        """Raise UserError if what a run on a GPU keeps in the host's memory does not fit there."""
        of_state = state_bytes(self.config.train.optimizer, n_learned, pinned=True) if self._plan().paged else 0
        needs = {
            "train.paged": (of_state, "let fewer weights learn, or set train.optimizer adamw_8bit if it is not"),
            "eval.general_tokens": (self._base_predictions_bytes(), "set a smaller one"),
        }
        free, most = max(0, free_bytes(CPU) - private_bytes()), max(needs, key=lambda key: needs[key][0])
        if (total := sum(n for n, _ in needs.values())) > free:
            keys = " and ".join(key for key, (n, _) in needs.items() if n)
            needed = f"for {keys} {as_text(total)} of the host's memory are needed, {as_text(free)} are free"
            raise UserError(f"{needed}: {needs[most][1]}")

    def _smaller(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Settings that need less memory, the mildest form of each first: key, value, what changes in its sections."""
        train, on_cpu = self.config.train, self.device.type == "cpu"
        if not train.activation_checkpointing and not self._plan().fused:
            yield "train.activation_checkpointing", "true", {"train": {"activation_checkpointing": True}}
        if self.device.type == "cuda" and not train.paged:
            yield "train.paged", "true", {"train": {"paged": True}}
        if self.decodes_ahead:
            yield "train.decode_ahead", "false", {"train": {"decode_ahead": False}}
        if train.optimizer == "adamw":
            yield "train.optimizer", "adamw_8bit", {"train": {"optimizer": "adamw_8bit"}}
        small = [n for n in range(1, isqrt(train.batch_size) + 1) if train.batch_size % n == 0]
        for n in sorted({*small, *(train.batch_size // n for n in small)} - {train.batch_size}, reverse=True):
            accumulate = train.accumulate * train.batch_size // n
            changes = {"train": {"batch_size": n, "accumulate": accumulate}}
            yield "train.batch_size", f"{n} and train.accumulate {accumulate}", changes
        halved = ["eval.batch_size"] * (self._scores() or self.prompt > 0) + ["data.max_seq_len"]
        halved += ["eval.general_tokens"] * (on_cpu and bool(self.config.data.general))
        halved += ["train.prefix_tokens" if train.strategy == "prefix" else "lora.rank"] * (not train.base_learns)
        for section, key in (name.split(".") for name in halved):
            n, least = getattr(getattr(self.config, section), key), {"max_seq_len": max(self.longest, LEAST_LENGTH)}
            while (n := n // 2) >= least.get(key, 1):
                yield f"{section}.{key}", str(n), {section: {key: n}}
        for n in range((train.layers or 1) - 1, max(train.reinit_top or 0, 1) - 1, -1):
            yield "train.layers", str(n), {"train": {"layers": n}}
        if not train.base_learns and pick_dtype(self.device, self.config.model.dtype)[0] == torch.float32:
            yield "model.dtype", "bfloat16", {"model": {"dtype": "bfloat16"}}
        if train.strategy == "prefix" and not self.config.quantize:
            yield "model.quantize", "nf4", {"model": {"quantize": "nf4"}}
        elif not self.config.quantize:
            weights = {"strategy": "qlora", "layers": None, "parameters": (), "reinit": "none"}
            yield "train.strategy", "qlora", {"model": {"quantize": "auto"}, "train": weights}

    def _with(self, changes: dict[str, Any]) -> "Ledger":
        new = {section: replace(getattr(self.config, section), **values) for section, values in changes.items()}
        return replace(self, config=replace(self.config, **new), keep=()).fitted()

    def _total(self) -> int:
        return sum(self.predict().values())
