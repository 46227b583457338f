"""From a configuration to a run that is ready to step: base, tokenizer, data, what learns, optimizer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from minilora.adamw import FlatAdamW, state_bytes
from minilora.ahead import Ahead
from minilora.backend import dtype_name, pick_device, pick_dtype, told
from minilora.base import Base, tokenizer_for
from minilora.checkpoint.chat_template import template_warnings
from minilora.checkpoint.files import sha256_of
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import read_provenance, tokenizer_of
from minilora.checkpoint.write import check_space
from minilora.compiled import compile_loops
from minilora.config import LoraConfig, RunConfig, TrainConfig, to_dict
from minilora.data.check import Data, load_data
from minilora.data.encode import Sample
from minilora.data.pack import RowSampler
from minilora.data.records import as_jsonl
from minilora.data.sources import FILE_KEYS, fingerprints
from minilora.errors import UserError, need_library
from minilora.evaluate.answers import Answer
from minilora.evaluate.forgetting import Forgetting, read_probes
from minilora.evaluate.metrics import check_libraries
from minilora.fused import Keep
from minilora.hub import pinned
from minilora.memory import PeakMemory, as_text, free_bytes, one_line
from minilora.model import Mistral
from minilora.scratch import keep_freed_memory
from minilora.tokenizer import OLD_HF, Tokenizer
from minilora.train.graph import StepGraphs
from minilora.train.ledger import Ledger, ledger_of
from minilora.train.run_folder import RunFolder, bytes_in
from minilora.train.schedule import steps_of_run, too_short
from minilora.train.state import RunState
from minilora.train.step import Backward, LossScale, backward_of
from minilora.train.strategies import apply_strategy, trainable


class Reporter(Protocol):
    """Where a run tells how it goes; `progress.py` has the one with the bar."""

    def say(self, text: str) -> None: ...
    def begin(self, step: int, n_steps: int) -> None: ...
    def step(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None: ...
    def end(self) -> None: ...


@dataclass
class Run:
    """All that the steps of a run share."""

    config: RunConfig
    folder: RunFolder
    model: Mistral
    tokenizer: Tokenizer
    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    state: RunState
    n_steps: int
    reporter: Reporter
    memory: PeakMemory
    backward: Backward
    predicted_bytes: dict[str, int]
    forgetting: Forgetting
    held_out: str  # JSONL of the validation, if it was drawn from the training data
    before: dict[str, Any] = field(default_factory=dict)
    after: list[Answer] = field(default_factory=list)
    stopped_because: str = ""


def settled(config: RunConfig) -> tuple[RunConfig, Checkpoint]:
    """The configuration with what its base says of it, as a run writes it down, and the base, opened: to which version
    a name on the hub leads, how NF4 is stored, and of an adapter that training goes on from its [lora], tokenizer and
    template.

    Warns if that was trained on a base stored otherwise. Raises UserError if it is of another base, or no adapter, or
    [lora] says something else of it, its dropout excepted.
    """
    config = replace(config, model=replace(config.model, path=pinned(config.model.path)))
    checkpoint = open_checkpoint(config.model.path)
    if checkpoint.nf4:
        config = replace(config, model=replace(config.model, double_quant=checkpoint.double_quant))
    if config.train.adapter is not None:
        config = _begun_from(config, config.train.adapter, checkpoint)
    return config, checkpoint


def _begun_from(config: RunConfig, adapter: str, checkpoint: Checkpoint) -> RunConfig:
    """`settled`, of `train.adapter`, held against the base as this run will store it."""
    stored: Literal["nf4", "none", "auto"] = config.quantize or ("auto" if checkpoint.nf4 else "none")
    base = Base.find(replace(config.model, quantize=stored), adapter, force=None)
    assert base.adapter is not None
    if not isinstance(base.added, LoraConfig):
        raise UserError(f"train.adapter: {adapter} is a prefix, which only begins anew")
    for text in base.warnings:
        warnings.warn(text, stacklevel=2)
    lora = replace(base.added, dropout=config.lora.dropout)
    for key, value in vars(config.lora).items():
        if value not in (own := getattr(lora, key), getattr(LoraConfig(), key)):
            raise UserError(f"lora.{key} is {value!r}, but that of train.adapter, {adapter}, is {own!r}; leave it out")
    tokenizer = config.model.tokenizer or read_provenance(base.adapter).get("tokenizer_path")
    model = replace(config.model, tokenizer=tokenizer, old_hf_spaces=base.tokenizer.template == OLD_HF)
    return replace(config, model=model, lora=lora, train=replace(config.train, adapter=base.adapter))


def set_up(config: RunConfig, folder: RunFolder, reporter: Reporter) -> Run:
    """Load base, tokenizer and data, and make what learns. Data come first: their faults show before 14 GB are read."""
    checkpoint, data, probes, sampler, n_steps, ledger = _planned(config)
    config, device, read = ledger.config, ledger.device, fingerprints(config)  # now: to load the base takes minutes
    own = [] if config.train.adapter else template_warnings(checkpoint.folder, data.tokenizer.template)
    for warning in (*data.warnings(), *(f"warning: {text}" for text in own)):
        reporter.say(warning)
    dtype, why = _pick_dtype(config, checkpoint, device)
    reporter.say(told(device))
    if config.train.adapter:
        reporter.say(f"adapters begin as those of {config.train.adapter}, with its [lora]")
    reporter.say(f"dtypes: {dtypes(config, dtype)} ({why})")
    predicted = _check_fits(ledger, folder.path, n_steps)
    reporter.say(one_line(predicted))
    if kept := ledger.kept():
        reporter.say(kept)

    model = load_model(
        checkpoint.folder, quantize=config.quantize, double_quant=config.model.double_quant, dtype=dtype, device=device
    )
    forgetting = Forgetting(config, data.tokenizer, data.samples["general"], probes, model)
    torch.manual_seed(config.train.seed)
    with_holes = 1.5 * sum(predicted.values())  # so much the heap may come to
    settle_heap(config.train, ledger.keep, device.type == "cpu" and with_holes > free_bytes(device))
    apply_strategy(model, config, ledger.keep)
    weights = trainable(model)
    memory, optimizer = PeakMemory(device), optimizer_for(weights, config)
    _tell_steps(n_steps, config, model, optimizer, data, len(sampler.rows), reporter)
    ahead = Ahead(device) if ledger.decodes_ahead else None
    if config.train.decode_ahead and ahead is None:
        reporter.say("nothing is decoded ahead: that is for weights in NF4 on a GPU that does not keep them decoded")
    backward: Backward = backward_of(model, optimizer, memory.note, ahead)
    if StepGraphs.can_record(model):
        backward = StepGraphs(model, optimizer, ahead)
        reporter.say("steps are replayed as CUDA graphs")
    origin = _origin(config, model, data.tokenizer, dtype, read)
    state = RunState(weights, optimizer, sampler, LossScale.of(dtype), origin)
    return Run(
        config, folder, model, data.tokenizer, data.learnt, data.samples["validation"], data.samples["test"], state,
        n_steps, reporter, memory, backward, predicted, forgetting,
        as_jsonl(data.records["validation"]) if config.data.validation_share else "",
    )  # fmt: skip


def check_run(config: RunConfig) -> dict[str, int]:
    """All that a run does before it loads its base, and nothing else; the memory that it will need, by owner.

    Raises UserError for what it is made from, and where memory, or the space on the disk of `train.output`, is short.
    """
    *_, n_steps, ledger = _planned(config)
    return _check_fits(ledger, Path(config.train.output), n_steps)


def _planned(config: RunConfig) -> tuple[Checkpoint, Data, list[Sample], RowSampler, int, Ledger]:
    """What a run is made from: its base, opened, its data and probes, the order of the data, how many steps it has, and
    its ledger, which has the configuration, settled.

    Raises UserError for what is missing, for the first fault of the data, where the strategy cannot train the base, and
    where torch cannot compile.
    """
    check_libraries(config.eval.metrics)
    if config.train.tensorboard:
        need_library("tensorboard", "tensorboard", "train.tensorboard")
    config, checkpoint = settled(config)
    tokenizer = tokenizer_for(config.model, checkpoint)
    if not config.data.train:
        raise UserError("data.train is empty; name a file of messages or text")
    probes = read_probes(config.eval, tokenizer)
    data = load_data(config.data, tokenizer, checkpoint.config)
    data.refuse_faults()
    if config.eval.patience and not data.samples["validation"]:
        without = "none; name data.validation or data.validation_share, or leave it out"
        raise UserError(f"eval.patience waits for a better validation, and there is {without}")
    _pick_dtype(config, checkpoint, device := pick_device(config.model.device))
    compile_loops(config.train.compile and device.type == "cpu")  # what it imports is in the ledger, too
    lengths = [sample.length for sample in data.learnt]
    sampler = RowSampler(lengths, config.data.max_seq_len, config.train.seed, mix=data.mix)
    ledger = ledger_of(config, checkpoint.config, device, data, probes, sampler).fitted()
    return checkpoint, data, probes, sampler, steps_of_run(lengths, config, data.mix), ledger


def _check_fits(ledger: Ledger, folder: Path, n_steps: int) -> dict[str, int]:
    """The predicted memory. Raises UserError where that, or the space on the disk, is short.

    folder: the run's; what lies there already counts as free
    """
    predicted = ledger.check()
    check_space(folder, _saved_bytes(ledger, predicted.get("gradients", 0) // 4, n_steps) - bytes_in(folder))
    return predicted


def settle_heap(train: TrainConfig, keep: Sequence[Keep], is_tight: bool = False) -> None:
    """Have this process keep what a step frees, as far as memory allows (`keep_freed_memory`).

    keep: what each fast block keeps for backward, as in `apply_strategy`; is_tight: memory is short whatever that says
    """
    is_short = train.activation_checkpointing or min(keep, default=Keep.ALL) < Keep.ALL
    keep_freed_memory(Keep.WEIGHTS in keep and not is_tight, is_short or is_tight)


def _pick_dtype(config: RunConfig, checkpoint: Checkpoint, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. Raises UserError where the strategy cannot train in it, or on the base."""
    named = f'train.strategy "{config.train.strategy}"'
    if checkpoint.nf4 and config.quantize is None:
        checkpoint.refuse_nf4(named)
    if not config.train.base_learns:
        return pick_dtype(device, config.model.dtype)
    if config.model.dtype not in ("auto", "float32"):
        raise UserError(f"{named} trains float32 weights; model.dtype {config.model.dtype!r} is not one")
    return torch.float32, "weights of the base learn"


def _tell_steps(
    n_steps: int, config: RunConfig, model: Mistral, optimizer: FlatAdamW, data: Data, n_rows: int, reporter: Reporter
) -> None:
    """Say how many steps the run has, what they are made of, and what of the optimizer's state is paged."""
    train = config.train
    reporter.say(
        f"{train.strategy}: {sum(p.numel() for p in trainable(model).values()):,} weights learn, the base has "
        f"{model.config.n_parameters:,}; {len(data.learnt):,} samples in {n_rows:,} rows of "
        f"{config.data.max_seq_len}, {n_steps:,} steps of {train.batch_size * train.accumulate} rows"
    )
    if warning := too_short(n_steps, train):
        reporter.say(f"warning: {warning}")
    if train.paged:
        n_bytes = as_text(sum(part.nbytes for parts in optimizer.state.values() for part in parts.values()))
        where = "in the host's memory" if optimizer.paged else "is in the host's memory anyway, where there is no GPU"
        reporter.say(f"paged: {n_bytes} of the optimizer's state {where}")


def _saved_bytes(ledger: Ledger, n_learned: int, n_steps: int) -> int:
    """The most that a run has on the disk: checkpoints, one of them new; of a run with validation the best step's
    weights, now and as of the last checkpoint; and what it leaves: what was added, or where the base learns all of it.
    """
    train, data, weights = ledger.config.train, ledger.config.data, 4 * n_learned
    best = 2 * weights if data.validation or data.validation_share else 0
    checkpoint, left = weights + state_bytes(train.optimizer, n_learned), 4 * ledger.sizes.n_parameters
    n_checkpoints = min(train.keep_checkpoints + 1, ceil(n_steps / train.checkpoint_every))
    return n_checkpoints * checkpoint + best + (left if train.base_learns else weights)


def _origin(
    config: RunConfig, model: Mistral, tokenizer: Tokenizer, dtype: torch.dtype, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What a saved state belongs to: a run may go on from it where this is the same. data: their fingerprints"""
    begun = sorted(Path(config.train.adapter).glob("*.safetensors")) if config.train.adapter else []
    return {
        "config": _what_must_stay(config), "base": model.base_fingerprint,
        "tokenizer": tokenizer_of(tokenizer),
        "data": data,
        "device": model.device.type, "dtype": dtype_name(dtype),
    } | ({"adapter": [sha256_of(file) for file in begun]} if begun else {})  # fmt: skip


def dtypes(config: RunConfig, dtype: torch.dtype) -> str:
    """What is stored and computed in which dtype, so that no cast is hidden."""
    compute = dtype_name(dtype)
    storage = f"NF4{', absmax in 8 bits' if config.model.double_quant else ''}" if config.quantize else compute
    learns = "weights" if config.train.base_learns else "prefix" if config.train.strategy == "prefix" else "adapters"
    learns += ", modules_to_save" if config.lora.modules_to_save else ""
    state = "8 bits" if config.train.optimizer == "adamw_8bit" else "float32"
    return (
        f"linear layers {storage}; embeddings, head and activations {compute}; {learns} and gradients float32; "
        f"optimizer {state}; norms, softmax and loss float32"
    )


def optimizer_for(weights: dict[str, torch.nn.Parameter], config: RunConfig) -> FlatAdamW:
    """AdamW; weight decay pulls at matrices only, not at norms. With LoRA+ B and DoRA's m learn faster, as in PEFT.

    Every A comes first, so that those of one input lie one after another (projections.py).
    """
    groups = dict[tuple[float, float], list[torch.nn.Parameter]]()
    for name, p in sorted(weights.items(), key=lambda item: not item[0].endswith("lora_A")):
        decay = config.train.weight_decay if p.dim() > 1 else 0.0
        ratio = config.train.lora_plus_ratio if name.endswith(("lora_B", "lora_magnitude_vector")) else 1.0
        groups.setdefault((decay, ratio), []).append(p)
    train, on_gpu = config.train, all(p.is_cuda for p in weights.values())
    return FlatAdamW(groups, train.beta1, train.beta2, kind=train.optimizer, paged=train.paged and on_gpu)


def _what_must_stay(config: RunConfig) -> dict[str, Any]:
    """The settings that an exact resume depends on: all but where things lie, how often the state is saved and who else
    is told."""
    may_change = {
        "model": ("path", "tokenizer"), "data": FILE_KEYS, "eval": ("probes",),
        "train": ("output", "adapter", "checkpoint_every", "keep_checkpoints", "tensorboard", "paged", "decode_ahead"),
    }  # fmt: skip
    settings = to_dict(config)
    for section, keys in may_change.items():
        for key in keys:
            settings[section].pop(key, None)
    return settings
