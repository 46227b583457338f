"""The counter of instructions on a fixed listing, in the form that nvdisasm prints."""

import re
from pathlib import Path

import pytest
from marks import interpreted

from benchmarks import sass
from benchmarks.sass import Compiled, Kernel, Listing, _rows, listing_of, main, parse

LISTING = """\
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"

//--------------------- .text.first --------------------------
	.section	.text.first,"ax",@progbits
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/               @P0 EXIT ;
.L_x_0:
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/              @!P1 FMUL R4, R4, R5 ;
.L_x_1:
        /*0050*/                   SHFL.IDX PT, R6, R7, R8, 0x1f ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/              @UP3 IADD3 R2, R2, 0x10, RZ ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   BRA `(.L_x_3) ;
        /*00b0*/                   NOP ;
.L_x_3:
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
        /*00e0*/                   NOP;

//--------------------- .text.second --------------------------
	.section	.text.second,"ax",@progbits
.text.second:
        /*0000*/                   EXIT ;
"""


def test_instructions_of_each_function() -> None:
    found = parse(LISTING)
    assert list(found) == ["first", "second"]
    # Without the two NOP and the jump to itself behind the end.
    assert len(found["first"].opcodes) == 12
    assert found["first"].opcodes[:4] == ("LDC", "S2R", "EXIT", "LDG.E.128.CONSTANT")
    assert found["second"] == Listing(("EXIT",))


def test_loops_are_jumps_back() -> None:
    first = parse(LISTING)["first"]
    assert first.loops == ((5, 7), (3, 9))
    assert first.longest_loop.opcodes == ("LDG.E.128.CONSTANT", "FMUL", "SHFL.IDX", "BRA", "IADD3", "BRA")
    assert first.has("STG.E.128")
    assert not first.longest_loop.has("STG.E.128")


@pytest.mark.parametrize("end", [" ;", "   &req={3}   ?trans5;"])  # the latter by Triton 3.6's nvdisasm, of sm_120
def test_code_without_a_cubin_around_it_jumps_to_addresses(end: str) -> None:
    """The same loops, of a function that does not begin at zero."""
    labels = {".L_x_0": 0x1030, ".L_x_1": 0x1050, ".L_x_2": 0x10D0, ".L_x_3": 0x10C0}
    lines = [line.replace("/*00", "/*10") for line in LISTING.partition("//--")[2].splitlines() if "/*" in line]
    lines = [re.sub(r"`\((\.L_x_\d)\) ?;", lambda label: f"{labels[label[1]]:#x}{end}", line) for line in lines]
    assert listing_of(lines[:-1]) == parse(LISTING)["first"]


def test_instructions_a_weight() -> None:
    kernel = Kernel("", print, weights=128)
    assert Compiled(kernel, 90, 32, parse(LISTING)["first"]).per_weight == 12 / 4
    in_loop = Kernel("", print, weights=128, in_loop=True)
    assert Compiled(in_loop, 90, 32, parse(LISTING)["first"]).per_weight == 6 / 4


@interpreted
def test_the_interpreter_cannot_be_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only_ours", "--arch", "90", "--out", str(tmp_path / "sass.json")]) == 1
    assert capsys.readouterr().err == "sass: TRITON_INTERPRET is set; kernels can be compiled without it only\n"


def test_a_kernel_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kernel", "quantize", "nonsense"])
    assert "there is no kernel 'nonsense'; there are quantize; dequantize; " in capsys.readouterr().err


@pytest.mark.parametrize("some", [["--arch", "90"], ["--kernel", "quantize"], ["--only_ours"]])
def test_a_part_does_not_take_the_place_of_the_whole(
    some: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sass, "_cases", lambda *_: [])
    monkeypatch.setattr(sass, "write_result", lambda name, _, out: written.append((name, out)))
    assert [main(words) for words in (some, [], [*some, "--out", "x.json"])] == [0, 0, 0]
    assert written == [("sass", None), ("sass", "x.json")]


def test_rows_for_the_readme() -> None:
    """Where a kernel also reads absmax in 8 bits, that is the one to show; only beside a peer, only of Hopper."""

    def case(kernel: str, ours: float, peer: float | None, arch: int = 90) -> dict[str, object]:
        return {"kernel": kernel, "arch": arch, "instructions_per_weight": ours, "bitsandbytes": peer}

    cases = [case("a", 1, 9), case("a, nested", 2, 9), case("b", 3, None), case("c", 4, 6), case("c", 4, 6, arch=80)]
    assert _rows(cases) == [
        {"what": "instructions a weight, sm_90, a, nested", "ours": "2.0", "peer": "9.0", "ratio": "4.50"},
        {"what": "instructions a weight, sm_90, c", "ours": "4.0", "peer": "6.0", "ratio": "1.50"},
    ]
