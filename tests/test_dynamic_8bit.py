"""The dynamic map against bitsandbytes on the CPU."""

import hashlib
import json
from pathlib import Path

import torch
from bitsandbytes import functional as bnb

from minilora.dynamic_8bit import decode_dynamic, dynamic_map, dynamic_thresholds, encode_dynamic
from minilora.nf4 import CPU

CONSTANTS = json.loads((Path(__file__).parent / "vectors" / "nf4_vectors.json").read_text())["meta"]


def test_dynamic_map_is_bitsandbytes() -> None:
    levels = dynamic_map(CPU)
    assert hashlib.sha256(levels.numpy().astype("<f4").tobytes()).hexdigest() == CONSTANTS["dyn_signed_sha256"]
    assert levels[127] == 0
    assert levels[255] == 1
    assert (levels.diff() > 0).all()
    assert 0.0140 < levels.diff().max() < 0.0141


def test_the_unsigned_dynamic_map_is_bitsandbytes() -> None:
    levels, middles = dynamic_map(CPU, signed=False), dynamic_thresholds(CPU, signed=False)
    assert torch.equal(levels, bnb.create_dynamic_map(signed=False))
    assert torch.equal(middles[1:], (levels[1:-1] + levels[2:]) / 2)
    assert middles[0] == 0, "what is above zero keeps a level above zero"


def test_numbers_in_8_bits_are_bitsandbytes() -> None:
    """Absmax and what codes stand for are the same bytes. The codes are, where its CPU code goes to the nearest level:
    it looks them up by the first 16 bits of a number's place in [-1, 1], so closer than that it is off."""
    values = torch.randn(300 * 256, generator=torch.Generator().manual_seed(0))
    for signed, numbers in ((True, values), (False, values.square())):
        theirs, state = bnb.quantize_blockwise(numbers, code=bnb.create_dynamic_map(signed), blocksize=256)
        ours, absmax = encode_dynamic(numbers, signed)
        assert torch.equal(absmax, state.absmax)
        levels, scaled = dynamic_map(CPU, signed), (numbers.view(-1, 256) / absmax[:, None]).view(-1)
        differ = ours != theirs
        assert differ.float().mean() < (0.002 if signed else 0.035)
        off = [(levels[codes.int()] - scaled).abs() for codes in (ours, theirs)]
        is_zero = theirs == 0 if not signed else torch.zeros_like(differ)
        assert bool((off[0] <= off[1])[differ & ~is_zero].all()), "ours is nearer"
        assert bool((off[1] - off[0] <= 2**-15)[differ].all())
        made = bnb.dequantize_blockwise(ours, state)
        assert torch.equal(made, decode_dynamic(ours, absmax, signed))
