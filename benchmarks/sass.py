"""Instructions a weight, counted in machine code without a GPU: python -m benchmarks.sass

Our kernels are compiled ahead of time, bitsandbytes' are taken out of its wheel; both are disassembled with the tools
that Triton brings, and counted by the same rule: every instruction of the function but NOP and what pads its end, or
those of its longest loop, over the weights that a thread has done by then (of what is elementwise, the numbers of one
of its tensors). Rarely taken branches count too, for both.

It is no time: what a kernel waits for does not show. But a GPU issues one instruction a lane and cycle, so that
instructions a weight times weights is a floor under the time, and a change for the worse is seen where no GPU is.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import check_result, row, write_result
from minilora.errors import UserError

ARCHITECTURES = (75, 80, 90, 100)
OTHERS = (86, 89, 120)  # that can be asked for: with less shared memory
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
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
    import triton

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


@dataclass(frozen=True)
class Kernel:
    """A kernel as a launcher calls it. signature: type by argument, pointers ("*bf16") and ints of 16 bytes' alignment.

    weights: that a thread does in the whole function, or in one turn of its longest loop (`in_loop`)
    """

    name: str
    module: str
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    weights: float
    in_loop: bool = False
    warps: int = 4
    stages: int = 3
    fusion: bool = False  # of products and sums, where bits need not be equal

    def compile(self, arch: int) -> Any:
        """Raises UserError where the interpreter is on: what it decorates cannot be compiled."""
        from importlib import import_module

        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function = getattr(import_module(self.module), self.function)
        if not isinstance(function, triton.JITFunction):
            raise UserError("TRITON_INTERPRET is set; kernels can be compiled without it only")
        signature = {name: self.signature.get(name, "constexpr") for name in function.arg_names}
        whole = [name for name, kind in self.signature.items() if kind != "fp32"]
        aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in whole}
        constants = {name: self.constants.get(name) for name in function.arg_names if name not in self.signature}
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fusion}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@dataclass(frozen=True)
class Compiled:
    kernel: Kernel
    arch: int
    listing: Listing
    resources: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def each(kernels: Sequence[Kernel], arch: int) -> list["Compiled"]:
        made = [kernel.compile(arch) for kernel in kernels]
        cubins = [compiled.asm["cubin"] for compiled in made]
        return [
            # The cubin has none of the shared memory that a launch adds.
            Compiled(kernel, arch, listing, resources(cubin) | {"shared": compiled.metadata.shared})
            for kernel, compiled, cubin, listing in zip(kernels, made, cubins, disassemble_each(cubins), strict=True)
        ]

    @property
    def per_weight(self) -> float:
        listing = self.listing.longest_loop if self.kernel.in_loop else self.listing
        return len(listing.opcodes) / self.kernel.weights


def kernels(arch: int) -> list[Kernel]:
    """All that we run there, in the 16-bit dtype that the architecture computes in; matmul in float32, too."""
    sixteen = "*fp16" if arch < 80 else "*bf16"
    found = [quantize_kernel(sixteen)]
    for nested in (False, True):
        found.append(dequantize_kernel(sixteen, nested))
        for shuffle in (False, True):
            found += [matvec_kernel(sixteen, nested, shuffle, m) for m in (1, 2)]
            if arch >= 80:  # Triton has no way to the tensor cores of Turing
                found += [matmul_kernel(arch, nested, shuffle, m) for m in (16, 64, 256)]
                found.append(matmul_kernel(arch, nested, shuffle, 32, "*fp32"))
    found.append(dequantize_kernel(sixteen, True, 16))
    found += [*norm_kernels(sixteen), rotate_kernel(sixteen), *swiglu_kernels(sixteen)]
    return [*found, softmax_gradient_kernel(sixteen), *adamw_kernels()]


def quantize_kernel(sixteen: str) -> Kernel:
    from minilora.kernels.nf4_quantize import TILE, TILES

    return Kernel(
        "quantize",
        "minilora.kernels.nf4_quantize",
        "quantize_kernel",
        {"weight": sixteen, "thresholds": "*fp32", "packed": "*u8", "absmax": "*fp32", "n": "i32", "n_bytes": "i32"},
        {"block_size": 64, "blocks": TILE // 64, "TILES": TILES},
        weights=TILES * TILE / 128,
    )


def dequantize_kernel(sixteen: str, nested: bool, rank: int = 0) -> Kernel:
    """Of rows of 4096, which a rank's columns may follow."""
    from minilora.kernels.nf4_dequantize import TILES, WORDS

    behind = {"columns": sixteen, "n_columns": "i32"} if rank else {}
    return Kernel(
        "dequantize" + ", nested" * nested + ", columns" * bool(rank),
        "minilora.kernels.nf4_dequantize",
        "dequantize_kernel",
        _weight_signature(nested) | {"out": sixteen, "n": "i32"} | behind,
        _weight_constants(nested)
        | {"is_whole": True, "WORDS": WORDS, "TILES": TILES, "row": 4096, "rank": rank, "SHARE": 2 * rank},
        weights=TILES * WORDS * 8 / 128,
    )


def softmax_gradient_kernel(sixteen: str) -> Kernel:
    """For a weight, a logit: the longest loop is one of the two passes."""
    from minilora.kernels.softmax_gradient import BLOCK, WARPS

    return Kernel(
        "softmax gradient",
        "minilora.kernels.softmax_gradient",
        "softmax_gradient_kernel",
        {"logits": sixteen, "labels": "*i64", "losses": "*fp32", "n_columns": "i32"},
        {"ignore": -100, "BLOCK": BLOCK},
        weights=BLOCK / (32 * WARPS),
        in_loop=True,
        warps=WARPS,
        fusion=True,
    )


def adamw_kernels() -> list[Kernel]:
    """With moments in 32 and in 8 bits."""
    from minilora.kernels.adamw import BLOCK, BLOCKS

    numbers = ("grad_scale", "weight_m", "beta2", "weight_v", "eps", "kept", "step_size")
    module, shape = "minilora.kernels.adamw", dict[str, Any](weights=BLOCK / 128, fusion=True)
    of = dict.fromkeys(("p", "grad", "m", "v"), "*fp32") | {"n": "i32"} | dict.fromkeys(numbers, "fp32")
    tables = ("m_absmax", "v_absmax", "m_map", "v_map", "m_thresholds", "v_thresholds")
    in_8_bits = of | {"m": "*u8", "v": "*u8"} | dict.fromkeys(tables, "*fp32")
    constants = {"block_size": 256, "BLOCKS": BLOCKS}
    return [
        Kernel("adamw", module, "adamw_kernel", of, {"BLOCK": BLOCK}, **shape),
        Kernel("adamw_8bit", module, "adamw_8bit_kernel", in_8_bits, constants, **shape),
    ]


def matvec_kernel(sixteen: str, nested: bool, shuffle: bool, m: int) -> Kernel:
    from minilora.kernels.nf4_matvec import ROWS, WORDS

    return Kernel(
        f"matvec M={m}" + ", shuffle" * shuffle + ", nested" * nested,
        "minilora.kernels.nf4_matvec",
        "matvec_kernel",
        _weight_signature(nested) | {"x": sixteen, "y": sixteen, "n_rows": "i32", "n_words": "i32"},
        _weight_constants(nested) | {"M": m, "LANES": 128, "EVEN": True, "SHUFFLE": shuffle},
        weights=ROWS * WORDS * 8,
        in_loop=True,
        fusion=True,
    )


def matmul_kernel(arch: int, nested: bool, shuffle: bool, m: int, dtype: str = "*bf16") -> Kernel:
    from minilora.kernels.nf4_matmul import BN, tile

    in_float32 = dtype == "*fp32"
    bm, warps = tile(m, arch, 4 if in_float32 else 2)
    return Kernel(
        f"matmul M={m}" + ", float32" * in_float32 + ", shuffle" * shuffle + ", nested" * nested,
        "minilora.kernels.nf4_matmul",
        "matmul_kernel",
        _weight_signature(nested)
        | {"x": dtype, "sums": dtype, "m": "i32", "n": "i32", "n_words": "i32", "part": "i32"},
        _weight_constants(nested) | {"BM": bm, "BN": BN, "WORDS": 8, "SHUFFLE": shuffle},
        weights=BN * 64 / (32 * warps),
        in_loop=True,
        warps=warps,
    )


def norm_kernels(sixteen: str, d: int = 4096) -> list[Kernel]:
    """Over rows of a 7B; the last with a residual stream in float32."""
    from minilora.kernels.norm import A_THREAD, warps

    module, known = "minilora.kernels.norm", {"inverse": "*fp32", "d": "i32"}
    shape: dict[str, Any] = {"weights": A_THREAD, "warps": warps(d), "fusion": True}
    of = dict.fromkeys(("x", "weight", "total", "normed"), sixteen) | known | {"pitch": "i32", "eps": "fp32"}
    back = dict.fromkeys(("dn", "x", "weight", "residual_grad", "dx", "normed"), sixteen) | known
    back |= {"pitch": "i32", "residual_pitch": "i32"}
    constants = {"IS_KNOWN": False, "BLOCK": d}
    return [
        Kernel("rms_norm", module, "normalize_kernel", of, constants, **shape),
        Kernel("add_rms_norm", module, "normalize_kernel", of | {"y": sixteen}, constants, **shape),
        Kernel("rms_norm_backward", module, "normalize_back_kernel", back, constants, **shape),
        Kernel("rms_norm, float32 to 16 bits", module, "normalize_kernel", of | {"x": "*fp32"}, constants, **shape),
    ]


def rotate_kernel(sixteen: str) -> Kernel:
    """Of 32 heads of 128."""
    from minilora.kernels.norm import A_THREAD, warps

    integers = dict.fromkeys(("heads", "row_stride", "head_stride", "pitch"), "i32")
    return Kernel(
        "rotate",
        "minilora.kernels.rope",
        "rotate_kernel",
        dict.fromkeys(("x", "cos", "sin", "out"), sixteen) | integers | {"turn": "fp32"},
        {"HALF": 64, "HEADS": 32, "BLOCK": 64},
        weights=A_THREAD,
        warps=warps(4096),
        fusion=True,
    )


def swiglu_kernels(sixteen: str) -> list[Kernel]:
    from minilora.kernels.swiglu import BLOCK, WARPS

    module, wide = "minilora.kernels.swiglu", dict.fromkeys(("gate", "up"), sixteen)
    integers = {"f": "i32", "pitch": "i32"}
    shape: dict[str, Any] = {"weights": BLOCK / (32 * WARPS), "warps": WARPS, "fusion": True}
    return [
        Kernel("swiglu", module, "swiglu_kernel", wide | {"h": sixteen} | integers, {"BLOCK": BLOCK}, **shape),
        Kernel(
            "swiglu_backward",
            module,
            "swiglu_back_kernel",
            wide | {"dh": sixteen} | integers,
            {"BLOCK": BLOCK},
            **shape,
        ),
    ]


def _weight_signature(nested: bool) -> dict[str, str]:
    """What an NF4Tensor hands to a kernel."""
    signature = {"packed": "*i32", "levels": "*fp32", "absmax": "*u8" if nested else "*fp32"}
    stored = {"dynamic_map": "*fp32", "nested_absmax": "*fp32", "nested_offset": "*fp32"}
    return signature | stored if nested else signature


def _weight_constants(nested: bool) -> dict[str, Any]:
    return {"block_words": 8, "nested_block": 256, "is_nested": nested}


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
