"""Logits to their gradient, in place, and to losses: z -> softmax(z) - onehot(label), loss = log sum exp(z) - z[label].

A program takes one row and goes over its V columns twice, block by block: it reads the largest logit and the sum, then
reads again, from the L2 as a rule, and writes. In the first pass each lane keeps a maximum m and a sum s of its own, so
that nothing is exchanged within the loop; one exponential a logit is enough, for of m and z one is the new maximum:

    e = exp(-|z - m|);    z > m:  s = s e + 1, m = z;    else  s = s + e

After the loop the lanes' pairs are one: M = max m, S = sum s exp(m - M).

Bytes moved a logit of 16 bits: 2 read, 2 read again, 2 written. Float32 inside, whatever the logits are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minilora.kernels.nf4_dequantize import is_plain, told
from minilora.kernels.nf4_table import on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 4096  # logits: 16 a thread
WARPS = 8


def softmax_gradient_(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """What `softmax_gradient.softmax_gradient_` does, with the same arguments.

    Raises ValueError where logits (N, V) are not contiguous float32, float16 or bfloat16, or labels (N,) not contiguous
    int64 beside them, and as `on` does.
    """
    if logits.dim() != 2 or logits.dtype not in DTYPES or not is_plain(logits):
        raise ValueError(f"logits must be (N, V), contiguous, float32, float16 or bfloat16; they are {told(logits)}")
    n_rows, n_columns = logits.shape
    fits = labels.shape == (n_rows,) and labels.device == logits.device
    if not fits or labels.dtype != torch.int64 or not is_plain(labels):
        raise ValueError(f"labels must be {n_rows} contiguous int64 on {logits.device}; they are {told(labels)}")
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    with on(logits.device):
        softmax_gradient_kernel[(n_rows,)](
            logits,
            labels,
            losses,
            n_columns,
            ignore=ignore,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    torch.autograd.graph.increment_version(logits)
    return losses


@triton.jit
def softmax_gradient_kernel(logits, labels, losses, n_columns, ignore: tl.constexpr, BLOCK: tl.constexpr):
    """logits (N, n_columns) in place, losses (N,) float32; a program has a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_columns
    label = tl.load(labels + row)
    if label == ignore:
        for start in range(0, n_columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(logits + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=at < n_columns)
        tl.store(losses + row, 0.0)
    else:
        is_column = (label >= 0) & (label < n_columns)
        of_label = tl.load(logits + label, mask=is_column, other=float("nan")).to(tl.float32)
        column = tl.where(is_column, label, -1).to(tl.int32)  # to compare in 32 bits
        largest = tl.full((BLOCK,), -3.4e38, tl.float32)  # finite: of -inf less -inf there is no exponential
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(logits + at, mask=at < n_columns, other=float("-inf")).to(tl.float32)
            shrunk = tl.exp(-tl.abs(z - largest))
            sums = tl.where(z > largest, sums * shrunk + 1.0, sums + shrunk)
            largest = tl.maximum(largest, z)
        of_row = tl.max(largest, axis=0)
        total = tl.sum(sums * tl.exp(largest - of_row), axis=0)
        inverse = 1.0 / total
        tl.store(losses + row, tl.log(total) - (of_label - of_row))
        for start in range(0, n_columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(logits + at, mask=at < n_columns, other=float("-inf")).to(tl.float32)
            p = tl.exp(z - of_row) * inverse
            p = tl.where(at == column, p - 1.0, p)
            tl.store(logits + at, p.to(logits.dtype.element_ty), mask=at < n_columns)
