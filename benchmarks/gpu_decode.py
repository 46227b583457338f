"""Generating with the 7B in NF4 on a GPU, one sequence, against transformers + bitsandbytes: `benchmarks.gpu` runs it.

Both decode greedily after the same random prompt; where they begin with unlike tokens, the row says so: two may be as
likely, to 16 bits. One token takes the prefill. Of two longer answers the longer one has N decoding steps more: their
difference is what a step takes, without our recording of one as a CUDA graph, which both answers begin with; it must be
above what an answer's time varies by. The peer has its default cache, which is dynamic, in eval mode, and fewer steps,
as each takes longer.
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_harness import run_part
from benchmarks.gpu_models import way_of
from benchmarks.harness import Contestant, Record, race, row, started
from minilora.decode_graph import FEWEST

SHAPE, PROMPTS, NEW, PEER_NEW = "mistral-7b-v0.3", (128, 2048), 256, 64
SHORT = 2 * FEWEST  # tokens of the shorter answer: enough for a graph
DRY_SHAPE, DRY_PROMPTS, DRY_NEW, DRY_SHORT = "tiny", (16,), 16, 2
ROUNDS, CAP_S, STEP_CAP_S = 5, 30.0, 180.0


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """Cases by length of the prompt: after each, what there is so far."""
    is_dry = device.type != "cuda"
    dry, full = (DRY_SHAPE, DRY_PROMPTS, (DRY_NEW, DRY_NEW), DRY_SHORT), (SHAPE, PROMPTS, (NEW, PEER_NEW), SHORT)
    name, prompts, news, short = dry if is_dry else full
    arguments = {"shape_name": name, "device": device.type, "adapters": False}
    contestants = [
        Contestant(side, f"benchmarks.gpu_models:{function}", arguments)
        for side, function in (("minilora", "ours"), ("transformers", "peer"))
    ]
    rounds, cases = 1 if is_dry else ROUNDS, dict[str, Any]()
    with started(contestants, at_once=not is_dry) as entrants:
        for prompt in prompts:
            setting: dict[str, Any] = {"watch": False, "work": "generate", "prompt": prompt}
            lengths = ((1, 1), (short, short), (short + news[0], short + news[1]))
            answers = [race(entrants, rounds, 1, CAP_S, STEP_CAP_S, new=n, peer_new=m, **setting) for n, m in lengths]
            what = f"decoding, {name} in NF4, after {prompt} tokens"
            sides = zip(news, *answers, strict=True)
            cases[what] = _case(what, *(_figures(new, *records) for new, *records in sides))
            yield cases


def _case(what: str, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    case: dict[str, Any] = {"minilora": ours, "transformers": peer, "rows": []}
    if "error" in ours or "error" in peer:
        return case
    begins = "" if ours["tokens"][0] == peer["tokens"][0] else ", but the answers begin with unlike tokens"
    pairs = list(zip(ours["tokens"], peer["tokens"], strict=False))
    case["share_of_equal_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
    rate, peer_rate = (f"{side['tok_per_s']:.1f} tokens/s" for side in (ours, peer))
    with_cache = f"{peer_rate} (transformers, its default, dynamic cache)"
    case["rows"] = [row(what + begins, rate, with_cache, f"{ours['tok_per_s'] / peer['tok_per_s']:.2f}")]
    return case


def _figures(new: int, one: Record, short: Record, long: Record) -> dict[str, Any]:
    if not (one.steps and short.steps and long.steps):
        return {"error": one.error or short.error or long.error or "no step"}
    more, seconds = long.seconds - short.seconds, [[step.seconds for step in record.steps] for record in (short, long)]
    spread = max(max(some) - min(some) for some in seconds)
    told = {"error": f"{new} tokens more take {more:.3f} s more, and answers vary by {spread:.3f} s"}
    return {
        "prefill_s": one.seconds,
        "seconds_of_the_short_answer": short.seconds,
        "seconds": long.seconds,
        "seconds_of_each": seconds[1],
        "tokens": long.steps[0].result["tokens"],
        "peak_reserved_bytes": long.steps[-1].result.get("peak_reserved_bytes"),
        **way_of(one, short, long),
        **({"tok_per_s": new / more} if more > spread else told),
    }


if __name__ == "__main__":
    run_part("decode")
