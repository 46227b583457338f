"""A run against its interrupted twin: what `--resume` promises, shown with one's own configuration on this machine.

    whole          steps 1 to n
    interrupted    steps 1 to n / 2, then a signal; in a new process, by --resume, the others

On a CPU both leave the same bytes. On a GPU no two runs do, as sums of attention's backward have no fixed order there:
so a second whole run says how far apart two of them come, and the interrupted one may not lie further.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from minilora.backend import pick_device
from minilora.checkpoint.safetensors_file import read_header
from minilora.config import RunConfig
from minilora.errors import UserError
from minilora.train.compare import in_a_process
from minilora.train.signals import Stopped

CHANCE = 4.0  # times as far apart as two whole runs: differences of rounding grow by chance


def compare_twins(config: RunConfig, n_steps: int, say: Callable[[str], object], named: str = "a configuration") -> str:
    """Run both in a folder that is thrown away, each in a process of its own; what came of them, in words.

    Raises UserError where they differ by more than chance, and Stopped once a signal was followed.
    """
    with tempfile.TemporaryDirectory(prefix="minilora-verify-") as name:
        whole, interrupted, again = (_short(config, Path(name, twin), n_steps) for twin in ("whole", "twin", "again"))
        middle, device = n_steps // 2, pick_device(config.model.device).type
        say(f"a run of {n_steps} steps of {named} on {device}; set for the check: {_set(config, whole)} ...")
        _run(whole)
        say(f"its twin, stopped after step {middle} ...")
        _run(interrupted, stop_after=middle)
        say("and resumed ...")
        _run(interrupted, resume=True)
        runs = f"{n_steps} steps, and {n_steps} interrupted after {middle}"
        if _bytes(whole) == _bytes(interrupted):
            return f"{runs}: figures and weights are the same bytes"
        if device == "cpu":
            raise UserError(f"{_first_difference(whole, interrupted)}: please report this bug")
        say("a second whole run, to see how far apart two come on a GPU ...")
        _run(again)
        apart, by_chance = _apart(whole, interrupted), _apart(whole, again)
        if apart > CHANCE * by_chance:
            raise UserError(f"{runs} lie {apart:.2g} apart, two whole runs {by_chance:.2g}: please report this bug")
        return f"{runs}: weights lie {apart:.2g} apart, and those of two whole runs {by_chance:.2g}, by chance"


def _run(config: RunConfig, resume: bool = False, stop_after: int = 0) -> None:
    try:
        if failed := in_a_process(config, resume=resume, stop_after=stop_after):
            raise UserError(failed)
    except Stopped as stopped:
        raise Stopped("stopped; nothing was kept", stopped.exit_status - 128) from None


def _short(config: RunConfig, output: Path, n_steps: int) -> RunConfig:
    """The configuration of a run of n_steps, with a validation in each half and nothing that is not the training's."""
    train = replace(config.train, output=str(output), max_steps=n_steps, warmup_steps=min(1, config.train.warmup_steps))
    limits = replace(config.eval, every=max(1, n_steps // 2 - 1), patience=0, answers=0, samples=0, probes=None)
    return replace(config, train=train, eval=limits, data=replace(config.data, general=None, test=None))


def _set(config: RunConfig, short: RunConfig) -> str:
    """What the short run has other than the configuration, but for its steps and its folder, which is thrown away."""
    pairs = ((s.name, getattr(config, s.name), vars(getattr(short, s.name))) for s in fields(config))
    changed = [(f"{s}.{key}", new) for s, old, ours in pairs for key, new in ours.items() if new != getattr(old, key)]
    shown = [(key, new) for key, new in changed if key not in ("train.output", "train.max_steps")]
    return ", ".join(f"{key} {'unset' if new is None else new}" for key, new in shown) or "nothing"


def _learnt(config: RunConfig) -> list[Path]:
    """The files of weights that the run left."""
    folder = Path(config.train.output, "model" if config.train.base_learns else "adapter")
    return sorted(folder.glob("*.safetensors"))


def _bytes(config: RunConfig) -> list[bytes]:
    """The bytes of the steps' figures and of each file of learnt weights."""
    return [file.read_bytes() for file in (Path(config.train.output, "metrics.jsonl"), *_learnt(config))]


def _apart(one: RunConfig, other: RunConfig) -> float:
    """The longest distance between two runs' tensors of one name, relative to the tensor's length."""
    longest = 0.0
    for here, there in zip(map(read_header, _learnt(one)), map(read_header, _learnt(other)), strict=True):
        for key in here:
            a, b = here[key].read().double(), there[key].read().double()
            longest = max(longest, float((a - b).norm() / a.norm().clamp_min(1e-30)))
    return longest


def _first_difference(one: RunConfig, other: RunConfig) -> str:
    """How the runs differ, in words: in the steps' figures, or if these are the same in the weights."""
    lines: Sequence[list[str]] = [Path(c.train.output, "metrics.jsonl").read_text().splitlines() for c in (one, other)]
    for a, b in zip(*lines, strict=False):
        if a != b:
            return f"the runs differ: the whole one has {a}, the interrupted one {b}"
    return f"the runs' weights differ by up to {_apart(one, other):.2g} of a tensor's length"
