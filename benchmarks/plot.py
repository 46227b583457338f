"""The roofline of the kernels, drawn from a result: python -m benchmarks.plot [results/gpu.json] [docs/roofline.png]

Each product is a point: FLOP a byte to the right, the rate that it reached up. The roof is what the card can do at
all, by the ceilings of the same run: its copy's bytes a second, then its products' FLOP a second.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

PRODUCTS = ("matvec", "matmul")


def points(result: Mapping[str, Any]) -> dict[str, list[tuple[float, float, str]]]:
    """(FLOP a byte, TFLOP/s, what) of each product, by part."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for part in PRODUCTS:
        for what, case in result["parts"].get(part, {}).get("cases", {}).items():
            seconds = case["timings"]["minilora"]["median_us"] / 1e6
            flops = case["tflop_per_s"] * 1e12 * seconds
            found.setdefault(part, []).append((flops / case["bytes"], case["tflop_per_s"], what))
    return found


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Write the figure. Raises ValueError where the result has no ceilings or no products, or is of another shape."""
    try:
        ceilings, products = result["parts"].get("ceilings", {}), points(result)
        if "copy_gb_per_s" not in ceilings or not products:
            raise ValueError("the result has no ceilings or no products; run python -m benchmarks.gpu")
        bandwidth, roof = ceilings["copy_gb_per_s"] / 1e3, float(ceilings["matmul_tflop_per_s"])  # TB/s, TFLOP/s
        title = _title(ceilings)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"the result is not one of python -m benchmarks.gpu ({error})") from None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    xs = [2.0**i for i in range(-1, 14)]
    axes.plot(xs, [min(x * bandwidth, roof) for x in xs], color="black", label="copy, product in 16 bits")
    for part, found in products.items():
        axes.plot([x for x, _, _ in found], [y for _, y, _ in found], "o", label=part)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s", title=title)
    axes.legend()
    figure.savefig(out, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _title(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    return f"{machine['gpu']}, {machine['date']}, commit {machine['commit']}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "roofline.png")
    parsed = parser.parse_args(argv)
    try:
        draw(json.loads(parsed.result.read_text()), parsed.out)
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None) or parsed.result
        print(f"plot: {where}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
