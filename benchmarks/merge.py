"""Memory and time of merging a model of full size, audit included: python -m benchmarks.merge [--model FOLDER]

A fresh process merges a random adapter of rank 16 at every linear layer onto the NF4 round-trip of a bf16 checkpoint, a
block at a time, holds the merged model against the trained one on random tokens, and writes it. What is said is the
most private memory that this process ever had, beside it the resident one.

Without --model, a checkpoint of --shape is made first, of random weights. Memory does not ask how many blocks there
are: with --layers 2 its blocks, embedding and head are those of the whole, and the text may be as long as it is by
default.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Contestant, check_result, machine, race, row, show, started, write_result
from benchmarks.instructions import v3_tokenizer
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.shapes import SHAPES, shape
from minilora.checkpoint.open import open_checkpoint
from minilora.config import BaseConfig, LoraConfig, ModelConfig
from minilora.errors import UserError

RANK = 16
B_STD = 0.02  # W + s B A is then 7 % away from W: far more than bf16 rounds off


# -- in the contestant's process ---------------------------------------------------------------------------------------


def ours() -> Any:
    from minilora.base import Base
    from minilora.checkpoint.adapter_parts import Adapter, expected_shapes
    from minilora.data.encode import Sample
    from minilora.evaluate.merge_audit import merge_with_audit

    def adapter(sizes: ModelConfig) -> Adapter:
        config, generator = LoraConfig(rank=RANK, alpha=2.0 * RANK), torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(dims, generator=generator) * (B_STD if name.endswith("lora_B") else (3 * dims[1]) ** -0.5)
            for name, dims in expected_shapes(config, sizes).items()
        }
        return Adapter(config, tensors, {})

    def step(source: str, out: str, tokens: int, length: int) -> dict[str, Any]:
        base = Base.find(BaseConfig(path=source, quantize="nf4", device="cpu"))
        sizes, draw = base.checkpoint.config, np.random.default_rng(0)
        rows = [draw.integers(3, sizes.vocab_size, length + 1).astype(np.int32) for _ in range(tokens // length)]
        samples = [Sample(ids, np.arange(length + 1) > 0, "random") for ids in rows]
        audit = merge_with_audit(base, adapter(sizes), Path(out), samples, length)
        return {**audit.to_dict("trained"), "weights": sizes.n_parameters, "layers": sizes.n_layers}

    return step


# -- in the parent -----------------------------------------------------------------------------------------------------


def measure(source: Path, folder: Path, tokens: int, length: int, cap_s: float) -> dict[str, Any]:
    """One merge of the checkpoint `source` into `folder`, in a process of its own."""
    arguments: dict[str, Any] = {
        "source": str(source),
        "out": str(folder / "merged"),
        "tokens": tokens,
        "length": length,
    }
    with started([Contestant("minilora", "benchmarks.merge:ours")]) as entrants:
        (record,) = race(entrants, rounds=1, warm_ups=0, step_cap_s=cap_s, **arguments)
    figures = record.figures()
    if record.error or not record.first:
        return {"minilora": figures}
    found = record.first.result
    what = f"merge with audit on {tokens:,} tokens, {found['weights'] / 1e9:.2g} billion weights"
    text = f"{figures['seconds']:,.0f} s, {figures['peak_private_bytes'] / 1e9:.2f} GB of private memory in all"
    return {"minilora": figures | {"audit": found}, "length": length, "rows": [row(what, text, "", "")]}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="mistral-7b-v0.3", choices=SHAPES, help="of the random weights")
    parser.add_argument("--layers", type=int, help="blocks of it; by default all")
    parser.add_argument("--tokenizer", metavar="FILE", help="one with as many pieces, by default mistral-common's v3")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="merge onto this bf16 checkpoint instead")
    parser.add_argument("--tokens", type=int, default=4096, help="to compare on; minilora merge takes so many")
    parser.add_argument("--length", type=int, default=2048, help="of the rows that they stand in, whole ones; the same")
    parser.add_argument("--cap", type=float, default=7200, metavar="SECONDS", help="at most")
    parser.add_argument("--work", metavar="FOLDER", help="where files may lie meanwhile, instead of the system's place")
    parser.add_argument("--out", metavar="FILE", help="instead of results/merge.json")
    parsed = parser.parse_args(argv)
    if parsed.length < 1 or parsed.tokens < parsed.length:
        parser.error("--length must be above 0, and --tokens not below it")
    if parsed.layers is not None and parsed.layers < 1:
        parser.error("--layers must be above 0")
    tokens = parsed.tokens // parsed.length * parsed.length
    before = machine()
    try:
        check_result("merge", parsed.out)
        with tempfile.TemporaryDirectory(dir=parsed.work) as folder:
            source = parsed.model or Path(folder) / "bf16"
            if not parsed.model:
                config = shape(parsed.shape)
                config = replace(config, n_layers=parsed.layers or config.n_layers)
                make_checkpoint(config, source, tokenizer=parsed.tokenizer or v3_tokenizer())
            checkpoint = open_checkpoint(source)
            whose = checkpoint.name if parsed.model else parsed.shape
            name = f"{checkpoint.config.n_layers} layers of {whose}, {tokens} tokens"
            found = measure(source, Path(folder), tokens, parsed.length, parsed.cap)
    except (UserError, OSError) as error:
        print(f"merge: {error}", file=sys.stderr)
        return 1
    data = {"parts": {name: found | {"machine": before}}}
    write_result("merge", data, parsed.out)
    show(data)
    return 1 if "error" in found["minilora"] else 0


if __name__ == "__main__":
    sys.exit(main())
