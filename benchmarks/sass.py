"""Instructions a weight, counted in machine code without a GPU: python -m benchmarks.sass

Our kernels are compiled ahead of time, as their own launchers launch them, bitsandbytes' are taken out of its wheel;
both are disassembled with the tools that Triton brings, and counted by the same rule: every instruction of the function
but NOP and what pads its end, or those of its longest loop, over the weights that a thread has done by then (of what is
elementwise, the numbers of one of its tensors). Rarely taken branches count too, for both.

It is no time: what a kernel waits for does not show. But a GPU issues one instruction a lane and cycle, so that
instructions a weight times weights is a floor under the time, and a change for the worse is seen where no GPU is.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

from benchmarks.harness import check_result, row, write_result
from minilora.adamw import Update
from minilora.dynamic_8bit import DYNAMIC_BLOCK_SIZE
from minilora.errors import UserError
from minilora.kernels import adamw, nf4_matmul, nf4_matvec, nf4_quantize, nf4_table, norm, rope, swiglu
from minilora.kernels.nf4_dequantize import TILES, WORDS, dequantize
from minilora.kernels.softmax_gradient import BLOCK, softmax_gradient_
from minilora.loss import IGNORE
from minilora.nf4 import NF4Tensor, quantize_nf4

ARCHITECTURES = (75, 80, 90, 100)
OTHERS = (86, 89, 120)  # that can be asked for: with less shared memory
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
N, K = 128, 4096  # a weight, of rows as long as the 7B's
NARROW = re.compile(r"(LDG|STG)(?!.*\.(128|256))")


@dataclass(frozen=True)
class Listing:
    """A function's machine code: opcodes in order, and [start, stop) of its loops."""

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...] = ()

    def has(self, prefix: str) -> bool:
        return any(opcode.startswith(prefix) for opcode in self.opcodes)

    @property
    def longest_loop(self) -> "Listing":
        start, stop = max(self.loops, key=lambda loop: loop[1] - loop[0])
        return Listing(self.opcodes[start:stop])


def parse(text: str) -> dict[str, Listing]:
    """The functions in what `nvdisasm -c` prints."""
    sections = re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]
    return {section.split()[0]: listing_of(section.splitlines()) for section in sections}


def listing_of(lines: Sequence[str]) -> Listing:
    """Jumps name a label or, without a cubin around the code, an address; a loop runs from it to the last jump back."""
    opcodes, labels, loops = list[str](), dict[str, int](), dict[int, int]()
    for line in lines:
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif code := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            labels[f"{int(code[1], 16):#x}"] = len(opcodes)
            if code[2] == "NOP":
                continue
            opcodes.append(code[2])
            target = re.search(r"`\((\.L_\w+)\)|\b(0x[0-9a-f]+)\b", code[3])
            if code[2].startswith("BRA") and target and (to := target[1] or target[2]) in labels:
                loops[labels[to]] = len(opcodes)
    # The last instruction jumps to itself for ever: a guard behind the end.
    loops = {start: stop for start, stop in loops.items() if stop - start > 1}
    if opcodes and opcodes[-1] == "BRA":
        opcodes.pop()
    return Listing(tuple(opcodes), tuple(loops.items()))


@cache
def tool(name: str) -> str:
    """nvdisasm or cuobjdump, as Triton's wheel has them."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def disassemble(cubin: bytes) -> dict[str, Listing]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse(_output(tool("nvdisasm"), "-c", file.name))


def disassemble_each(cubins: Sequence[bytes]) -> list[Listing]:
    """The one function of each cubin, all of one architecture. nvdisasm takes half a second to begin, so that it begins
    once and gets their code as one piece, of 16 bytes an instruction."""
    if not cubins:
        return []
    with tempfile.TemporaryDirectory() as work:
        for i, cubin in enumerate(cubins):
            (Path(work) / f"{i}.cubin").write_bytes(cubin)
            extract = [tool("cuobjdump"), "-xtext", "all", f"{i}.cubin"]
            subprocess.run(extract, cwd=work, check=True, capture_output=True)
        files = [next(Path(work).glob(f"{i}-*.bin")) for i in range(len(cubins))]
        codes = [file.read_bytes() for file in files]
        [arch] = {re.sub(r".*\.sm_(\w+)\.elf\.bin", r"SM\1", file.name) for file in files}
        whole = Path(work) / "whole"
        whole.write_bytes(b"".join(codes))
        told = _output(tool("nvdisasm"), "--binary", arch, str(whole))
    lines = re.findall(r"^ +/\*[0-9a-f]{4,}\*/.*", told, flags=re.MULTILINE)
    ends = list(accumulate(len(code) // 16 for code in codes))
    assert ends[-1] == len(lines)
    return [listing_of(lines[start:end]) for start, end in pairwise([0, *ends])]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack, shared and local memory, of the one function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = _output(tool("cuobjdump"), "-res-usage", file.name)
    return {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", told)}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- ours --------------------------------------------------------------------------------------------------------------


class Launched(Exception):  # noqa: N818 - it is none
    """Takes what a launch is compiled to out of a launcher, which shall do nothing more."""


@contextmanager
def as_if_on(arch: int) -> Iterator[None]:
    """A launch raises Launched: compiled by Triton itself for what the launcher hands it, as on such a GPU, which need
    not be here. Tensors are on the CPU."""
    run = triton.JITFunction.run

    def compiled(function: Any, *args: Any, **given: Any) -> None:
        raise Launched(run(function, *args, **given | {"warmup": True}))

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # by which Triton keeps apart what it has compiled
        get_current_stream=lambda _: 0,
    )
    with (
        patch.object(triton.JITFunction, "run", compiled),
        patch.object(triton.runtime.driver, "_active", driver),
        patch.object(nf4_matmul, "architecture", lambda _: arch),
        # What launchers refuse: a CPU without the interpreter, a shuffle there, float32 that Triton rounds.
        patch.object(nf4_table, "decode_kernel", None),
        patch.object(nf4_matvec, "check_product"),
        patch.object(nf4_matmul, "check_product"),
        patch.object(nf4_matmul, "is_exact"),
    ):
        yield


@dataclass(frozen=True)
class Kernel:
    """A kernel as a call of its launcher, `launch`, has it compiled.

    weights: that a program does in all, or in one turn of its longest loop (`in_loop`)
    """

    name: str
    launch: Callable[[], object]
    weights: int
    in_loop: bool = False

    def compile(self, arch: int) -> Any:
        """Raises UserError where the interpreter is on: what it decorates cannot be compiled."""
        if not isinstance(nf4_table.decode_kernel, triton.JITFunction):
            raise UserError("TRITON_INTERPRET is set; kernels can be compiled without it only")
        try:
            with as_if_on(arch):
                self.launch()
        except Launched as launched:
            return launched.args[0]
        raise AssertionError(f"{self.name} has launched nothing")


@dataclass(frozen=True)
class Compiled:
    kernel: Kernel
    arch: int
    threads: int  # of a program
    listing: Listing
    resources: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def each(kernels: Sequence[Kernel], arch: int) -> list["Compiled"]:
        made = [kernel.compile(arch) for kernel in kernels]
        cubins, told = [compiled.asm["cubin"] for compiled in made], [compiled.metadata for compiled in made]
        return [
            # The cubin has none of the shared memory that a launch adds.
            Compiled(kernel, arch, 32 * of.num_warps, listing, resources(cubin) | {"shared": of.shared})
            for kernel, of, cubin, listing in zip(kernels, told, cubins, disassemble_each(cubins), strict=True)
        ]

    @property
    def per_weight(self) -> float:
        listing = self.listing.longest_loop if self.kernel.in_loop else self.listing
        return len(listing.opcodes) * self.threads / self.kernel.weights


def kernels(arch: int) -> list[Kernel]:
    """All that we run there, in the 16-bit dtype that the architecture computes in; matmul in float32, too."""
    dtype = torch.float16 if arch < 80 else torch.bfloat16
    dense, columns = torch.zeros(N, K, dtype=dtype), torch.zeros(N, 16, dtype=dtype)
    out, weight = torch.zeros(N, K + 16, dtype=dtype), nf4_weight(True)
    return [
        Kernel("quantize", lambda: nf4_quantize.quantize_nf4(dense), nf4_quantize.TILES * nf4_quantize.TILE),
        *nf4_kernels(arch, dtype, False),
        *nf4_kernels(arch, dtype, True),
        Kernel("dequantize, nested, columns", lambda: dequantize(weight, out=out, columns=columns), 8 * WORDS * TILES),
        *elementwise_kernels(dtype),
        *adamw_kernels(),
    ]


@cache
def nf4_weight(nested: bool) -> NF4Tensor:
    return quantize_nf4(torch.zeros(N, K), double_quant=nested)


def nf4_kernels(arch: int, dtype: torch.dtype, nested: bool) -> Iterator[Kernel]:
    weight, end = nf4_weight(nested), ", nested" * nested
    yield Kernel(f"dequantize{end}", partial(dequantize, weight, dtype), 8 * WORDS * TILES)
    for shuffle, way in ((False, end), (True, f", shuffle{end}")):
        for m in (1, 2):
            launch = partial(nf4_matvec.matvec, torch.zeros(m, K, dtype=dtype), weight, shuffle, warps=4)
            yield Kernel(f"matvec M={m}{way}", launch, 128 * nf4_matvec.ROWS * nf4_matvec.WORDS * 8, in_loop=True)
        sizes = [(16, dtype), (64, dtype), (256, dtype), (32, torch.float32)]
        for m, of_x in sizes if arch >= 80 else ():  # Triton has no way to the tensor cores of Turing
            launch = partial(nf4_matmul.matmul, torch.zeros(m, K, dtype=of_x), weight, shuffle, splits=1)
            name = f"matmul M={m}" + ", float32" * (of_x == torch.float32) + way
            yield Kernel(name, launch, nf4_matmul.BN * 64, in_loop=True)


def elementwise_kernels(dtype: torch.dtype) -> list[Kernel]:
    """Over a row of a 7B, as 32 heads where they are rotated. For a weight, a number; of the softmax, whose longest
    loop is one of its two passes, a logit."""
    x, wide, inverse = torch.zeros(1, K, dtype=dtype), torch.zeros(1, K), torch.zeros(1, 1)
    heads, cos, label = x.view(1, 32, 128), torch.zeros(1, 64, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    return [
        Kernel("rms_norm", lambda: norm.rms_norm(x, x[0], 1e-5, dtype), K),
        Kernel("add_rms_norm", lambda: norm.add_rms_norm(x, x, x[0], 1e-5, dtype), K),
        Kernel("rms_norm_backward", lambda: norm.rms_norm_backward(x, x, x[0], inverse, x), K),
        Kernel("rms_norm, float32 to 16 bits", lambda: norm.rms_norm(wide, x[0], 1e-5, dtype), K),
        Kernel("rotate", lambda: rope.rotate(heads, cos, cos), K),
        Kernel("swiglu", lambda: swiglu.swiglu(x, x), swiglu.BLOCK),
        Kernel("swiglu_backward", lambda: swiglu.swiglu_backward(x, x, x), swiglu.BLOCK),
        Kernel("softmax gradient", lambda: softmax_gradient_(x, label, IGNORE), BLOCK, in_loop=True),
    ]


def adamw_kernels() -> list[Kernel]:
    """With moments in 32 and in 8 bits."""
    p, codes, absmax = torch.zeros(K), torch.zeros(K, dtype=torch.uint8), torch.zeros(K // DYNAMIC_BLOCK_SIZE)
    update = Update(1e-4, 0.9, 0.999, 1e-8, 0.0, 10, 0.5)
    return [
        Kernel("adamw", lambda: adamw.adamw_(p, p, p, p, update), adamw.BLOCK),
        Kernel("adamw_8bit", lambda: adamw.adamw_8bit_(p, p, codes, codes, absmax, absmax, update), adamw.BLOCK),
    ]


# -- bitsandbytes' -----------------------------------------------------------------------------------------------------

# What stands beside ours: the peer's function (mangled names hold these words), a thread's weights; in a loop?
PEERS = {
    "dequantize": ("kDequantizeBlockwise", "{type}Li512ELi64ELi8ELi2E", 16, False),
    "quantize": ("kQuantizeBlockwiseSmall", "{type}Li64ELi2E", 2, False),
    "matvec M=1": ("gemm_4bit_simt", "{type}Li1E", 32, True),
    "matvec M=2": ("gemm_4bit_simt", "{type}Li2E", 32, True),
    "matmul M=16": ("gemm_4bit_sm80", "{type}Li32ELi64ELi128E", 64 * 128 / 256, True),
    "matmul M=256": ("gemm_4bit_sm80", "{type}Li128ELi128ELi64E", 128 * 64 / 256, True),
}
MANGLED = {"*bf16": "__nv_bfloat16", "*fp16": "__half"}


def peer_listings(arch: int) -> dict[str, Listing]:
    """All functions in bitsandbytes' binary for an architecture. Raises FileNotFoundError where it has none."""
    import bitsandbytes

    folder = Path(bitsandbytes.__file__).parent
    for library in sorted(folder.glob("libbitsandbytes_cuda*.so"), reverse=True):
        with tempfile.TemporaryDirectory() as work:
            subprocess.run(
                [tool("cuobjdump"), "-xelf", f"sm_{arch}.cubin", str(library)],
                cwd=work,
                check=True,
                capture_output=True,
            )
            for cubin in Path(work).glob("*.cubin"):
                return disassemble(cubin.read_bytes())
    raise FileNotFoundError(f"{folder}: no code for sm_{arch}")


def peer_counts(arch: int) -> dict[str, float]:
    """Instructions a weight of bitsandbytes' kernels, by our kernel's name."""
    listings, dtype = peer_listings(arch), MANGLED["*fp16" if arch < 80 else "*bf16"]
    found = {}
    for name, (function, arguments, weights, in_loop) in PEERS.items():
        wanted = arguments.format(type=dtype)
        matching = [listing for mangled, listing in listings.items() if function in mangled and wanted in mangled]
        # Several loops, which older architectures have for each exchange, or none: there is no one loop to count.
        if len(matching) == 1 and (len(matching[0].loops) == 1 or not in_loop):
            listing = matching[0].longest_loop if in_loop else matching[0]
            found[name] = len(listing.opcodes) / weights
    return found


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted((*ARCHITECTURES, *OTHERS)))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="some of ours, by the names that the table has")
    parser.add_argument("--only_ours", action="store_true", help="without bitsandbytes, which need not be installed")
    parser.add_argument("--out", metavar="FILE", help="instead of results/sass.json, which has all of it or nothing")
    parsed = parser.parse_args(argv)
    archs = parsed.arch or ARCHITECTURES
    names = list(dict.fromkeys(kernel.name for arch in archs for kernel in kernels(arch)))
    if unknown := [name for name in parsed.kernel or () if name not in names]:
        parser.error(f"there is no kernel {unknown[0]!r}; there are {'; '.join(names)}")
    is_whole = not (parsed.arch or parsed.kernel or parsed.only_ours)
    writes = bool(parsed.out) or is_whole
    try:
        if writes:
            check_result("sass", parsed.out, parts=False)
        cases = _cases(archs, parsed.kernel or names, parsed.only_ours)
    except (UserError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"sass: {error}", file=sys.stderr)
        return 1
    if writes:
        write_result("sass", {"cases": cases, "rows": _rows(cases)}, parsed.out)
    table = Table("instructions a weight", "sm", "minilora", "bitsandbytes", "registers", "spilled bytes")
    for case in cases:
        peer = f"{case['bitsandbytes']:.1f}" if case["bitsandbytes"] else "-"
        ours = f"{case['instructions_per_weight']:.1f}"
        table.add_row(case["kernel"], str(case["arch"]), ours, peer, str(case["reg"]), str(case["stack"]))
    Console().print(table)
    return 0


def _cases(archs: Sequence[int], names: Sequence[str], only_ours: bool) -> list[dict[str, Any]]:
    found = []
    for arch in archs:
        peers = {} if only_ours else peer_counts(arch)
        for done in Compiled.each([kernel for kernel in kernels(arch) if kernel.name in names], arch):
            alike = done.kernel.name.replace(", shuffle", "").removesuffix(", nested")  # no peer copies columns
            found.append(_case(done, peers.get(alike)))
    return found


def _rows(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For the table: Hopper, absmax in 8 bits where there are both, what stands beside a peer."""
    names = {case["kernel"] for case in cases}
    found = []
    for case in cases:
        name, ours, peer = case["kernel"], case["instructions_per_weight"], case["bitsandbytes"]
        if case["arch"] == 90 and peer and f"{name}, nested" not in names:
            what = f"instructions a weight, sm_90, {name}"
            found.append(row(what, f"{ours:.1f}", f"{peer:.1f}", f"{peer / ours:.2f}"))
    return found


def _case(done: Compiled, peer: float | None) -> dict[str, Any]:
    """What is told of a kernel. tensor_cores: the instruction, or None; stack: bytes a thread spills, and the like;
    narrow: loads from and stores to global memory of less than 16 bytes."""
    listing = done.listing
    loop = listing.longest_loop if listing.loops else Listing(())
    return {
        "kernel": done.kernel.name,
        "arch": done.arch,
        "instructions_per_weight": done.per_weight,
        "bitsandbytes": peer,
        "tensor_cores": next((name for name in TENSOR_CORES if listing.has(name)), None),
        "spills": listing.has("LDL") or listing.has("STL"),
        "loads_16_bytes": listing.has("LDG.E.128"),
        "stores_16_bytes": listing.has("STG.E.128"),
        "narrow": sum(bool(NARROW.match(opcode)) for opcode in listing.opcodes),
        "shuffles": listing.has("SHFL.IDX"),
        "barriers_in_loop": sum(opcode.startswith("BAR") for opcode in loop.opcodes),
        **done.resources,
    }


if __name__ == "__main__":
    sys.exit(main())
