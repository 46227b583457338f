"""All that a run needs to go on exactly, in one place: saved as one folder, loaded strictly, compared by name.

A checkpoint holds

    state.safetensors    trained weights (float32), the optimizer's moments, torch's random state (CPU and GPU)
    state.json           the counters below, the sampler's place, the loss scale, and what the run was started with
    manifest.json        size and sha256 of both, written last

The order of the data is a function of (seed, epoch), so two numbers stand for the sampler and the packer. Python's and
numpy's random states are not used. A checkpoint is taken between steps, so there is no half-accumulated gradient.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from minilora.adamw import FlatAdamW
from minilora.checkpoint.finite import refuse_not_finite
from minilora.checkpoint.json_file import read_json, short
from minilora.checkpoint.provenance import versions
from minilora.checkpoint.safetensors_file import TensorEntry, read_header, write_tensors
from minilora.checkpoint.write import atomic_folder, verify_manifest
from minilora.data.pack import RowSampler
from minilora.errors import UserError
from minilora.train.step import LossScale

FORMAT = 1
STATE, TENSORS = "state.json", "state.safetensors"


@dataclass
class Counters:
    """How far a run is.

    step: batches taken; updates: of them, those that changed the weights (the schedule counts these)
    tokens, target_tokens: of the batches taken; bad_in_a_row: steps left out, one after another
    best_loss, best_step: of the best validation; validations_since_best: for early stopping
    metrics_bytes, timing_bytes: lengths of the metrics files, which a resumed run cuts back to
    peak_private_bytes: the most private memory of the steps so far, also of the processes before this one
    peak_device_allocated, peak_device_reserved: so of a GPU's; 0 without one
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    target_tokens: int = 0
    bad_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int = 0
    validations_since_best: int = 0
    metrics_bytes: int = 0
    timing_bytes: int = 0
    peak_private_bytes: int = 0
    peak_device_allocated: int = 0
    peak_device_reserved: int = 0


@dataclass
class RunState:
    """The changing parts of a run. `origin` is what must be the same to go on: settings, files, device."""

    weights: dict[str, nn.Parameter]
    optimizer: FlatAdamW
    sampler: RowSampler
    loss_scale: LossScale
    origin: dict[str, Any]
    counters: Counters = field(default_factory=Counters)

    def save(self, folder: Path, weights_only: bool = False, random: dict[str, Tensor] | None = None) -> None:
        """Write the checkpoint so that it is there whole or not at all; an old one of the name is replaced.

        weights_only: what `load_weights` needs, for a checkpoint that no run goes on from
        random: the random state to go on from; None: the present one
        """
        document = {
            "format": FORMAT, "counters": asdict(self.counters), "sampler": self.sampler.state_dict(),
            "loss_scale": asdict(self.loss_scale), "origin": self.origin, "versions": versions(),
        }  # fmt: skip
        tensors = _of_weights(self.weights)
        if not weights_only:
            tensors |= (self._moments() if self.optimizer.steps else {}) | (random or random_state())
        with atomic_folder(folder, overwrite=True) as new:
            write_tensors(new / TENSORS, tensors)
            (new / STATE).write_text(json.dumps(document, indent=1))

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from a checkpoint; return the versions that wrote it.

        Raises UserError, before a weight is changed, if it is damaged, from another format, or of another run.
        """
        document = read_document(folder)
        known = {key: str if isinstance(value, str) else type(value) for key, value in versions().items()}
        for name, kinds in {**_PARTS, "versions": known}.items():
            _check(document.get(name), kinds, f"{folder / STATE}: {name}")
        refuse_other_run(document.get("origin"), self.origin, folder)
        held = read_header(folder / TENSORS)
        like = _of_weights(self.weights) | {"rng.cpu": torch.get_rng_state()}
        if any(key.startswith("optimizer.") for key in held):  # before the first update there are none
            like |= self._moments()
        if "rng.cuda" in held and torch.cuda.is_available():
            like["rng.cuda"] = torch.cuda.get_rng_state()
        read = _tensors(folder, held, like)  # twice: all are looked at before one is changed, and none is kept
        small = {key: tensor for key, tensor in read if key.endswith(".step") or key.startswith("rng.")}
        steps = {int(tensor) for key, tensor in small.items() if key.endswith(".step")}
        if len(steps) > 1:
            raise UserError(f"{folder / TENSORS}: its weights have taken unlike numbers of steps, {sorted(steps)}")
        try:
            self.sampler.load_state_dict(document["sampler"])
            torch.set_rng_state(small["rng.cpu"])
            if "rng.cuda" in small:
                torch.cuda.set_rng_state(small["rng.cuda"])
        except RuntimeError as error:
            raise UserError(f"{folder / TENSORS}: holds no random state of this torch: {error}") from None
        for key, moment in self._moments().items():
            if key not in like:
                moment.zero_()
        for key, tensor in _tensors(folder, held, like):
            like[key].copy_(tensor)
        self.optimizer.steps = max(steps, default=0)
        self.loss_scale = LossScale(**document["loss_scale"])
        self.counters = Counters(**document["counters"])
        return dict(document["versions"])

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's moments of each weight by key, with the number of its steps beside them."""
        steps = {"step": torch.tensor(float(self.optimizer.steps))}
        moments = {name: steps | self.optimizer.state[p] for name, p in self.weights.items()}
        return {f"optimizer.{name}.{key}": value for name, held in moments.items() for key, value in held.items()}


def _of_weights(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {f"weight.{name}": p.detach() for name, p in weights.items()}


def random_state() -> dict[str, Tensor]:
    """Torch's random state, on the CPU and, where it is in use, on the GPU."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"rng.cpu": torch.get_rng_state()} | ({"rng.cuda": torch.cuda.get_rng_state()} if on_gpu else {})


# What state.json holds of each part: keys, and what they are.
_PARTS: dict[str, dict[str, Any]] = {
    "counters": get_type_hints(Counters),
    "loss_scale": get_type_hints(LossScale),
    "sampler": {"epoch": int, "row": int},
}


def read_document(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are what its manifest says."""
    try:
        verify_manifest(folder)
    except UserError as error:
        what = str(error).partition("; if that was intended")[0]  # without a manifest it is no checkpoint
        raise UserError(f"{folder} is damaged; delete it, and all of its step or later, to resume. {what}") from None
    document = read_json(folder / STATE)
    if document.get("format") != FORMAT:
        another = f"format {document.get('format')} is not {FORMAT}, the one this version reads"
        raise UserError(f"{folder / STATE}: {another}; resume with the version of minilora that wrote it")
    return document


def _check(values: Any, kinds: Mapping[str, Any], what: str) -> None:
    """Raise UserError unless `values` are just of these keys and kinds, and no number is negative, huge or NaN."""
    if isinstance(values, dict) and values.keys() == kinds.keys():
        numbers = [value for value in values.values() if isinstance(value, int | float)]
        typed = all(isinstance(v, kinds[k]) and isinstance(v, bool) == (kinds[k] is bool) for k, v in values.items())
        if typed and all(0 <= number < 2**53 for number in numbers):
            return
    raise UserError(f"{what} is {short(values)}, which no run of this version writes; resume from another checkpoint")


def _tensors(folder: Path, held: Mapping[str, TensorEntry], like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors with their keys, read one by one. Raises UserError where they are not those of `like`, or
    not finite."""
    wrong = like.keys() ^ held.keys()
    wrong |= {k for k in like.keys() & held.keys() if (like[k].dtype, like[k].shape) != held[k].kind}
    if wrong:
        raise UserError(f"{folder / TENSORS}: {short(min(wrong))} is not as this run writes it; it is another run's")
    remedy = "resume from another checkpoint"
    for key in like:
        tensor = held[key].read()
        refuse_not_finite(tensor, f"{folder / TENSORS}: {key}", remedy)
        if key.endswith((".step", ".exp_avg_sq", "_absmax")) and tensor.min() < 0:
            raise UserError(f"{folder / TENSORS}: {key} is below 0, as no run writes it; {remedy}")
        yield key, tensor


def refuse_other_run(saved: Any, current: dict[str, Any], folder: Path, prefix: str = "") -> None:
    """Raise UserError at the first key in which a checkpoint's origin differs from this run's."""
    saved = saved if isinstance(saved, dict) else {}
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_other_run(old, new, folder, f"{prefix}{key}.")
        elif old != new:
            changed = f"{prefix}{key} was {old!r} when the run began and is {new!r} now"
            raise UserError(f"{folder}: {changed}; an exact resume needs the same, or begin anew with --overwrite")


def load_weights(weights: dict[str, nn.Parameter], folder: Path) -> None:
    """Load only the trained weights of a checkpoint: how the best one is put back."""
    read_document(folder)
    held, like = read_header(folder / TENSORS), _of_weights(weights)
    held = {key: held[key] for key in held.keys() & like.keys()}
    for copying in (False, True):  # all are looked at before one is changed
        for key, tensor in _tensors(folder, held, like):
            if copying:
                like[key].copy_(tensor)
