"""All that a run needs to go on exactly, in one place: saved as one folder, loaded strictly, compared by name.

A checkpoint holds

    state.safetensors    trained weights (float32), the optimizer's moments, torch's random state (CPU and GPU)
    state.json           the counters below, the sampler's place, the loss scale, and what the run was started with
    manifest.json        size and sha256 of both, written last

The order of the data is a function of (seed, epoch), so two numbers stand for the sampler and the packer. Python's and
numpy's random states are not used. A checkpoint is taken between steps, so there is no half-accumulated gradient.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.adamw import FlatAdamW
from minilora.checkpoint.provenance import versions
from minilora.checkpoint.safetensors_file import write_safetensors
from minilora.checkpoint.write import atomic_folder, verify_manifest
from minilora.data.pack import RowSampler
from minilora.errors import UserError
from minilora.train.step import LossScale

FORMAT = 1


@dataclass
class Counters:
    """How far a run is.

    step: batches taken; updates: of them, those that changed the weights (the schedule counts these)
    tokens, target_tokens: trained on so far; bad_in_a_row: steps left out, one after another
    best_loss, best_step: of the best validation; validations_since_best: for early stopping
    metrics_bytes, timing_bytes: lengths of the metrics files, which a resumed run cuts back to
    peak_private_bytes: the most private memory of the steps so far, also of the processes before this one
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


@dataclass
class RunState:
    """The changing parts of a run. `origin` is what must be the same to go on: settings, files, device."""

    weights: dict[str, nn.Parameter]
    optimizer: FlatAdamW
    sampler: RowSampler
    loss_scale: LossScale
    origin: dict[str, Any]
    counters: Counters = field(default_factory=Counters)

    def save(self, folder: Path, weights_only: bool = False) -> None:
        """Write the checkpoint so that it is there whole or not at all; an old one of the name is replaced.

        weights_only: what `load_weights` needs, for a checkpoint that no run goes on from
        """
        document = {
            "format": FORMAT,
            "counters": asdict(self.counters),
            "sampler": self.sampler.state_dict(),
            "loss_scale": asdict(self.loss_scale),
            "origin": self.origin,
            "versions": versions(),
        }
        tensors = self._weights() if weights_only else self._tensors()
        lines = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with atomic_folder(folder, overwrite=True, manifest={}) as new:
            write_safetensors(new / "state.safetensors", tensors.values(), lines, {})
            (new / "state.json").write_text(json.dumps(document, indent=1))

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from a checkpoint; return the versions that wrote it.

        Raises UserError if it is damaged, from another format, or of another run.
        """
        document = read_document(folder)
        refuse_other_run(document["origin"], self.origin, folder)
        tensors = safetensors.torch.load_file(folder / "state.safetensors")
        for name, parameter in self.weights.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight.{name}"])
            for key, moment in self.optimizer.state[parameter].items():
                moment.copy_(tensors.get(f"optimizer.{name}.{key}", torch.zeros(())))
            self.optimizer.steps = int(tensors.get(f"optimizer.{name}.step", 0))
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        self.sampler.load_state_dict(document["sampler"])
        self.loss_scale = LossScale(**document["loss_scale"])
        self.counters = Counters(**document["counters"])
        written_by: dict[str, Any] = document["versions"]
        return written_by

    def _weights(self) -> dict[str, Tensor]:
        return {f"weight.{name}": p.detach() for name, p in self.weights.items()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._weights()
        for name, parameter in self.weights.items() if self.optimizer.steps else ():
            moments = {"step": torch.tensor(float(self.optimizer.steps)), **self.optimizer.state[parameter]}
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        return tensors


def read_document(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are what its manifest says."""
    try:
        verify_manifest(folder)
    except UserError as error:
        raise UserError(f"{folder} is damaged; delete it to resume from the checkpoint before it. {error}") from None
    document: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if document.get("format") != FORMAT:
        raise UserError(
            f"{folder / 'state.json'}: format {document.get('format')} is not {FORMAT}, the one this version reads; "
            "resume with the version of minilora that wrote it"
        )
    return document


def refuse_other_run(saved: dict[str, Any], current: dict[str, Any], folder: Path, prefix: str = "") -> None:
    """Raise UserError at the first key in which a checkpoint's origin differs from this run's."""
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_other_run(old, new, folder, f"{prefix}{key}.")
        elif old != new:
            raise UserError(
                f"{folder}: {prefix}{key} was {old!r} when the run began and is {new!r} now; "
                "an exact resume needs the same, or begin anew with --overwrite"
            )


def load_weights(weights: dict[str, nn.Parameter], folder: Path) -> None:
    """Only the trained weights of a checkpoint: how the best one is put back."""
    verify_manifest(folder)
    tensors = safetensors.torch.load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(tensors[f"weight.{name}"])
