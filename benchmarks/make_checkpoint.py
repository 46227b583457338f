"""A checkpoint of full size with random weights: python -m benchmarks.make_checkpoint --shape NAME OUT

The weights are normal, std 0.02 (in the layers that write to the residual stream 0.02 / sqrt(2L)), the norms one: what
NF4 and a forward pass expect to see. Both layouts hold the same model for the same seed.

Drawing 7e9 normal numbers would take minutes, so one pool of them is drawn, and each tensor is put together from pieces
of it, each at its own random place with its own random sign, the whole tensor scaled a little. The numbers of two
tensors differ; they are not independent, which nothing that is measured here asks for. One tensor is in memory at a
time.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import SHAPES, shape
from minilora.checkpoint.layout import Layout
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.checkpoint.save import save_hf
from minilora.cli import exit_status
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.model import Mistral
from minilora.train.signals import StopRequest

POOL = 1 << 24  # numbers drawn
PIECE = 1 << 21  # numbers taken from the pool at a time: they fit the cache
STD = 0.02


def make_checkpoint(
    config: ModelConfig,
    folder: str | Path,
    layout: Layout = "hf",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str | Path | None = None,
) -> None:
    """Write the random model of `config` and `seed`. Raises UserError if the folder stands or the disk is too small,
    and Stopped at the next tensor after a signal; nothing is left then.
    """
    if not str(folder):
        raise UserError("OUT, the name of the new folder, is empty; give it one")
    with torch.device("meta"):
        model = Mistral(config)
    with StopRequest() as stop:
        weights = _until_stopped(random_weights(config, seed), stop, f"{folder}: stopped, nothing was written")
        save_hf(model, folder, dtype=dtype, weights=weights, tokenizer=tokenizer, layout=layout)


def _until_stopped(
    weights: Iterator[tuple[str, Tensor]], stop: StopRequest, message: str
) -> Iterator[tuple[str, Tensor]]:
    for weight in weights:
        stop.follow(message)
        yield weight
    stop.follow(message)


def random_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, bf16 tensor) in the order of `tensor_specs`. Each tensor is overwritten by the next one."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL, generator=generator).to(torch.bfloat16)
    specs = list(tensor_specs(config))
    buffer = torch.empty(max(spec.shape[0] * spec.shape[-1] for spec in specs if len(spec.shape) > 1), dtype=pool.dtype)
    for spec in specs:
        if len(spec.shape) == 1:
            yield spec.name, torch.ones(spec.shape)
            continue
        flat = buffer[: spec.shape[0] * spec.shape[1]]
        _fill(flat, pool, _std(spec, config) * _uniform(0.95, 1.05, generator), generator)
        yield spec.name, flat.view(spec.shape)


def _fill(out: Tensor, pool: Tensor, std: float, generator: torch.Generator) -> None:
    """Pieces of `pool`, from random places and with random signs, times std."""
    pieces = out.split(PIECE)
    places = torch.randint(POOL - PIECE, (len(pieces),), generator=generator).tolist()
    signs = (2 * torch.randint(2, (len(pieces),), generator=generator) - 1).tolist()
    for piece, place, sign in zip(pieces, places, signs, strict=True):
        torch.mul(pool[place : place + len(piece)], sign * std, out=piece)


def _std(spec: TensorSpec, config: ModelConfig) -> float:
    into_residual = spec.module.endswith(("o_proj", "down_proj"))
    return STD / (2 * config.n_layers) ** 0.5 if into_residual else STD


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**63:  # what torch takes
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status, as `minilora` has it: 1 after one line that says why, 130 or 143 for a signal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--shape", required=True, metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--layout", choices=("hf", "mistral"), default="hf")
    parser.add_argument("--tokenizer", metavar="FILE", help="copied beside the weights")
    parser.add_argument("--seed", type=_seed, default=0)
    parsed = parser.parse_args(argv)

    def work() -> None:
        config = shape(parsed.shape)
        make_checkpoint(config, parsed.out, parsed.layout, parsed.seed, tokenizer=parsed.tokenizer)
        print(f"{parsed.shape}, {config.n_parameters:,} weights, written to {parsed.out}", flush=True)

    return exit_status("make_checkpoint", work)


if __name__ == "__main__":
    sys.exit(main())
