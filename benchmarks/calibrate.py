"""From how many rows on which way is faster, measured on this GPU: python -m benchmarks.calibrate

Times matvec, matmul, and decoding with torch's product, in turns, over a grid of rows for the 7B's weights, and writes
the entry of this architecture in minilora/dispatch.json, card's name and all; with --out FILE, the whole table with it
there. The look-up by lane exchange is switched on if the card has it right and it is faster in the sum over the grid.
`minilora verify kernels` prints the table that is in use.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_harness import dense_weight, in_turns, nf4_sets
from benchmarks.harness import check_result
from benchmarks.nf4_matvec import SHAPES, decoded_product
from minilora.checkpoint.write import atomic_write
from minilora.dispatch import TABLE
from minilora.dispatch import table as dispatch_table
from minilora.errors import UserError

ROWS = (1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)

# Microseconds by way and rows.
Grid = Mapping[str, Mapping[int, float]]


def limits(grid: Grid) -> tuple[int, int]:
    """(rows up to which matvec is the fastest, rows up to which it, then matmul, is no slower than decoding)."""
    matvec = matmul = 0
    for m in sorted(grid["matmul"]):
        one = grid["matvec"].get(m, float("inf"))
        if one <= min(grid["matmul"][m], grid["dequantize"][m]) and matvec == matmul:
            matvec = matmul = m
        elif grid["matmul"][m] <= grid["dequantize"][m]:
            matmul = m
        else:
            break
    return matvec, matmul


def entry(arch: int, card: str, plain: Mapping[int, Grid], shuffled: Mapping[int, Grid] | None) -> dict[str, Any]:
    """What dispatch.json says of a card. plain, shuffled: grids by the number N * K of the weight."""
    faster = shuffled is not None and _sum(shuffled) < _sum(plain)
    rows: list[dict[str, int]] = []
    for n_weights, grid in sorted((shuffled if faster and shuffled is not None else plain).items()):
        matvec, matmul = limits(grid)
        if not rows or (matvec, matmul) != (rows[-1]["matvec"], rows[-1]["matmul"]):
            rows.append({"least_weights": n_weights if rows else 0, "matvec": matvec, "matmul": matmul})
    return {"arch": arch, "card": card, "shuffle": faster, "limits": rows}


def _sum(grids: Mapping[int, Grid]) -> float:
    return sum(us for grid in grids.values() for way in ("matvec", "matmul") for us in grid[way].values())


def with_entry(table: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The table with this entry in place of, or between, the others."""
    return sorted([*(old for old in table if old["arch"] != new["arch"]), new], key=lambda old: int(old["arch"]))


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """JSON, an entry a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in table) + "\n]\n"


def measure(device: torch.device, shuffle: bool, shapes: Sequence[tuple[int, int]] = SHAPES) -> Mapping[int, Grid]:
    """Grids by the number of weights, which is all that a limit knows of one; of shapes with as many, the sums."""
    from minilora.kernels.nf4_matmul import matmul
    from minilora.kernels.nf4_matvec import MAX_VECTORS, matvec

    grids: dict[int, dict[str, dict[int, float]]] = {}
    for n, k in shapes:
        dense = dense_weight(n, k, device)
        sets, scratch = nf4_sets(dense), torch.empty_like(dense)
        grid = grids.setdefault(n * k, {"matvec": {}, "matmul": {}, "dequantize": {}})
        for m in ROWS:
            x = torch.randn(m, k, device=device).to(dense.dtype)
            ways = {
                "matmul": [partial(matmul, x, weight, shuffle) for weight in sets],
                "dequantize": [partial(decoded_product, x, weight, scratch) for weight in sets],
            }
            if m <= MAX_VECTORS:
                ways["matvec"] = [partial(matvec, x, weight, shuffle) for weight in sets]
            for way, timing in in_turns(ways, device, rounds=30).items():
                grid[way][m] = grid[way].get(m, 0.0) + timing.median_us
    return grids


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="instead of minilora/dispatch.json, which stays as it is")
    out = parser.parse_args(argv).out or TABLE
    if not torch.cuda.is_available():
        print("calibrate: there is no GPU to measure", file=sys.stderr)
        return 1
    try:
        dispatch_table()  # files that cannot be used are found before measuring
        check_result("calibrate", out, parts=False)
    except UserError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    from minilora.kernels.nf4_matvec import architecture, shuffle_is_right

    device = torch.device("cuda")
    shuffled = measure(device, True) if shuffle_is_right(device) else None
    new = entry(architecture(device), torch.cuda.get_device_name(device), measure(device, False), shuffled)
    text = as_text(with_entry(json.loads(TABLE.read_text("utf-8")), new))
    atomic_write(out, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
