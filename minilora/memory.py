"""Where the memory goes: bytes by owner, predicted from a configuration and measured while a step runs.

NF4 weight: 1/2 byte; absmax: 4/64, or with double quantization 1/64 + 4/(64 * 256) bytes a weight
adapter: 4 bytes a parameter, as much again for its gradient, twice as much for Adam's two moments, or 2 + 8/256 bytes
activations: what forward keeps for backward; scratch: what comes and goes within backward

`StepPlan.predict` is the largest of some moments of a step, and of what else a run does in between (`forward`):

    loss     activations of all blocks, and a tile of logits
    last     without logits, but with the last block's MLP in backward, whose products are the widest
    tied     no activations, but the gradient of a tied head that waits for the embedding's

What a real step takes, benchmarks/watch.py sees, without these formulas.
"""

import resource
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import dropwhile
from math import ceil, inf, prod
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from minilora import nf4
from minilora.adamw import PAGE, FlatAdamW, state_bytes
from minilora.backend import dtype_name, product_dtype
from minilora.checkpoint.adapter_parts import expected_shapes
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.config import LoraConfig, ModelConfig, Optimizer, PrefixConfig
from minilora.fused import Keep
from minilora.kv_cache import n_slots
from minilora.linear import SLICE_BYTES, NF4Linear
from minilora.lora import Added, LoRALinear
from minilora.loss import tile, whole_rows
from minilora.nf4 import BLOCK_SIZE, CPU, NESTED_BLOCK_SIZE
from minilora.projections import WHOLE

DenseDtype = Literal["float32", "bfloat16", "float16"]
Storage = DenseDtype | Literal["nf4", "nf4 double-quantized"]
_DENSE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CGROUPS = (  # what a container may have, has, and has of files: version 2 and 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
)


# -- predicted ---------------------------------------------------------------------------------------------------------


def storage_of(dtype: torch.dtype, double_quant: bool | None) -> tuple[Storage, DenseDtype]:
    """How the blocks' linear layers are stored where `dtype` is computed in, and how the rest is.

    double_quant: of NF4, whether absmax are in 8 bits; None of plain weights
    """
    dense = cast(DenseDtype, dtype_name(dtype))
    return dense if double_quant is None else "nf4 double-quantized" if double_quant else "nf4", dense


def predict(
    config: ModelConfig, storage: Storage, dense: DenseDtype, adapter: LoraConfig | PrefixConfig | None
) -> dict[str, int]:
    """Bytes by owner of a model at rest and of what training adapters adds; activations are not in it.

    storage: of the blocks' linear layers; dense: of embeddings, head and norms
    """
    sizes = [prod(spec.shape) for spec in tensor_specs(config) if spec.is_projection]
    owners: dict[str, int] = {}
    if storage in _DENSE_BYTES:
        owners["linear weights"] = sum(sizes) * _DENSE_BYTES[storage]
    else:
        blocks = [-(-n // BLOCK_SIZE) for n in sizes]
        nested = storage == "nf4 double-quantized"
        owners["packed weights"] = sum(-(-n // 2) for n in sizes)
        owners["absmax"] = sum(b + 4 * -(-b // NESTED_BLOCK_SIZE) + 4 if nested else 4 * b for b in blocks)
    owners["embeddings, head, norms"] = (config.n_parameters - sum(sizes)) * _DENSE_BYTES[dense]
    if adapter is None:
        return owners
    shapes_added = expected_shapes(adapter, config)
    learned = sum(map(prod, shapes_added.values()))  # numbers
    # DoRA has a number of each row that is fixed, beside the one that learns.
    fixed = sum(n for name, (n, *_) in shapes_added.items() if name.endswith("magnitude_vector"))
    return owners | {"adapters": 4 * (learned + fixed), "gradients": 4 * learned, "optimizer": 8 * learned}


@dataclass(frozen=True)
class Learned:
    """How many numbers learn: `n` in all, `blocks` of each block; `head` of what the loss multiplies by."""

    n: int
    blocks: tuple[int, ...]
    embedding: int
    norm: int
    head: int

    @staticmethod
    def of(config: ModelConfig, names: Container[str] | None = None) -> "Learned":
        """Those of the parameters called `names`, or of all. A tied head is the embedding."""
        return Learned._of(config, {s.name: s.shape for s in tensor_specs(config) if names is None or s.name in names})

    @staticmethod
    def of_lora(config: ModelConfig, lora: LoraConfig) -> "Learned":
        """Those of adapters, and of the modules that learn whole beside them."""
        return Learned._of(config, expected_shapes(lora, config))

    @staticmethod
    def _of(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> "Learned":
        of = {name: prod(shape) for name, shape in shapes.items()}
        blocks = [0] * config.n_layers
        for name, n in of.items():
            if name.startswith("layers."):
                blocks[int(name.split(".")[1])] += n
        head = of.get("embed_tokens.weight" if config.tied_embeddings else "lm_head.weight", 0)
        embedding, norm = of.get("embed_tokens.weight", 0), of.get("norm.weight", 0)
        return Learned(sum(of.values()), tuple(blocks), embedding, norm, head)

    @property
    def reached(self) -> tuple[int, ...]:
        """The blocks that backward goes through: from the lowest on that learns, or all for the embedding's sake."""
        return self.blocks if self.embedding else tuple(dropwhile(lambda n: n == 0, self.blocks))


@dataclass
class StepPlan:
    """What a training step's memory depends on, and what of it follows. Sizes are bytes.

    adapter: None where weights of the base learn: those of `learned`, or all if that is None
    rows, length: of a micro-batch; targets: how many of its tokens are, None: all
    sees: a row falls into causal runs, or a mask says who sees whom (`visible.causal_runs`)
    masks: bytes of those that a CPU's pieces have (`visible.Pieces`)
    paged: the optimizer's state is in the host's memory but for two pages
    ahead: a weight is decoded while another is multiplied (ahead.py)
    keep: of each fast block; none: all of them everything or, with checkpointing, their input

    What follows of them:

    d, f, q, kv: how many numbers all tokens' x, gate, q and k are; mask: and a T x T mask of all rows
    lora, before: the adapters, the prefix's tokens; block_norms: norms of blocks learn
    adapted: each block's layers with an adapter, by name; block_weights: numbers in the linear layers of a block
    base, learns: what of the base learns, what at all; None: nothing of it, a prefix
    stored, computed: bytes of a number, in the residual stream and in products; cast: they differ
    fused: the fast block serves; keeps: `keep`, or what stands for none; decodes_ahead: `ahead`, where it can be
    """

    config: ModelConfig
    storage: Storage
    dtype: DenseDtype
    adapter: LoraConfig | PrefixConfig | None
    rows: int
    length: int
    targets: int | None = None
    sees: Literal["runs", "mask"] = "runs"
    masks: int = 0
    checkpointing: bool = False
    keep: tuple[Keep, ...] = ()
    learned: Learned | None = None
    device: torch.device = CPU
    optimizer: Optimizer = "adamw"
    paged: bool = False
    ahead: bool = False

    def __post_init__(self) -> None:
        config, self.tokens = self.config, self.rows * self.length
        self.d, self.f = self.tokens * config.dim, self.tokens * config.hidden_dim
        self.q, self.kv = (self.tokens * n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.lora = self.adapter if isinstance(self.adapter, LoraConfig) else None
        self.before = self.adapter.n_tokens if isinstance(self.adapter, PrefixConfig) else 0
        self.base = None if self.adapter else self.learned or Learned.of(config)
        self.learns = Learned.of_lora(config, self.lora) if self.lora else self.base
        lora, of_blocks = self.lora, [spec for spec in tensor_specs(config) if spec.layer >= 0]
        self.block_weights = sum(prod(spec.shape) for spec in of_blocks if spec.is_projection) // config.n_layers
        self.adapted: list[dict[str, TensorSpec]] = [{} for _ in range(config.n_layers)]
        for spec in of_blocks:
            if lora and spec.is_projection and lora.adapts(spec.module):
                self.adapted[spec.layer][spec.module.rpartition(".")[2]] = spec
        self.block_norms = any(lora.saves(spec.module) for spec in of_blocks) if lora else False
        self.fused = lora is not None and lora.dropout == 0 and not lora.dora and not self.block_norms
        self.on_cpu, self.stored = self.device.type == "cpu", _DENSE_BYTES[self.dtype]
        product = product_dtype(torch.empty(0, dtype=getattr(torch, self.dtype))).itemsize
        self.computed = product if self.on_cpu else self.stored
        self.cast = self.stored != self.computed
        self.mask = self.tokens * (self.length + self.before) if self.sees == "mask" else 0
        self.keeps = self.keep or (Keep.INPUT if self.checkpointing else Keep.ALL,) * config.n_layers
        decodes = self.storage not in _DENSE_BYTES and not (self.fused and set(self.keeps) == {Keep.WEIGHTS})
        self.decodes_ahead = self.ahead and decodes and not self.on_cpu

    def predict(self, in_between: Sequence[dict[str, int]] = ()) -> dict[str, int]:
        """By owner, at the moment of the step when they are most, the optimizer's moments there already.

        in_between: what evaluation takes besides, see `forward`
        For the fast block on a CPU, tensor by tensor; for the plain one (dropout, or all weights learn) the scratch is
        an estimate. On a GPU the allocator's rounding comes on top.
        """
        config, n_layers, base, learns = self.config, self.config.n_layers, self.base, self.learns
        rest = predict(config, self.storage, self.dtype, self.adapter)
        if base is not None:
            rest["gradients"] = 4 * base.n
        rest["optimizer"] = state_bytes(self.optimizer, 2 * PAGE if self.paged else rest["gradients"] // 4)
        reached = learns.reached if learns else (1,) * n_layers
        lowest_layer = n_layers - len(reached)
        whole = [self.block(lowest_layer + i, n > 0) for i, n in enumerate(reached)]
        kept = [self.kept(lowest_layer + i, block) for i, block in enumerate(whole)]
        of_last = self.again(whole[-1], kept[-1]) if kept else {}
        blocks = add_up(*kept)
        masks = self.masks + len(set(config.windows)) * self.mask
        shared = {"attention": self.tokens * config.head_dim * self.stored + masks}  # cos, sin, and who sees whom
        head = 4 * learns.head if learns and config.tied_embeddings else 0
        # Copies of what learns, in the products' dtype (adamw.py).
        rest["scratch"] = self.computed * learns.n if learns and self.fused and self.computed != 4 else 0
        rest["scratch"] += 2 * self.computed * config.dim * config.hidden_dim if self.decodes_ahead else 0
        moments: list[dict[str, int]] = [
            add_up(shared, blocks, self.loss()),
            add_up(shared, blocks, of_last, {"scratch": head}),
            {"scratch": 2 * head},
            *in_between,
        ]
        worst = max(moments, key=lambda owners: sum(owners.values()))
        return {owner: n for owner, n in add_up(rest, worst).items() if n}

    def block(self, layer: int = 0, learns: bool = True) -> dict[str, int]:
        """What a block keeps for backward: what fused.py says, or what autograd takes of the plain block.

        The plain block's norms keep their input in float32, dropout its mask and what it let through, DoRA the inputs
        of A and what it multiplies. learns: something of the block does; else gradients only pass through it
        """
        number, lora = self.computed if self.fused else self.stored, self.lora
        repeated = self.sees == "mask" and not self.on_cpu  # k and v (attention.py)
        heads = 2 * self.q + 2 * (self.q if repeated else self.kv)  # q, output, k, v
        heads += 2 * self.before * self.rows * self.config.head_dim * self.config.n_kv_heads
        kept = {
            "residual stream": 2 * self.d * self.stored if self.fused or self.stored == 4 else 0,
            "norms": 2 * self.d * 4 if not self.fused and self.stored != 4 else 0,
            "attention": (heads + self.mask) * number + 4 * self.tokens * self.config.n_heads,
            "mlp": self.f * self.stored * (2 if self.fused else 3),
        }
        if self.base and learns:  # x / rms and that times the weight, and down's input
            return kept | {"norms": 4 * self.d * 4, "mlp": self.f * self.stored * 4}
        if lora is None:
            return kept
        if self.block_norms:
            kept["norms"] = 4 * self.d * 4
        here = self.adapted[layer]
        outs, ins = ({t: spec.shape[i] for t, spec in here.items()} for i in (0, 1))
        let_through = sum(ins.values()) if lora.dropout else 0
        kept_of_dora = 0
        if lora.dora:  # what m multiplies, and A's inputs, of which layers share some
            inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
            kept_of_dora = sum(outs.values()) + sum({inputs.get(t, t): n for t, n in ins.items()}.values())
        reduced = sum(lora.rank_of(spec.module) for spec in here.values())
        return kept | {"adapter inputs": self.tokens * number * (reduced + 2 * let_through + kept_of_dora)}

    def kept(self, layer: int, whole: dict[str, int]) -> dict[str, int]:
        """What of a `whole` block stays from its forward to its backward: see `fused.Keep`, or its input alone."""
        keep, x = self.keeps[layer], self.d * self.stored
        if keep == Keep.WEIGHTS and self.fused and _DENSE_BYTES.get(self.storage) != self.computed:
            assert self.lora is not None
            ranks = [(self.lora.rank_of(spec.module), sum(spec.shape)) for spec in self.adapted[layer].values()]
            # On a GPU B lies behind the rows and A below them (projections.py).
            grown = 0 if self.on_cpu else sum(rank * sizes for rank, sizes in ranks if rank % WHOLE == 0)
            return whole | {"decoded weights": (self.block_weights + grown) * self.computed}
        if keep >= Keep.ALL:
            return whole
        if not self.fused:
            return {"residual stream": x}
        number = self.computed
        logsumexp = 0 if self.sees == "mask" else 4 * self.tokens * self.config.n_heads
        attention = (0, self.q * number + logsumexp, whole["attention"])[keep]
        here = ("down_proj", "o_proj", "q_proj", "k_proj", "v_proj")[: (1, 2, 5)[keep]]
        assert self.lora is not None
        specs = [spec for name, spec in self.adapted[layer].items() if name in here]
        reduced = self.tokens * number * sum(self.lora.rank_of(spec.module) for spec in specs)
        stream = x * (1 if keep == Keep.INPUT else 2)
        return {"residual stream": stream, "attention": attention, "adapter inputs": reduced}

    def again(self, whole: dict[str, int], kept: dict[str, int]) -> dict[str, int]:
        """What is alive besides in backward of a block: its scratch, and what was not kept and is made again."""
        makes_gates = self.fused and "mlp" not in kept
        in_scratch = {"mlp": 0} if makes_gates and not self.cast else {}  # which has them in the products' dtype alone
        made = kept | whole | in_scratch
        return add_up({"scratch": self.scratch(makes_gates)}, made, {owner: -n for owner, n in kept.items()})

    def scratch(self, makes_gates: bool) -> int:
        """What is alive besides in backward of a block's MLP: at down_proj, at the other two, or at its norm.

        makes_gates: gate and up were not kept
        """
        d, f, stored, computed = self.d, self.f, self.stored, self.computed
        decoded = self.decoded()
        if not self.fused:
            of_weight = 4 * self.config.dim * self.config.hidden_dim if self.base else 0  # a gradient not yet added
            return (d + f) * stored + max(f * stored, of_weight) + decoded
        gates = 2 * f if self.cast or makes_gates else 0  # in the products' dtype
        if not self.on_cpu:
            # dh, and the rest where gate and up were; then d_gate, d_up, and of norm(x) the gradient, x's, and itself
            wide = (gates or f) * computed + d * computed + max(decoded, d * (computed + stored))
            return d * stored + max((f + gates) * computed + decoded, wide)
        down = (3 * f + gates + (d if self.cast else 0)) * computed + decoded  # silu(g) u, silu(g), dh; dy
        wide = (2 * f + 2 * d) * computed  # d_gate, d_up; norm(x) and its gradient
        norm = 4 * d * (1 + (computed != 4) + (stored != 4))  # what it multiplies, and in float32
        return d * stored + max(down, wide + max(decoded, norm))

    def forward(self, new: int | None = None) -> dict[str, int]:
        """What a pass without gradients takes: the widest of the MLP, attention and loss; an estimate.

        new: tokens to be generated from prompts of this length, so with a KV cache; None for a loss
        """
        config, stored = self.config, self.stored
        slots = [0 if new is None else n_slots(window, self.length + new) for window in config.windows]
        keys, cast = self.rows * (max(self.length, *slots) + self.before), self.computed if self.cast else 0
        padded = new is not None and self.rows > 1  # prompts of unlike lengths
        mask = self.tokens * (self.length + self.before) if padded else self.mask
        lora = replace(self.lora or LoraConfig(), modules_to_save=())  # without gradients a head that learns has none
        frozen = replace(self, adapter=lora if self.lora or self.adapter is None else self.adapter, ahead=False)
        mlp = (2 * self.d + (3 if self.lora is None else 4) * self.f) * stored + self.f * cast + frozen.decoded()
        repeated = 0 if self.on_cpu else config.n_heads
        heads = 2 * (config.n_kv_heads + repeated) * config.head_dim  # k and v, and repeated
        attention = (2 * self.d + 3 * self.q + keys * heads + mask) * stored + self.q * cast
        last = frozen.loss() if new is None else {"logits": self.rows * config.vocab_size * 4}
        of_slot = 2 * config.n_layers // len(slots) * self.rows * config.n_kv_heads * config.head_dim * stored
        cache = {"KV cache": sum(slots) * of_slot}
        shared = cache | {"attention": self.tokens * config.head_dim * stored + mask}
        return add_up(shared, max({"scratch": max(mlp, attention)}, last, key=lambda owners: sum(owners.values())))

    def loss(self) -> dict[str, int]:
        """The final norm's input and output, and the loss's tile of logits with what becomes of it (loss.py)."""
        dim, columns, what = self.config.dim, self.config.vocab_size, self.learns
        head, norm = (what.head, what.norm) if what else (0, 0)
        if self.on_cpu:
            targets = self.tokens if self.targets is None else self.targets
            rows, columns = tile(targets, columns, head > 0)
            number = 4 if self.computed == 4 else 2 * self.computed + 4  # the product, in float32, and again in 16 bits
            in_work = rows * (columns * number + dim * (4 + self.computed))  # and h's gradient, the label's row
            in_work += dim * self.computed * (rows + columns) if self.cast else 0
            hidden = (self.tokens + targets) * dim * self.stored  # also of the targets alone
        else:
            targets, rows, hidden = self.tokens, whole_rows(self.tokens, columns, self.stored), self.d * self.stored
            in_work = rows * columns * self.stored
            if head:  # a tile's h where it is a target; the head in h's dtype
                in_work += rows * dim * self.stored + (head * self.stored if self.stored != 4 else 0)
        hidden += 4 * self.d if norm else 0  # x / rms
        back = targets * dim * self.stored  # h's gradient: backward makes it and the head's anew, scaled
        logits = max(in_work, 4 * head + (0 if self.on_cpu else back)) + 4 * head + back
        kept = {"final hidden": hidden, "logits": logits}
        # The last block's output, which is the norm's input: by autograd, not fused, in float32.
        as_it_is = self.stored == 4 or (self.fused and not norm)
        return add_up(kept, {"residual stream": self.d * self.stored} if as_it_is else {"final hidden": 4 * self.d})

    def decoded(self) -> int:
        """The slice of a frozen weight, the largest, that is in work at a time, in the products' dtype, and what
        decoding takes."""
        size = self.config.dim * self.config.hidden_dim
        if self.adapter is None or _DENSE_BYTES.get(self.storage) == self.computed:
            return 0
        if not self.on_cpu:  # whole, and by a kernel
            return 0 if self.decodes_ahead else size * self.computed
        in_work = size // ceil(size * self.computed / SLICE_BYTES)
        decoding = 6 * min(nf4.chunk_of(self.device), in_work) + 4 * size // BLOCK_SIZE
        return in_work * self.computed + (0 if self.storage in _DENSE_BYTES else decoding)


def add_up(*parts: dict[str, int]) -> dict[str, int]:
    """Owner by owner."""
    owners = dict.fromkeys(owner for part in parts for owner in part)
    return {owner: sum(part.get(owner, 0) for part in parts) for owner in owners}


def free_bytes(device: torch.device) -> float:
    """What a run can have: a GPU's free memory; on a CPU what the system, or a container's limit, leaves, and what this
    process has of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = [n_bytes for name, n_bytes in _proc_bytes("meminfo").items() if name == "MemAvailable"]
    for folder, limit, used, cache in CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # there is none; or its limit is "max"
            found = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            limit_bytes, used_bytes = (int(Path(folder, name).read_text()) for name in (limit, used))
            available.append(limit_bytes - used_bytes + int(found[cache]))  # which the system takes back
    return min(available) + private_bytes() if available else inf


def one_line(predicted: Mapping[str, int]) -> str:
    """The prediction in one line."""
    shares = ", ".join(f"{owner} {as_text(n)}" for owner, n in predicted.items())
    return f"memory: {as_text(sum(predicted.values()))} predicted at its peak: {shares}"


def as_text(n_bytes: float) -> str:
    """In GB (1e9 bytes), small numbers in MB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


# -- measured ----------------------------------------------------------------------------------------------------------


def measure(model: nn.Module, optimizer: FlatAdamW | None = None) -> dict[str, int]:
    """Bytes by owner of a model's tensors, counted once each, with the owners that `predict` has."""
    return add_up(*named_storages(model, optimizer).values())


def named_storages(model: nn.Module, optimizer: FlatAdamW | None = None) -> dict[int, dict[str, int]]:
    """Bytes by owner of a model's tensors, their gradients and an optimizer's state, by the address of the storage that
    they lie in, which several may share."""
    owned = list[tuple[str, Tensor | None]]()
    for name, module in model.named_modules():
        owner = "embeddings, head, norms"
        if isinstance(module, NF4Linear):
            absmax = (module.absmax, module.nested_absmax, module.nested_offset)
            owned += [("packed weights", module.packed), *(("absmax", part) for part in absmax)]
        elif isinstance(module, Added):
            owner = "adapters"
            owned += [(owner, module.squared_rows)] if isinstance(module, LoRALinear) else []
        elif isinstance(module, nn.Linear) and name.startswith("layers."):
            owner = "linear weights"
        for parameter in module.parameters(recurse=False):
            owned += [(owner, parameter), ("gradients", parameter.grad)]
    for moments in optimizer.state.values() if optimizer else ():
        owned += [("optimizer", moment) for moment in moments.values()]
    found = dict[int, dict[str, int]]()
    for owner, part in {part.data_ptr(): (owner, part) for owner, part in owned if part is not None}.values():
        owners = found.setdefault(part.untyped_storage()._cdata, {})
        owners[owner] = owners.get(owner, 0) + part.nbytes
    return found


def private_bytes() -> int:
    """Memory that is this process's own (RssAnon): without mapped files, which the system can take back at any time."""
    return _proc_bytes("self/status").get("RssAnon") or max_rss_bytes()


def _proc_bytes(file: str) -> dict[str, int]:
    """What a file of /proc says of memory; nothing where there is none."""
    path = Path("/proc", file)
    lines = (line.split() for line in path.read_text().splitlines()) if path.exists() else ()
    return {name[:-1]: 1024 * int(rest[0]) for name, *rest in lines if rest[1:] == ["kB"]}


def max_rss_bytes() -> int:
    """The most memory this process had resident, mapped files included, since `PeakMemory.start` or ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class PeakMemory:
    """The most private memory between any `start` and `note`, and on a GPU the allocator's own peaks.

    Linux counts a process's largest resident size and begins anew when told so; mapped files are taken off. Where it
    cannot be told, what is private at the moments of `note` counts.
    """

    device: torch.device
    private: int = 0
    resident: int = 0  # the most before the count began anew, which resets the system's own
    device_allocated: int = 0
    device_reserved: int = 0
    _counts_anew: bool = False

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.resident = max(self.resident, max_rss_bytes())
        with suppress(OSError):
            self._counts_anew = Path("/proc/self/clear_refs").write_text("5") == 1

    def note(self) -> None:
        status = _proc_bytes("self/status")
        resident = status["VmHWM"] - status["RssFile"] - status["RssShmem"] if self._counts_anew else 0
        self.private = max(self.private, status.get("RssAnon") or max_rss_bytes(), resident)
        if self.device.type == "cuda":
            self.device_allocated = max(self.device_allocated, torch.cuda.max_memory_allocated(self.device))
            self.device_reserved = max(self.device_reserved, torch.cuda.max_memory_reserved(self.device))

    def now_bytes(self) -> int:
        """What counts on this device: its allocated memory, or a CPU process's private memory."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else private_bytes()

    def summary(self) -> dict[str, int]:
        of_device = {"device_allocated": self.device_allocated, "device_reserved": self.device_reserved}
        own = {"private": self.private, "max_rss": max(self.resident, max_rss_bytes())}
        return own | (of_device if self.device_reserved else {})
