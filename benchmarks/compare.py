"""The strategies on the embedded base, with and without replay: python -m benchmarks.compare

Runs `minilora compare` as it stands, in a folder that is thrown away, and keeps its figures and its picture.
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import check_result, write_result
from minilora.checkpoint.json_file import read_json
from minilora.cli import main as minilora

PICTURE = Path(__file__).parents[1] / "docs" / "compare.png"


def main() -> int:
    """Measure and write benchmarks/results/compare.json; the exit status of `minilora compare`."""
    check_result("compare")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        if status := minilora(["compare", "--output", f"{folder}/compare"]):
            return status
        seconds = time.perf_counter() - began
        comparison = read_json(Path(folder) / "compare" / "compare.json")
        PICTURE.write_bytes((Path(folder) / "compare" / "compare.png").read_bytes())
    print(f"{write_result('compare', {'comparison': comparison, 'seconds': seconds})}, {seconds:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
