"""Numbers in 8 bits on the dynamic map (https://arxiv.org/abs/1511.04561), 256 of them by their largest magnitude.

    code[i] = the nearest level to x[i] / absmax[i // 256]
    x'[i]   = MAP[code[i]] * absmax[i // 256]

The map's 256 levels lie close together near zero and far apart beyond: it holds seven decades. NF4's absmax are so
stored by double quantization (`nf4.py`), and AdamW's moments where they are in 8 bits (`adamw.py`), whose second, never
below zero, has a map without a sign.

bitsandbytes' maps, blocks and bytes; but codes go to the nearest level, where its CPU code rounds through a table of
65536 entries and is one level off in 0.3 % of cases.
"""

from functools import cache

import torch
from torch import Tensor

DYNAMIC_BLOCK_SIZE = 256


@cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """The 256 levels, float32, rising: 0, 1 and +-127 midpoints, or 254 unsigned ones.

    Decade i of seven (10^-6 .. 10^0) holds 2^i even intervals of [0.1, 1], twice as many without a sign; their
    midpoints are the levels (bitsandbytes' `create_dynamic_map`).
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6))
    magnitudes = torch.cat(decades)
    sides = [magnitudes, -magnitudes] if signed else [magnitudes]
    return torch.cat([*sides, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@cache
def dynamic_thresholds(device: torch.device, signed: bool = True) -> Tensor:
    """Midpoints between neighbours of `dynamic_map`, (255,) float32: where one code ends and the next begins.

    Unsigned, the first is 0: what is above zero keeps a level above zero, since optimizers divide by its root.
    """
    levels = dynamic_map(torch.device("cpu"), signed)
    middles = (levels[:-1] + levels[1:]) / 2
    if not signed:
        middles[0] = 0
    return middles.to(device)  # there once this returns, so that any stream may read it


def encode_dynamic(values: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and absmax (ceil(n/256),) of `values` (n,) float32."""
    blocks = in_blocks(values, DYNAMIC_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]
    codes = torch.bucketize(scaled, dynamic_thresholds(values.device, signed)).to(torch.uint8)
    return codes.view(-1)[: values.numel()].clone(), absmax


def decode_dynamic(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The numbers (n,) float32 of whole blocks: codes (n,) uint8, absmax (n/256,)."""
    levels = dynamic_map(codes.device, signed)[codes.int()]
    return (levels.view(-1, DYNAMIC_BLOCK_SIZE) * absmax[:, None]).view(-1)


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """(n,) -> (ceil(n/block_size), block_size), the last row filled with zeros, which change no absmax."""
    short = -values.numel() % block_size
    return (torch.nn.functional.pad(values, (0, short)) if short else values).view(-1, block_size)
