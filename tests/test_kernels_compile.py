"""What the kernels become on GPUs that are not here: compiled ahead of time, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

# Most instructions a weight on sm_90, of the whole kernel or, of a product's loop, over the weights of one turn.
LIMITS = {
    "quantize": 40,
    "dequantize": 12,
    "dequantize, nested": 13,
    "matvec M=1, shuffle": 4.2,
    "matmul M=16, shuffle": 8.5,
    "matmul M=64, shuffle": 8.5,
    "matmul M=256, shuffle": 8.5,
}
TENSOR_CORES = {75: "HMMA", 80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module", params=TENSOR_CORES)
def compiled(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """(architecture, what `benchmarks.sass` says of each kernel)."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.sass", "--only_ours", "--json", "--arch", str(request.param)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, {case["kernel"]: case for case in json.loads(done.stdout)}


def test_nothing_is_spilled(compiled: tuple[int, dict[str, Any]]) -> None:
    _, cases = compiled
    assert len(cases) > 10
    for name, case in cases.items():
        assert (case["stack"], case["local"]) == (0, 0), name
        assert not {"LDL", "STL"} & set(case["opcodes"]), name


def test_sixteen_bytes_are_stored_at_a_time(compiled: tuple[int, dict[str, Any]]) -> None:
    _, cases = compiled
    for name in ("dequantize", "dequantize, nested"):
        assert any(opcode.startswith("STG.E.128") for opcode in cases[name]["opcodes"]), name


def test_products_run_on_tensor_cores(compiled: tuple[int, dict[str, Any]]) -> None:
    arch, cases = compiled
    for name, case in cases.items():
        has = any(opcode.startswith(TENSOR_CORES[arch]) for opcode in case["opcodes"])
        assert has == name.startswith("matmul"), name


def test_few_instructions_a_weight(compiled: tuple[int, dict[str, Any]]) -> None:
    arch, cases = compiled
    if arch == 90:
        assert {name: n for name, n in LIMITS.items() if cases[name]["instructions_per_weight"] > n} == {}
    shuffled = {name: case for name, case in cases.items() if "shuffle" in name}
    assert shuffled
    for name, case in shuffled.items():
        plain = cases[name.replace(", shuffle", "")]
        assert case["instructions_per_weight"] < plain["instructions_per_weight"], name
        assert any(opcode.startswith("SHFL.IDX") for opcode in case["opcodes"]), name
