"""Launches, bytes and FLOPs of one QLoRA step as a GPU would do it, without a GPU: python -m benchmarks.count_step

`counted` executes a step of a small Mistral on a GPU that is pretended (`count_gpu.py`) and sees every launch. Then
`formula` says the same from the shapes alone, launch by launch; a test holds it to the count, kind by kind, exactly,
for every policy of what a block keeps (`fused.Keep`). So what it says of the 7B is what its step would do.

    bytes    of the distinct memory that a launch reads, and that it writes, 16 bits a number where it is not float32;
             caches are not asked, so a product counts its operands once, and what two launches read counts twice
    FLOPs    of products and attention; what is made again in backward counts again

Not counted: copies between host and device (tokens there, loss and norm back), what cuBLAS adds to a product whose
inner dimension it splits, and what FlashAttention holds between its launches.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.count_gpu import BACK_LAUNCHES, GROUPED_LAUNCHES, KINDS, PretendedGPU
from benchmarks.feeds import random_batch
from benchmarks.harness import RESULTS, ROOT, check_result, write_result
from benchmarks.ledger import Cell, random_model, run_config
from benchmarks.shapes import projection_shapes, shape
from benchmarks.table import between
from minilora.adamw import ALIGNED
from minilora.config import ModelConfig
from minilora.errors import UserError
from minilora.fused import Keep
from minilora.loss import whole_rows
from minilora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

SMALL = {  # shapes that are executed: sizes, rows, length, rank
    "grouped heads": (ModelConfig(64, 2, 8, 96, n_heads=4, n_kv_heads=2, vocab_size=96), 2, 3, 16),
    "as many key heads": (ModelConfig(32, 3, 16, 64, n_heads=4, n_kv_heads=4, vocab_size=80), 1, 5, 32),
}
LARGE, ROWS, LENGTH, RANK = "mistral-7b-v0.3", 1, 2048, 16
# What the design set out to reach, keeping the input alone and all; 23 MB are its 8.5 us at 2.7 TB/s.
PLAN = {"beside_mb_per_token": {"INPUT": 30.0, "ALL": 23.0}, "gflop_per_token": {"INPUT": 41.4, "ALL": 30.6}}
PRODUCTS = ("products", "dequantize")  # all else is traffic beside the products
PAGE = ROOT / "docs" / "counts.md"
BEGIN, END = "<!-- by python -m benchmarks.count_step -->", "<!-- end -->"
MOVES = {  # what would make them less
    ("adapters", "dB"): "one product for dy B and dB, which both read dy",
    ("adapters", "x A^T"): "made where x is, in the norm's and SwiGLU's kernels",
    ("elementwise", "SwiGLU"): "the epilogue of gate's and up's product, if it were our kernel",
    ("elementwise", "norms"): "norm(x) kept for backward, which is memory; the residual sum in the next block's",
    ("elementwise", "rotary embedding"): "the epilogue of q's and k's product",
    ("elementwise", "residual sum"): "the next block's norm, which reads the sum",
}
CARRIERS = {"qkv": 1}  # of a group's layers, by whose product dx gets what the adapters add; else the first
TABLES = 4 * 256 + 4 * 16  # what the levels and the map of 8-bit absmax take


# -- by execution ------------------------------------------------------------------------------------------------------


@dataclass
class Sum:
    """Of launches of one kind, or of one sort of them."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __iadd__(self, other: "Sum") -> "Sum":
        self.launches, self.bytes = self.launches + other.launches, self.bytes + other.bytes
        self.flops += other.flops
        return self


def counted(sizes: ModelConfig, rows: int, length: int, rank: int, keep: Keep) -> dict[str, Sum]:
    """By kind, of a step. Triton must interpret."""
    import torch

    from minilora.linear import NF4Linear, slices
    from minilora.train.setup import optimizer_for
    from minilora.train.step import LossScale, backward_of, train_step
    from minilora.train.strategies import apply_strategy, trainable

    run = run_config(Cell("", rows, length, "float16"), rank)
    model = apply_strategy(random_model(sizes, torch.float16), run, [keep] * sizes.n_layers).train()
    batch = random_batch(rows, length, sizes.vocab_size)
    weight = next(layer for layer in model.modules() if isinstance(layer, NF4Linear)).weight
    with PretendedGPU() as gpu:
        optimizer = optimizer_for(trainable(model), run)
        for _ in slices(weight, torch.empty(0, dtype=torch.float16)):  # which makes the kernels' tables
            gpu.launches.clear()
        backward, scale = backward_of(model, optimizer), LossScale.of(torch.float16)
        done = train_step(backward, optimizer, [batch], batch.n_targets, 1e-3, 0.0, scale)
    assert done.updated
    found = {kind: Sum() for kind in KINDS}
    for launch in gpu.launches:
        found[launch.kind] += Sum(1, launch.read + launch.written, launch.flops)
    return found


# -- by formula --------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A step's launches by kind and by what they are for. N tokens in `rows` rows; 2 bytes a number, or 4."""

    sizes: ModelConfig
    rows: int
    length: int
    rank: int
    sums: dict[tuple[str, str], Sum] = field(default_factory=dict)
    weights_stay: bool = False  # decoded, from forward to backward

    def __post_init__(self) -> None:
        sizes, self.n = self.sizes, self.rows * self.length
        shapes = projection_shapes(sizes)
        self.d, self.f = sizes.dim, sizes.hidden_dim
        self.q, self.kv = (heads * sizes.head_dim for heads in (sizes.n_heads, sizes.n_kv_heads))
        names = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "wide": ("gate_proj", "up_proj")}
        groups = names | {"down": ("down_proj",)}
        self.groups = {key: [shapes[name] for name in group] for key, group in groups.items()}  # (out, in)
        padded = [-(-n * self.rank // ALIGNED) * ALIGNED for out_in in shapes.values() for n in out_in]
        self.learned = sizes.n_layers * sum(padded)

    def add(self, kind: str, what: str, n_bytes: int, flops: int = 0, launches: int = 1) -> None:
        self.sums.setdefault((kind, what), Sum()).__iadd__(Sum(launches, n_bytes, flops))

    # Between the products

    def norm(self, adds: bool = False) -> None:
        vectors = 4 if adds else 2
        self.add("elementwise", "norms", 2 * vectors * self.n * self.d + 2 * self.d + 4 * self.n)

    def norm_back(self, residual: bool = True) -> None:
        """And the norm again, for the adapters."""
        vectors = 5 if residual else 4
        self.add("elementwise", "norms", 2 * vectors * self.n * self.d + 2 * self.d + 4 * self.n)

    def rotate(self) -> None:
        for width in (self.q, self.kv):
            self.add("elementwise", "rotary embedding", self.n * (4 * width + 2 * self.sizes.head_dim))

    def attend(self) -> None:
        n_bytes = self.n * (4 * self.q + 4 * self.kv + 4 * self.sizes.n_heads) + 4 * (self.rows + 1)
        self.add("attention", "forward", n_bytes, 4 * self.pairs * self.q)

    def attend_back(self) -> None:
        n_bytes = self.n * (8 * self.q + 8 * self.kv + 4 * self.sizes.n_heads) + 4 * (self.rows + 1)
        grouped = GROUPED_LAUNCHES if self.q != self.kv else 0
        self.add("attention", "backward", n_bytes, 10 * self.pairs * self.q, BACK_LAUNCHES + grouped)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        return self.rows * self.length * (self.length + 1) // 2

    # Products of layers with one input, as in projections.py

    def decode(self, out: int, in_: int, rank: int = 0) -> None:
        """rank: of the B that is copied behind the weight's rows."""
        n = out * in_
        blocks = n // BLOCK_SIZE
        packed = n // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 + TABLES
        self.add("dequantize", "NF4 to 16 bits", packed + 2 * n + 4 * out * rank)

    def forward(self, group: str) -> None:
        n, r, shapes = self.n, self.rank, self.groups[group]
        in_, ranks = shapes[0][1], r * len(shapes)
        self.add("adapters", "x A^T", 2 * (n * in_ + ranks * in_ + n * ranks), 2 * n * in_ * ranks)
        if group == "o":
            self.add("adapters", "attention's output, copied beside room", 4 * n * in_)
        if self.weights_stay:
            self.copy_a(group)
        for out, _ in shapes:
            self.add("adapters", "x A^T, copied behind x", 4 * n * r)
            self.decode(out, in_, r)
            wide = in_ + r
            self.add("products", "frozen weights", 2 * (n * wide + out * wide + n * out), 2 * n * wide * out)

    def back(self, group: str) -> None:
        """dx, with A as further rows of one of the weights."""
        n, shapes = self.n, self.groups[group]
        ranks = self.rank * len(shapes)
        for i, (out, in_) in enumerate(shapes):
            joined = ranks if i == CARRIERS.get(group, 0) else 0
            if not self.weights_stay:
                self.decode(out, in_)
                if joined:
                    self.copy_a(group)
            onto, tall = n * in_ if i else 0, out + joined
            self.add("products", "frozen weights", 2 * (n * in_ + onto + tall * in_ + n * tall), 2 * n * in_ * tall)

    def copy_a(self, group: str) -> None:
        shapes = self.groups[group]
        self.add("adapters", "A, copied below the weight", 4 * self.rank * len(shapes) * shapes[0][1])

    def learn(self, group: str) -> None:
        """dy B, then the gradients of A and B."""
        n, r, shapes = self.n, self.rank, self.groups[group]
        for out, _ in shapes:
            self.add("adapters", "dy B", 2 * (n * out + out * r + n * r), 2 * n * out * r)
            self.add("adapters", "dB", 8 * out * r + 2 * n * (out + r), 2 * n * out * r)
        in_, ranks = shapes[0][1], r * len(shapes)
        self.add("adapters", "dA", 8 * in_ * ranks + 2 * n * (in_ + ranks), 2 * n * in_ * ranks)

    # The step, in the order of fused.py

    def fill(self, has: Keep | None) -> None:
        """What lies between the products, but for what backward has of it; None: forward."""
        n_kept = -1 if has is None else int(has)
        if n_kept < Keep.HEADS:
            self.norm()
            self.forward("qkv")
            self.rotate()
        if n_kept < Keep.ATTENTION:
            self.attend()
            self.forward("o")
            self.norm(adds=True)
        if n_kept < Keep.ALL:
            if n_kept >= Keep.ATTENTION:
                self.norm()
            self.forward("wide")

    def block(self, keep: Keep, is_first: bool) -> None:
        n, d, f = self.n, self.d, self.f
        self.weights_stay = keep == Keep.WEIGHTS
        self.fill(None)
        self.add("elementwise", "SwiGLU", 6 * n * f)
        self.forward("down")
        self.add("elementwise", "residual sum", 6 * n * d)
        self.fill(keep)
        self.back("down")
        self.add("elementwise", "SwiGLU", 12 * n * f)
        self.learn("down")
        self.back("wide")
        self.learn("wide")
        self.norm_back()
        self.back("o")
        self.learn("o")
        self.attend_back()
        self.rotate()
        self.learn("qkv")
        if is_first:  # nothing before it learns
            self.norm()
        else:
            self.back("qkv")
            self.norm_back()

    def ends(self) -> None:
        """What a step does once: embedding, angles, the last norm, loss, AdamW."""
        n, d, half, v = self.n, self.d, self.sizes.head_dim // 2, self.sizes.vocab_size
        self.add("elementwise", "embedding", 4 * n * d + 8 * n)
        self.add("elementwise", "angles", 32 * n + 40 * half + 32 * n * half, launches=12)
        self.norm()
        self.norm_back(residual=False)
        at_most = whole_rows(n, v, 2)
        for start in range(0, n, at_most):
            rows = min(at_most, n - start)
            for _ in range(2):
                self.add("products", "head", 2 * (rows * d + v * d + rows * v), 2 * rows * v * d)
            self.add("loss", "logits to gradients", 4 * rows * v + 12 * rows)
            self.add("loss", "sums", 4 * rows + 4 + 12, launches=2)
        self.add("loss", "sums", 4)
        self.add("loss", "scaled in backward", 4 * n * d + 4)
        self.add("elementwise", "numbers of one", 4 + 8 + 4 + 8 + 12 + 16 + 16, launches=7)
        p = self.learned
        self.add("optimizer", "zero, cast, norm", 4 * p + 6 * p + 4 * p + 4 + 16, launches=5)
        self.add("optimizer", "AdamW", 28 * p)


def formula(sizes: ModelConfig, rows: int, length: int, rank: int, keep: Keep) -> dict[tuple[str, str], Sum]:
    """By kind and by what the launches are for."""
    step = Step(sizes, rows, length, rank)
    for layer in range(sizes.n_layers):
        step.block(keep, layer == 0)
    step.ends()
    return step.sums


def by_kind(sums: dict[tuple[str, str], Sum]) -> dict[str, Sum]:
    found = {kind: Sum() for kind in KINDS}
    for (kind, _), part in sums.items():
        found[kind] += part
    return found


# -- the command -------------------------------------------------------------------------------------------------------


def of_large() -> dict[str, Any]:
    """What the formula says of the 7B, by policy, a token's share of it."""
    tokens, policies = ROWS * LENGTH, dict[str, Any]()
    for keep in Keep:
        sums = formula(shape(LARGE), ROWS, LENGTH, RANK, keep)
        parts = {f"{kind}: {what}": _figures(part, tokens) for (kind, what), part in sums.items()}
        kinds = {kind: _figures(part, tokens) for kind, part in by_kind(sums).items()}
        policies[keep.name] = {
            "launches": sum(part.launches for part in sums.values()),
            "gflop_per_token": sum(part.flops for part in sums.values()) / tokens / 1e9,
            "beside_mb_per_token": sum(kinds[kind]["mb_per_token"] for kind in KINDS if kind not in PRODUCTS),
            "kinds": kinds,
            "parts": parts,
        }
    return {"shape": LARGE, "batch": [ROWS, LENGTH], "rank": RANK, "policies": policies, "plan": PLAN}


def _figures(part: Sum, tokens: int) -> dict[str, Any]:
    mb, gflop = part.bytes / tokens / 1e6, part.flops / tokens / 1e9
    return {"launches": part.launches, "mb_per_token": mb, "gflop_per_token": gflop}


def told(large: dict[str, Any]) -> str:
    """The page's tables."""
    policies, plan = large["policies"], large["plan"]
    lines = ["| a step keeps | launches | GF a token | plan | MB a token beside the products | plan |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in (keep.name for keep in Keep):
        figures = policies[name]
        flops, mb = (plan[key].get(name, "") for key in ("gflop_per_token", "beside_mb_per_token"))
        ours = f"{figures['gflop_per_token']:.1f} | {flops} | {figures['beside_mb_per_token']:.1f}"
        lines.append(f"| {name.lower()} | {figures['launches']:,} | {ours} | {mb} |")
    ends = [policies[name] for name in ("INPUT", "ALL")]
    lines += ["", "| launches for | MB a token, keeping the input | keeping all | what would make it less |"]
    lines += ["|---|---|---|---|"]
    for name, part in sorted(ends[0]["parts"].items(), key=lambda item: -item[1]["mb_per_token"]):
        kind, what = name.split(": ")
        if part["mb_per_token"] >= 0.1:
            shares = " | ".join(f"{end['parts'][name]['mb_per_token']:.1f}" for end in ends)
            lines.append(f"| {name} | {shares} | {MOVES.get((kind, what), '')} |")
    return "\n".join(lines)


def differences(name: str, keep: Keep) -> list[str]:
    """Where the count of a small shape and the formula differ, by kind."""
    count, said = counted(*SMALL[name], keep), by_kind(formula(*SMALL[name], keep))
    return [f"{name}, {keep.name}, {kind}: {count[kind]} {said[kind]}" for kind in KINDS if count[kind] != said[kind]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where a count is not what the formula says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count_step", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="instead of results/count_step.json, and no page is written")
    parsed = parser.parse_args(argv)
    try:
        check_result("count_step", parsed.out, parts=False)
    except UserError as error:
        print(f"count_step: {error}", file=sys.stderr)
        return 1
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    wrong = [line for name in SMALL for keep in Keep for line in differences(name, keep)]
    large = of_large()
    write_result("count_step", {"counted": large, "executed": list(SMALL), "differences": wrong}, parsed.out)
    if not parsed.out:
        written = json.loads((RESULTS / "count_step.json").read_text())
        PAGE.write_text(between(PAGE.read_text(), told(written["counted"]), BEGIN, END))
    print(told(large))
    for line in wrong:
        print(f"count_step: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
