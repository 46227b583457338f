"""The PTX of the shuffled look-up, emulated: each instruction as the PTX manual (ISA 8.5) has it, for 32 lanes."""

import random
import re

import pytest
import torch
from kernel_cases import DEVICE

from minilora.kernels import nf4_table
from minilora.kernels.nf4_table import LANE_LEVEL, LOOK_UP, decode_kernel, on
from minilora.nf4 import LEVELS, levels, unpack

LANES = range(32)


def lines(ptx: str) -> list[tuple[str, list[str]]]:
    """(opcode, operands) of each instruction."""
    found = []
    for line in ptx.strip().strip("{}").strip().splitlines():
        opcode, _, operands = line.strip().rstrip(";").partition(" ")
        if not opcode.startswith("."):
            found.append((opcode, [operand.strip() for operand in operands.split(",")]))
    return found


def run(ptx: str, given: dict[str, list[int | float]]) -> dict[str, list[int | float]]:
    """All registers, a value a lane, after the instructions. `given`: the inputs."""
    registers = dict(given)

    def value(operand: str, lane: int) -> int | float:
        if operand == "%laneid":
            return lane
        return registers[operand][lane] if operand in registers else int(operand)

    for opcode, (to, *operands) in lines(ptx):
        before = {
            lane: [operand if operand.startswith("[") else value(operand, lane) for operand in operands]
            for lane in LANES
        }
        result: list[int | float] = []
        for lane in LANES:
            arguments = before[lane]
            if opcode == "mov.u32":
                result.append(arguments[0])
            elif opcode == "and.b32":
                result.append(int(arguments[0]) & int(arguments[1]))
            elif opcode == "shr.u32":
                result.append(int(arguments[0]) >> int(arguments[1]))
            elif opcode == "mad.wide.u32":
                result.append(int(arguments[0]) * int(arguments[1]) + int(arguments[2]))
            elif opcode == "ld.global.nc.f32":
                [address] = re.findall(r"\[(\w+)\]", str(arguments[0]))
                result.append(LEVELS[int(registers[address][lane]) // 4])
            elif opcode == "shfl.sync.idx.b32":
                # c = 31: no segments, all 32 lanes; mask -1: all take part; b: its five lowest bits name the lane
                assert operands[2:] == ["31", "-1"]
                result.append(registers[operands[0]][int(arguments[1]) & 31])
            else:
                raise AssertionError(opcode)
        registers[to] = result
    return registers


def entries() -> list[int | float]:
    return run(LANE_LEVEL.value, {"$1": [0] * 32})["$0"]


def test_each_lane_has_its_level() -> None:
    assert entries() == [LEVELS[lane % 16] for lane in LANES]


def test_words_give_their_levels_in_order() -> None:
    draw, table = random.Random(0), entries()
    for _ in range(100):
        words = [draw.randrange(2**32) for _ in LANES]
        registers = run(LOOK_UP.value, {"$8": list(words), "$9": table})
        for lane, word in enumerate(words):
            packed = torch.tensor(list(word.to_bytes(4, "little")), dtype=torch.uint8)
            assert [registers[f"${j}"][lane] for j in range(8)] == [LEVELS[code] for code in unpack(packed, 8).tolist()]


def test_plain_look_up_of_every_byte() -> None:
    """What the shuffle is held against at its first use."""
    words = torch.arange(4 * 256, device=DEVICE).remainder(256).to(torch.uint8)
    found = torch.empty(8, 256, device=DEVICE)
    decode_kernel[(2,)](words.view(torch.int32), levels(DEVICE), found, 256, WORDS=128, SHUFFLE=False)
    assert torch.equal(found.T.reshape(-1), levels(DEVICE)[unpack(words, 2048).int()])


def test_the_gpu_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    on(torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1)]


def test_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"run on a GPU, or by Triton's interpreter .*, not on meta"):
        on(torch.device("meta"))
    monkeypatch.setattr(nf4_table.triton, "JITFunction", type(decode_kernel))  # as without the interpreter
    with pytest.raises(ValueError, match="not on cpu"):
        on(torch.device("cpu"))
