"""A whole QLoRA step of the 7B on a GPU against transformers + peft + bitsandbytes: `benchmarks.gpu` runs it.

Each side is a process with its model on the device (`gpu_models`); they step in turns. Ours and the peer, plain, under
autocast, with each layer compiled, or prepared for k-bit training, each keep all activations or checkpoint them; ours
can decode weights ahead (`ahead.py`) or keep them decoded as well, and races alone then. A ratio is against the fastest
of the peer's that does the same, and of all that the peer has. Where torchtune can be imported it is one more peer
(`gpu_torchtune`), with ratios of its own.

All do the same work, whatever they keep, so all losses must be equal, step after step: those of ours to a peer's, then
to those of ours that were. Who has others is out, and of ours that is an error.

Our memory is measured alone, in a step that runs as it comes, a recorded one and a replayed one: of each policy what
the ledger predicts, and what was allocated, reserved and taken of the card at most; and, in another process, for one
row of LONGEST tokens, checkpointed, which may take no more of the card than 24 GiB.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks import gpu_torchtune
from benchmarks.gpu_harness import matmul_tflop_per_s, run_part
from benchmarks.gpu_models import way_of
from benchmarks.harness import Contestant, Entrant, Record, race, ratio, ratio_text, row, same_losses, started
from benchmarks.shapes import qlora_step_flops, shape
from minilora.fused import Keep

SHAPE, DRY_SHAPE, DRY_LENGTH = "mistral-7b-v0.3", "tiny", 16
# The decoded weights last: what the others hold of memory is least then.
POLICIES: dict[str, dict[str, Any]] = {
    "kept": {"keep": "ALL"},
    "kept, weights decoded ahead": {"keep": "ALL", "ahead": True},
    "checkpointed": {"keep": "INPUT"},
    "kept with the decoded weights": {"keep": "WEIGHTS"},
}
SHARED = ("kept", "checkpointed")  # with the peers
LONG, LONGEST, DRY_LONGEST = 2048, 43_008, 32  # whose memory is measured
CARD_BYTES = 24 << 30
# And a third: of LONG prepared, with norms, embedding and head in float32; of less plain, with less to launch.
PEERS = (("autocast",), ("autocast", "compiled"))
ROUNDS, CAP_S, PART_S = 25, 12.0, 210.0
STEP_CAP_S = 180.0  # the first one compiles kernels
RTOL = 3e-4  # of the first losses, 16 bits on both sides; those of other weights or tokens differ by 4e-3 to 7e-3
TORCHTUNE_RTOL = 6e-4  # as much again: its absmax are off by up to 1 in 256, what bfloat16 rounds by
LATER_RTOL = 5e-3  # of those after updates; without these they differ by 1e-2 and more
COMPARED = 6  # losses: after some ten updates rounding alone drives them 1e-3 apart, and then further


def measure(device: torch.device, length: int) -> Iterator[dict[str, Any]]:
    """Cases by what is kept, of so many tokens, in a dry run of few: after each race, what there is so far.

    `share_of_matmul`: model FLOPs a second over those of a square product
    """
    deadline, is_dry = time.monotonic() + PART_S, device.type != "cuda"
    ways = [("autocast", "prepared") if length == LONG else (), *PEERS][: 1 if is_dry else None]
    name, length, rounds = (DRY_SHAPE, DRY_LENGTH, 1) if is_dry else (SHAPE, length, ROUNDS)
    ours, arguments = _ours(device)
    contestants = [ours]
    for how in ways:
        given = arguments | dict.fromkeys(how, True)
        contestants.append(Contestant(", ".join(("peft", *how)), "benchmarks.gpu_models:peer", given))
    if not is_dry and gpu_torchtune.is_there():  # whose quantizer takes no weights as small as a dry run's
        contestants.append(Contestant("torchtune", "benchmarks.gpu_torchtune:torchtune", arguments))
    ceiling, records = matmul_tflop_per_s(device), dict[str, list[Record]]()
    with started(contestants, at_once=not is_dry) as entrants:
        for policy, setting in POLICIES.items():
            racers, left = entrants if policy in SHARED else entrants[:1], deadline - time.monotonic()
            if left > 0:
                records[policy] = _race(racers, rounds, cap_s=min(CAP_S, left), length=length, **setting)
            else:
                records[policy] = [Record(racer.name, error="not run: the part's time was over") for racer in racers]
            said = [f"{r.name} {_rate(r, length) if r.steps else r.error}" for r in records[policy]]
            print(f"{length} tokens, activations {policy}: {'; '.join(said)}", flush=True)
            yield _cases(name, length, records, ceiling)


def measure_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Cases by what is kept, of LONG tokens, and one of LONGEST."""
    is_dry, cases = device.type != "cuda", dict[str, Any]()
    name, long, longest = (DRY_SHAPE, DRY_LENGTH, DRY_LONGEST) if is_dry else (SHAPE, LONG, LONGEST)
    free, total = (0, 0) if is_dry else torch.cuda.mem_get_info(device)
    others, (ours, _) = total - free, _ours(device)
    with started([ours]) as entrants:
        for keep in Keep:
            cases |= _memory(entrants, name, others, length=long, keep=keep.name, limit_bytes=None)
            yield cases
    with started([ours]) as entrants:
        limit = None if is_dry else others + CARD_BYTES
        yield cases | _memory(entrants, name, others, length=longest, keep="INPUT", limit_bytes=limit)


def _ours(device: torch.device) -> tuple[Contestant, dict[str, Any]]:
    """And the arguments, which are the peers' as well."""
    arguments = {"shape_name": SHAPE if device.type == "cuda" else DRY_SHAPE, "device": device.type, "adapters": True}
    return Contestant("minilora", "benchmarks.gpu_models:ours", arguments), arguments


def _memory(ours: Sequence[Entrant], name: str, others: int, **setting: Any) -> dict[str, Any]:
    """Of three steps: one runs as it comes, one is recorded, one replayed. others: bytes of the card not ours"""
    [record] = _race(ours, 2, 1, STEP_CAP_S, **setting)
    what = f"memory of a QLoRA step, {name}, 1 x {setting['length']} tokens, keeping {setting['keep'].lower()}"
    what += f", on a card of {_gib(CARD_BYTES)}" if setting["limit_bytes"] else ""
    if record.first is None or len(record.steps) < 2:
        failed = record.error or "no step"
        return {what: {"error": failed, "rows": [row(what, failed, "", "")] if setting["limit_bytes"] else []}}
    found = {"predicted": record.first.result["predicted_bytes"]}
    if "card_bytes" in record.first.result:
        found["allocated"] = _peak(record, "peak_allocated_bytes")
        found["reserved"] = _peak(record, "peak_reserved_bytes")
        found["on the card"] = _peak(record, "card_bytes") - others
    said = ", ".join(f"{_gib(n)} {which}" for which, n in found.items())
    case = {what: {**found, **way_of(record), "rows": [row(what, said, "", "")] if len(found) > 1 else []}}
    if setting["limit_bytes"] and found["on the card"] > CARD_BYTES:  # with what the driver has taken since
        case[what]["error"] = f"took more: {said}"
    return case


def _race(
    entrants: Sequence[Entrant], rounds: int, warm_ups: int = 2, cap_s: float = CAP_S, **setting: Any
) -> list[Record]:
    return race(entrants, rounds, warm_ups, cap_s, STEP_CAP_S, watch=False, work="train", rows=1, **setting)


def _cases(name: str, length: int, records: Mapping[str, list[Record]], ceiling: float) -> dict[str, Any]:
    """By policy, and the share of the ceiling; each stack of the peers' apart, the first without its name in what a
    line says."""
    flops, cases, step = qlora_step_flops(shape(name), 1, length), dict[str, Any](), f"QLoRA step, {name}, 1 x {length}"
    sound, theirs = _sound(records), [peer for _, *theirs in records.values() for peer in theirs]
    reference = next(iter(sound.values()), Record("none"))
    for policy, (ours, *others) in records.items():
        what, same = f"{step} tokens, activations {policy}", agreeing(reference, *others)
        sides = {record.name: _figures(record, length, flops, ceiling) for record in (ours, *others)}
        case = cases[what] = {"sides": sides, "rows": []}
        case["left_out_for_other_losses"] = [peer.name for peer in others if peer.steps and peer not in same]
        if policy not in sound:
            if ours.steps:
                sides[ours.name]["error"] = "its losses are no peer's, nor ours with other activations"
            continue
        case["ratios"] = {peer.name: ratio(ours, peer) for peer in same}
        races = {"": others} | ({} if policy == "checkpointed" else {", the peer at its fastest": theirs})
        for number, stack in enumerate(dict.fromkeys(map(_stack, theirs))):
            for at, peers in races.items():
                of_stack, title = [peer for peer in peers if _stack(peer) == stack], f", beside {stack}" * (number > 0)
                case["rows"] += _rows(what + title + at, length, ours, reference, of_stack, in_turns=not at)
    if sound:
        policy, ours = min(sound.items(), key=lambda pair: pair[1].seconds)
        what, rate = f"{step} tokens, model FLOPs at our fastest", flops / ours.seconds / 1e12
        of_card = f"{ceiling:.0f} TFLOP/s (torch's product of 8192 x 8192, 16 bits)"
        line = row(what, f"{rate:.0f} TFLOP/s (activations {policy})", of_card, f"{rate / ceiling:.2f}")
        cases[what] = {"share_of_matmul": rate / ceiling, "policy": policy, "rows": [line]}
    return cases


def _rows(
    what: str, length: int, ours: Record, reference: Record, peers: list[Record], in_turns: bool
) -> list[dict[str, str]]:
    """Ours against the fastest of the peers that agree, and in memory the leanest. in_turns: they ran in one race"""
    rivals, failed = agreeing(reference, *peers), dict.fromkeys(peer.name for peer in peers if peer.error)
    if not rivals:
        return []
    missing = f"; incomplete, without {' and '.join(failed)}" if failed else ""
    rival, lean = min(rivals, key=lambda peer: peer.seconds), min(rivals, key=_reserved)
    said = ratio_text(ratio(ours, rival)) if in_turns else f"{rival.seconds / ours.seconds:.2f}"
    rows = [row(what, _rate(ours, length), f"{_rate(rival, length)} ({rival.name}{missing})", said)]
    if in_turns and _reserved(ours):
        peak, lean_peak = _gib(_reserved(ours)), f"{_gib(_reserved(lean))} ({lean.name}{missing})"
        rows.append(row(f"{what}: peak memory", peak, lean_peak, f"{_reserved(lean) / _reserved(ours):.2f}"))
    return rows


def _sound(records: Mapping[str, list[Record]]) -> dict[str, Record]:
    """Ours by policy, where the losses are a peer's, or those of ours that were; where no peer runs, where they are
    finite and our first's."""
    found = dict[str, Record]()
    peers = [peer for _, *theirs in records.values() for peer in theirs if peer.steps]
    for policy, (ours, *_) in records.items():
        if agreeing(ours, *([*found.values()][:1] or peers or [ours])):
            found[policy] = ours
    return found


def agreeing(reference: Record, *others: Record) -> list[Record]:
    """Those whose losses are its."""

    def agrees(record: Record) -> bool:
        rtol = TORCHTUNE_RTOL if "torchtune" in (record.name, reference.name) else RTOL
        return same_losses(reference.losses[:COMPARED], record.losses, rtol, LATER_RTOL)

    return [record for record in others if agrees(record)]


def _figures(record: Record, length: int, flops: float, ceiling: float) -> dict[str, Any]:
    if not record.steps:
        return {"error": record.error or "no step"}
    return {
        "seconds": record.seconds,
        "seconds_of_each": [step.seconds for step in record.steps],
        "tok_per_s": median(length / step.seconds for step in record.steps),
        "model_tflop_per_s": flops / record.seconds / 1e12,
        "share_of_matmul": flops / record.seconds / 1e12 / ceiling,
        "losses": [step.result["loss"] for step in record.steps],
        "first_loss": record.first.result["loss"] if record.first else None,
        **{key: _peak(record, key) for key in record.steps[0].result if "bytes" in key},
        **way_of(record),
        **({"error": record.error} if record.error else {}),
    }


def _peak(record: Record, key: str) -> int:
    """The most in any step, the first one too: one that is replayed allocates nothing."""
    return max(int(step.result.get(key, 0)) for step in (record.first, *record.steps) if step)


def _reserved(record: Record) -> int:
    return _peak(record, "peak_reserved_bytes")


def _stack(record: Record) -> str:
    """The libraries, whatever the variant."""
    return record.name.partition(",")[0]


def _rate(record: Record, length: int) -> str:
    return f"{length / record.seconds:.0f} tokens/s"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
    run_part("train")
