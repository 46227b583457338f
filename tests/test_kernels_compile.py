"""What the kernels become on GPUs that are not here: compiled ahead of time, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sass import ARCHITECTURES

# Most instructions a weight on sm_90: of the whole kernel or, of a product's loop, over the weights of one turn; by
# Triton 3.6 and later.
LIMITS = {
    "quantize": 40,
    "dequantize": 12,
    "dequantize, nested": 13,
    "dequantize, nested, columns": 15,
    "matvec M=1, shuffle": 4.0,
    "matvec M=1, shuffle, nested": 4.0,
    "matvec M=2, shuffle, nested": 5.5,
    "matmul M=16, shuffle": 7,
    "matmul M=16, shuffle, nested": 7,
    "matmul M=64, shuffle, nested": 7,
    "matmul M=256, shuffle": 8.5,
    "matmul M=256, shuffle, nested": 8.5,
    "softmax gradient": 15,
    "adamw": 30,
    "adamw_8bit": 220,
    # A number of 16 bits; what a copy's time has room for is 9.6 for each byte.
    "rms_norm": 15,
    "add_rms_norm": 17,
    "rms_norm_backward": 22,
    "rotate": 12,
    "swiglu": 25,
    "swiglu_backward": 35,
}
# Elementwise: how many accesses of less than 16 bytes a thread may have, to 1 / rms.
NARROW = {
    "rms_norm": 1,
    "add_rms_norm": 1,
    "rms_norm_backward": 1,
    "rms_norm, float32 to 16 bits": 1,
    "rotate": 0,
    "swiglu": 0,
    "swiglu_backward": 0,
}
# All that QLoRA's default, double quantization, runs; each takes a second or two to compile.
COMPILED = [
    "quantize",
    "softmax gradient",
    "adamw",
    "adamw_8bit",
    "dequantize, nested",
    "dequantize, nested, columns",
    *(f"matvec M=1{way}, nested" for way in ("", ", shuffle")),
    *(f"matmul M={m}{way}, nested" for m in (16, 64, 256) for way in ("", ", shuffle")),
    "matmul M=32, float32, nested",
    *NARROW,
]
# Of the cards with little shared memory, what takes the most of it; sm_86 and sm_89 have the tiles of sm_80.
LARGEST = ["matmul M=256, nested", "matmul M=32, float32, nested"]
SIXTEEN_BYTES = ("dequantize, nested", "softmax gradient", "adamw", "adamw_8bit")  # what each store writes
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
TENSOR_CORES = {75: None, 80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
KIB = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # of shared memory that a program may have

Cases = dict[str, dict[str, Any]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Cases]:
    """What `benchmarks.sass` says of each kernel, by architecture."""
    folder = tmp_path_factory.mktemp("sass")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    found: dict[int, Cases] = {arch: {} for arch in TENSOR_CORES}
    wanted = (ARCHITECTURES, COMPILED), ((90,), LIMITS.keys() - set(COMPILED)), ((86, 120), LARGEST)
    calls = [
        ["--only_ours", "--out", str(folder / f"{i}.json"), "--kernel", *names, "--arch", *map(str, archs)]
        for i, (archs, names) in enumerate(wanted)
    ]
    code = f"from benchmarks.sass import main\nfor call in {calls}:\n    assert main(call) == 0"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in folder.iterdir():
        for case in json.loads(file.read_text())["cases"]:
            found[case["arch"]][case["kernel"]] = case
    return found


@pytest.fixture(params=TENSOR_CORES)
def compiled(request: pytest.FixtureRequest, measured: dict[int, Cases]) -> tuple[int, Cases]:
    """(architecture, what is said of each kernel)."""
    arch, cases = request.param, measured[request.param]
    names = LARGEST if arch in (86, 120) else COMPILED if arch >= 80 else [n for n in COMPILED if "matmul" not in n]
    assert cases.keys() == {*names, *(LIMITS if arch == 90 else ())}
    return arch, cases


of_all_kernels = pytest.mark.parametrize("compiled", ARCHITECTURES, indirect=True)


def test_nothing_is_spilled(compiled: tuple[int, Cases]) -> None:
    for name, case in compiled[1].items():
        assert (case["stack"], case["local"], case["spills"]) == (0, 0, False), name


def test_a_card_has_the_shared_memory(compiled: tuple[int, Cases]) -> None:
    arch, cases = compiled
    assert {name: case["shared"] for name, case in cases.items() if case["shared"] > 1024 * KIB[arch]} == {}


@of_all_kernels
def test_sixteen_bytes_are_stored_at_a_time(compiled: tuple[int, Cases]) -> None:
    assert all(case["stores_16_bytes"] for name, case in compiled[1].items() if name in SIXTEEN_BYTES)


@of_all_kernels
def test_what_is_elementwise_moves_sixteen_bytes_at_a_time(compiled: tuple[int, Cases]) -> None:
    for name, case in compiled[1].items():
        if name in NARROW:
            assert case["loads_16_bytes"], name
            assert case["stores_16_bytes"], name
            assert case["narrow"] <= NARROW[name], name


@of_all_kernels
def test_no_warp_of_a_matvec_waits_for_another(compiled: tuple[int, Cases]) -> None:
    """What threads exchange through shared memory, all warps of a program stop for, at each turn of the loop."""
    barriers = [case["barriers_in_loop"] for name, case in compiled[1].items() if name.startswith("matvec")]
    assert len(barriers) >= 2
    assert not any(barriers)


def test_products_run_on_tensor_cores(compiled: tuple[int, Cases]) -> None:
    arch, cases = compiled
    for name, case in cases.items():
        # Where float32 is on them, it is rounded: `nf4_matmul.is_exact`.
        on_them = name.startswith("matmul") and ("float32" not in name or (arch == 100 and TRITON < (3, 8)))
        assert case["tensor_cores"] == (TENSOR_CORES[arch] if on_them else None), name


@of_all_kernels
def test_few_instructions_a_weight(compiled: tuple[int, Cases]) -> None:
    arch, cases = compiled
    if arch == 90:
        assert {name: n for name, n in LIMITS.items() if not 1 < cases[name]["instructions_per_weight"] <= n} == {}
    for name in (name for name in cases if "shuffle" in name):
        plain = cases.get(name.replace(", shuffle", ""))
        assert cases[name]["shuffles"], name
        assert plain is None or cases[name]["instructions_per_weight"] < plain["instructions_per_weight"], name
