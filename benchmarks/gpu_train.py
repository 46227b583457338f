"""A whole QLoRA step of the 7B on a GPU against transformers + peft + bitsandbytes: `benchmarks.gpu` runs it.

Each side is a process with its model on the device (`gpu_models`); they step in turns. Ours and the peer, plain, under
autocast, and under autocast prepared for k-bit training, each keep all activations or checkpoint them; ours can keep
the decoded weights as well, or decode them ahead (`ahead.py`), and races alone then, right after the others. A ratio is
against the fastest of the peer's that does the same, and of all that the peer has. Who has another first loss did
other work and is out. Where torchtune can be imported it is one more peer (`gpu_torchtune`), with ratios of its own.

Our memory is measured alone: of each policy what the ledger predicts, what was allocated at most in a step that ran as
it came, and what was reserved when steps are replayed, from the recorded one on; and, in another process, for one row
of LONGEST tokens, checkpointed: what a card of 24 GB should hold.
"""

from collections.abc import Mapping, Sequence
from math import isclose
from statistics import median
from typing import Any

import torch

from benchmarks import gpu_torchtune
from benchmarks.gpu_harness import matmul_tflop_per_s, run_part
from benchmarks.gpu_models import way_of
from benchmarks.harness import Contestant, Entrant, Record, race, ratio, ratio_text, row, started
from benchmarks.shapes import qlora_step_flops, shape
from minilora.fused import Keep

SHAPE, DRY_SHAPE, DRY_LENGTH = "mistral-7b-v0.3", "tiny", 16
# The decoded weights last: what the others hold of memory is least then.
POLICIES = {"kept": Keep.ALL, "checkpointed": Keep.INPUT, "kept with the decoded weights": Keep.WEIGHTS}
LONG, LONGEST, DRY_LONGEST = 2048, 43_008, 32  # whose memory is measured
PEERS = ((), ("autocast",), ("prepared", "autocast"))
ROUNDS, CAP_S, STEP_CAP_S = 7, 12.0, 60.0
RTOL = 3e-4  # of the losses, 16 bits on both sides; those of other weights or tokens differ by 4e-3 to 7e-3
TORCHTUNE_RTOL = 6e-4  # as much again: its absmax are off by up to 1 in 256, what bfloat16 rounds by


def measure(device: torch.device, length: int) -> dict[str, Any]:
    """Cases by what is kept, of so many tokens, in a dry run of few.

    `share_of_matmul`: model FLOPs a second over those of a square product
    """
    is_dry = device.type != "cuda"
    name, length = (DRY_SHAPE, DRY_LENGTH) if is_dry else (SHAPE, length)
    ours, arguments = _ours(device)
    contestants = [
        ours,
        *(
            Contestant(", ".join(("peft", *how)), "benchmarks.gpu_models:peer", arguments | dict.fromkeys(how, True))
            for how in PEERS[: 1 if is_dry else None]
        ),
    ]
    if gpu_torchtune.is_there() and not is_dry:  # whose quantizer takes no weights as small as a dry run's
        contestants.append(Contestant("torchtune", "benchmarks.gpu_torchtune:torchtune", arguments))
    ceiling, rounds, records = matmul_tflop_per_s(device), 1 if is_dry else ROUNDS, dict[str, list[Record]]()
    with started(contestants, at_once=not is_dry) as entrants:
        for policy, keep in POLICIES.items():
            racers = entrants[:1] if keep == Keep.WEIGHTS else entrants
            records[policy] = _race(racers, rounds, length=length, keep=keep)
        plain, ahead = (
            _race(entrants[:1], rounds, length=length, keep=Keep.ALL, ahead=decodes)[0] for decodes in (False, True)
        )
    return _cases(name, length, records, ceiling) | _ahead(name, length, plain, ahead, ceiling)


def measure_memory(device: torch.device) -> dict[str, Any]:
    """Cases by what is kept, of LONG tokens, and one of LONGEST."""
    is_dry, cases = device.type != "cuda", dict[str, Any]()
    name, long, longest = (DRY_SHAPE, DRY_LENGTH, DRY_LONGEST) if is_dry else (SHAPE, LONG, LONGEST)
    ours, _ = _ours(device)
    with started([ours]) as entrants:
        for keep in Keep:
            cases |= _memory(entrants, name, long, keep, 2)
    with started([ours]) as entrants:
        return cases | _memory(entrants, name, longest, Keep.INPUT, 0)


def _ours(device: torch.device) -> tuple[Contestant, dict[str, Any]]:
    """And the arguments, which are the peers' as well."""
    arguments = {"shape_name": SHAPE if device.type == "cuda" else DRY_SHAPE, "device": device.type, "adapters": True}
    return Contestant("minilora", "benchmarks.gpu_models:ours", arguments), arguments


def _memory(ours: Sequence[Entrant], name: str, length: int, keep: Keep, warm_ups: int) -> dict[str, Any]:
    """A step alone, after so many; its first is the one that runs as it comes."""
    [record] = _race(ours, 1, warm_ups, length=length, keep=keep)
    what = f"memory of a QLoRA step, {name}, 1 x {length} tokens, keeping {keep.name.lower()}"
    if not record.first or not record.steps:
        return {what: {"error": record.error or "no step", "rows": []}}
    first, last = record.first.result, record.steps[-1].result
    found = {"predicted": first["predicted_bytes"]}
    if "peak_allocated_bytes" in first:
        found |= {"allocated": first["peak_allocated_bytes"], "reserved": last["peak_reserved_bytes"]}
    said = ", ".join(f"{n / 1e9:.2f} GB {which}" for which, n in found.items())
    return {what: {**found, **way_of(record), "rows": [row(what, said, "", "")] if len(found) > 1 else []}}


def _ahead(name: str, length: int, plain: Record, ahead: Record, ceiling: float) -> dict[str, Any]:
    """Ours, all activations kept, with weights decoded ahead and without, each alone. Every step's loss must be the
    same: the first is decoded ahead nowhere."""
    flops, sides = qlora_step_flops(shape(name), 1, length), {"minilora": ahead, "minilora without": plain}
    case: dict[str, Any] = {
        "sides": {side: _figures(record, length, flops, ceiling) for side, record in sides.items()},
        "rows": [],
    }
    what = f"QLoRA step, {name}, 1 x {length} tokens, weights decoded ahead"
    pairs = list(zip(ahead.steps, plain.steps, strict=False))
    if not all(isclose(a.result["loss"], b.result["loss"], rel_tol=RTOL) for a, b in pairs):
        case["sides"]["minilora"]["error"] = "other losses than without"
    elif pairs:
        rates = [f"{length / record.seconds:.0f} tokens/s" for record in (ahead, plain)]
        case["rows"] = [row(what, rates[0], f"{rates[1]} (ours without)", f"{plain.seconds / ahead.seconds:.2f}")]
    return {what: case}


def _race(
    entrants: Sequence[Entrant], rounds: int, warm_ups: int = 2, *, length: int, keep: Keep, **more: Any
) -> list[Record]:
    setting = {"rows": 1, "length": length, "keep": keep.name, **more}
    return race(entrants, rounds, warm_ups, CAP_S, STEP_CAP_S, watch=False, work="train", **setting)


def _cases(name: str, length: int, records: Mapping[str, list[Record]], ceiling: float) -> dict[str, Any]:
    """By policy; each stack of the peers' apart, the first without its name in what a line says."""
    flops, cases = qlora_step_flops(shape(name), 1, length), dict[str, Any]()
    peers = [peer for policy in records.values() for peer in agreeing(*policy)]
    stacks = dict.fromkeys(map(_stack, (peer for _, *theirs in records.values() for peer in theirs)))
    for policy, (ours, *theirs) in records.items():
        sides = {record.name: _figures(record, length, flops, ceiling) for record in (ours, *theirs)}
        what = f"QLoRA step, {name}, 1 x {length} tokens, activations {policy}"
        case = cases[what] = {"sides": sides, "rows": []}
        for number, stack in enumerate(stacks):
            of_stack = [[peer for peer in some if _stack(peer) == stack] for some in (agreeing(ours, *theirs), peers)]
            case |= _ratios(
                case["rows"], f"{what}, beside {stack}" if number else what, policy, length, ours, *of_stack
            )
    return cases


def _ratios(
    rows: list[Any], what: str, policy: str, length: int, ours: Record, same: list[Record], peers: list[Record]
) -> dict[str, Any]:
    """Ours against the fastest that does the same, and the fastest of all; lines of them go to `rows`."""
    found = dict[str, Any]()
    for against, rivals in (("the same", same), ("its fastest", peers)):
        if not ours.steps or not rivals or (against == "its fastest" and POLICIES[policy] == Keep.INPUT):
            continue
        rival = min(rivals, key=lambda record: record.seconds)
        found[f"ratio to {against} of {_stack(rival)}"] = {"peer": rival.name, **ratio(ours, rival)}
        rate, rival_rate = (f"{length / record.seconds:.0f} tokens/s" for record in (ours, rival))
        if against == "the same":
            rows.append(row(what, rate, rival_rate, ratio_text(ratio(ours, rival))))
        else:  # which may have run in another race: no pairs
            rows.append(
                row(f"{what}, the peer at its fastest", rate, rival_rate, f"{rival.seconds / ours.seconds:.2f}")
            )
    if same and "peak_reserved_bytes" in ours.steps[0].result:
        lean = min(same, key=_reserved)
        peak, lean_peak = (f"{_reserved(record) / 1e9:.2f} GB" for record in (ours, lean))
        rows.append(row(f"{what}: peak memory", peak, lean_peak, f"{_reserved(lean) / _reserved(ours):.2f}"))
    return found


def _stack(record: Record) -> str:
    """The libraries, whatever the variant."""
    return record.name.partition(",")[0]


def agreeing(ours: Record, *theirs: Record) -> list[Record]:
    """Those whose first loss is ours."""

    def rtol(record: Record) -> float:
        return TORCHTUNE_RTOL if _stack(record) == "torchtune" else RTOL

    if not ours.steps or ours.first is None:
        return []
    loss = ours.first.result["loss"]
    return [
        record
        for record in theirs
        if record.steps and record.first and isclose(loss, record.first.result["loss"], rel_tol=rtol(record))
    ]


def _figures(record: Record, length: int, flops: float, ceiling: float) -> dict[str, Any]:
    if not record.steps:
        return {"error": record.error or "no step"}
    peaks = {key: max(step.result[key] for step in record.steps) for key in record.steps[0].result if "bytes" in key}
    return {
        "seconds": record.seconds,
        "seconds_of_each": [step.seconds for step in record.steps],
        "tok_per_s": median(length / step.seconds for step in record.steps),
        "model_tflop_per_s": flops / record.seconds / 1e12,
        "share_of_matmul": flops / record.seconds / 1e12 / ceiling,
        "losses": [step.result["loss"] for step in record.steps],
        "first_loss": record.first.result["loss"] if record.first else None,
        **peaks,
        **way_of(record),
        **({"error": record.error} if record.error else {}),
    }


def _reserved(record: Record) -> int:
    return max(int(step.result["peak_reserved_bytes"]) for step in record.steps)


if __name__ == "__main__":
    run_part("train")
