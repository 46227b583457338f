"""What a training step takes, predicted from its configuration: bytes by owner at the moment when they are most.

activations: what forward keeps for backward; scratch: what comes and goes within backward

`StepPlan.predict` is the largest of some moments of a step, and of what else a run does in between (`forward_bytes`):

    loss     activations of all blocks, and a tile of logits
    last     without logits, but with the last block in backward: its MLP, or attention, if runs are many or heads wide
    first    no activations, but the whole gradient of an embedding that learns, and of a tied head, which waits for it

Beside them lie the weights, what learns, its gradients, and the optimizer's state: 8 bytes a number that learns, or
2 + 8/256 (`memory_at_rest.py`).
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

import torch

from minilora import nf4
from minilora.adamw import PAGE, state_bytes
from minilora.backend import product_dtype_of
from minilora.checkpoint.names import tensor_specs
from minilora.config import LoraConfig, ModelConfig, Optimizer, PrefixConfig
from minilora.fused import Keep
from minilora.kv_cache import n_slots
from minilora.linear import SLICE_BYTES
from minilora.loss import tile, whole_rows
from minilora.memory import add_up
from minilora.memory_at_rest import Learned, predict
from minilora.nf4 import BLOCK_SIZE, CPU
from minilora.projections import WHOLE


@dataclass
class StepPlan:
    """What a training step's memory depends on; `__post_init__` has what follows of it. What ends in `_bytes` gives
    bytes, or bytes by owner.

    dtype, double_quant: as `predict` has them
    adapter: None where weights of the base learn: those of the names `learned`, or all if that is None
    rows, length: of a micro-batch; targets: how many of its tokens are, None: all
    sees: a row falls into causal runs, or a mask says who sees whom (visible.py)
    masks: bytes of those that a CPU's pieces have (`visible.Pieces`)
    runs: how many FlashAttention is told of, empty ones too; 0: as many as rows
    paged: the optimizer's state is in the host's memory but for two pages
    ahead: a weight is decoded while another is multiplied (ahead.py)
    keep: of each fast block; none: all of them everything or, with checkpointing, their input
    """

    config: ModelConfig
    dtype: torch.dtype
    double_quant: bool | None
    adapter: LoraConfig | PrefixConfig | None
    rows: int
    length: int
    targets: int | None = None
    sees: Literal["runs", "mask"] = "runs"
    masks: int = 0
    runs: int = 0
    checkpointing: bool = False
    keep: tuple[Keep, ...] = ()
    learned: Container[str] | None = None
    device: torch.device = CPU
    optimizer: Optimizer = "adamw"
    paged: bool = False
    ahead: bool = False

    def __post_init__(self) -> None:
        config, of_blocks = self.config, [spec for spec in tensor_specs(self.config) if spec.layer >= 0]
        self.lora = lora = self.adapter if isinstance(self.adapter, LoraConfig) else None
        self.before = self.adapter.n_tokens if isinstance(self.adapter, PrefixConfig) else 0  # the prefix's tokens
        # How many numbers a tensor of `fused.Tape` holds; mid, up, attended and v hold as many as x, gate, q and k.
        self.tokens = self.rows * self.length
        self.x, self.gate = self.tokens * config.dim, self.tokens * config.hidden_dim
        self.q, self.k = (self.tokens * n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.mask = self.tokens * (self.length + self.before) if self.sees == "mask" else 0  # (B, 1, T, before + T)
        self.widest = config.dim * max(config.hidden_dim, config.n_heads * config.head_dim)  # numbers of a weight
        self.block_weights = sum(prod(spec.shape) for spec in of_blocks if spec.is_projection) // config.n_layers
        # Of each block: by the names of the layers with an adapter its rank, what comes out, and what goes in.
        self.adapted: list[dict[str, tuple[int, ...]]] = [{} for _ in range(config.n_layers)]
        for spec in of_blocks:
            if lora and spec.is_projection and lora.adapts(spec.module):
                self.adapted[spec.layer][spec.module.rpartition(".")[2]] = (lora.rank_of(spec.module), *spec.shape)
        # What learns, a prefix apart; and whether the blocks' norms do, beside adapters.
        self.learns = Learned.of_lora(config, lora) if lora else Learned.of(config, () if self.before else self.learned)
        self.block_norms = any(lora.saves(spec.module) for spec in of_blocks) if lora else False
        # Bytes of a number in the residual stream, and in products; whether these have a dtype of their own.
        self.on_cpu, self.stored = self.device.type == "cpu", self.dtype.itemsize
        self.computed = product_dtype_of(self.dtype, self.device).itemsize
        self.cast = self.stored != self.computed
        # Whether the blocks are the fast ones, and what each keeps.
        self.fused = lora is not None and lora.dropout == 0 and not lora.dora and not self.block_norms
        self.keeps = self.keep or (Keep.INPUT if self.checkpointing else Keep.ALL,) * config.n_layers
        # Whether weights are stored otherwise than they are multiplied by, and whether one is decoded ahead.
        self.decodes = self.double_quant is not None or self.cast
        stay_decoded = self.fused and set(self.keeps) == {Keep.WEIGHTS}
        self.decodes_ahead = self.ahead and self.decodes and not stay_decoded and not self.on_cpu

    def predict(self, in_between: Sequence[dict[str, int]] = ()) -> dict[str, int]:
        """By owner, at the moment of the step when they are most, the optimizer's moments there already.

        in_between: what evaluation takes besides, see `forward_bytes`
        For the fast block on a CPU, tensor by tensor; for the plain one (dropout, or all weights learn) the scratch is
        an estimate. On a GPU the allocator's rounding comes on top.
        """
        config, learns = self.config, self.learns
        rest = predict(config, self.dtype, self.double_quant, self.adapter)
        if self.adapter is None:
            rest["gradients"] = 4 * learns.n
        rest["optimizer"] = state_bytes(self.optimizer, 2 * PAGE if self.paged else rest["gradients"] // 4)
        reached = (1,) * config.n_layers if self.before else learns.reached
        whole = [self.block_bytes(layer, n > 0) for layer, n in enumerate(reached, config.n_layers - len(reached))]
        kept = [self.kept_bytes(layer, block) for layer, block in enumerate(whole, config.n_layers - len(reached))]
        of_last = self.backward_bytes(whole[-1], kept[-1]) if kept else {}
        blocks = add_up(*kept)
        masks = self.masks + len(set(config.windows)) * self.mask
        shared = {"attention": self.tokens * config.head_dim * self.stored + masks}  # cos, sin, and who sees whom
        head = 4 * learns.head if config.tied_embeddings else 0
        # Copies of what learns, in the products' dtype (adamw.py).
        rest["scratch"] = self.computed * learns.n if self.fused and self.computed != 4 else 0
        rest["scratch"] += 2 * self.computed * self.widest if self.decodes_ahead else 0
        loss, last = add_up(shared, blocks, self.loss_bytes()), add_up(shared, blocks, of_last, {"scratch": head})
        held = self.decoded_bytes() if self.on_cpu else 0  # used again (scratch.py)
        first = {"scratch": head + 4 * (learns.embedding + self.x) + held if learns.embedding else 0}
        worst = max(loss, last, first, *in_between, key=lambda owners: sum(owners.values()))
        return {owner: n for owner, n in add_up(rest, worst).items() if n}

    def block_bytes(self, layer: int = 0, learns: bool = True) -> dict[str, int]:
        """What a block that keeps all keeps for backward: a `fused.Tape`, or what autograd takes of the plain block.

        The plain block's norms keep their input in float32, dropout its mask and what it let through, DoRA the inputs
        of A and what it multiplies; without either down_proj's A keeps its input. learns: something of the block does;
        else gradients only pass through it
        """
        number, lora, config = self.computed if self.fused else self.stored, self.lora, self.config
        x = mid = self.x
        q = attended = self.q
        repeated = self.sees == "mask" and not self.on_cpu and config.n_heads > config.n_kv_heads  # (attention.py)
        k = v = self.q + (self.k if self.fused else 0) if repeated else self.k  # the tape has them as they were, too
        prefix = 2 * self.rows * self.before * config.n_kv_heads * config.head_dim  # its k and v
        logsumexp = 4 * self.tokens * config.n_heads
        as_it_is, base_learns = self.fused or self.stored == 4, learns and self.adapter is None
        norms = 4 if base_learns or self.block_norms else 0 if as_it_is else 2  # x / rms and that times the weight
        adapted = lora and not (self.fused or lora.dora or lora.dropout) and "down_proj" in self.adapted[layer]
        gates = 2 if self.fused else 4 if base_learns or adapted else 3  # gate and up; silu(gate); down's input
        kept = {
            "residual stream": (x + mid) * self.stored if as_it_is else 0,
            "norms": norms * x * 4,
            "attention": (q + k + v + prefix + attended + self.mask) * number + logsumexp,
            "mlp": gates * self.gate * self.stored,
        }
        if lora is None:
            return kept
        here, dora = self.adapted[layer], lora.dora
        numbers = sum(rank + (lora.dropout > 0) * 2 * n_in + dora * n_out for rank, n_out, n_in in here.values())
        if dora:  # beside what m multiplies, A's inputs, of which layers share some
            inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
            numbers += sum({inputs.get(name, name): n_in for name, (_, _, n_in) in here.items()}.values())
        return kept | {"adapter inputs": self.tokens * number * numbers}

    def kept_bytes(self, layer: int, whole: dict[str, int]) -> dict[str, int]:
        """What of a `whole` block stays from its forward to its backward: see `fused.Keep`, or its input alone."""
        keep, adapted, number = self.keeps[layer], self.adapted[layer], self.computed
        x = mid = self.x * self.stored
        if keep == Keep.WEIGHTS and self.fused and self.decodes:
            # On a GPU B lies behind the rows and A below them (projections.py).
            joined = () if self.on_cpu else [sizes for sizes in adapted.values() if sizes[0] % WHOLE == 0]
            grown = sum(rank * (n_out + n_in) for rank, n_out, n_in in joined)
            return whole | {"decoded weights": (self.block_weights + grown) * number}
        if keep >= Keep.ALL:
            return whole
        if not self.fused:
            return {"residual stream": x}
        attended, logsumexp = self.q * number, 0 if self.sees == "mask" else 4 * self.tokens * self.config.n_heads
        attention = (0, attended + logsumexp, whole["attention"])[keep]
        here = ("down_proj", "o_proj", "q_proj", "k_proj", "v_proj")[: (1, 2, 5)[keep]]
        reduced = self.tokens * number * sum(adapted[name][0] for name in here if name in adapted)
        stream = x if keep == Keep.INPUT else x + mid
        return {"residual stream": stream, "attention": attention, "adapter inputs": reduced}

    def backward_bytes(self, whole: dict[str, int], kept: dict[str, int]) -> dict[str, int]:
        """What is alive beside `kept` in backward of a block: its scratch, and what of `whole` is made again."""
        makes_gates, no_mlp = self.fused and "mlp" not in kept, {"mlp": 0}
        in_scratch = no_mlp if makes_gates and not self.cast else {}  # which has them in the products' dtype alone
        done_with = no_mlp if makes_gates or not self.fused else {}  # what the fast block kept stays to its end
        at_mlp = add_up({"scratch": self.scratch_bytes(makes_gates)}, kept | whole | in_scratch)
        at_attention = add_up({"scratch": self.attention_scratch_bytes()}, kept | whole | done_with)
        most = max(at_mlp, at_attention, key=lambda owners: sum(owners.values()))
        return add_up(most, {owner: -n for owner, n in kept.items()})

    def scratch_bytes(self, makes_gates: bool) -> int:
        """What is alive besides in backward of a block's MLP: at down_proj, at the other two, or at its norm.

        makes_gates: gate and up were not kept
        """
        stored, computed, decoded, dy = self.stored, self.computed, self.decoded_bytes(), self.x * self.stored
        if not self.fused:
            dh = d_gate = self.gate * stored
            d_weight = 0 if self.adapter else 4 * self.config.dim * self.config.hidden_dim  # not yet added
            return dy + dh + max(d_gate, d_weight) + decoded
        gate = up = self.gate * computed if self.cast or makes_gates else 0  # as they are multiplied
        h = silu = dh = d_gate = d_up = self.gate * computed
        normed = dn = self.x * computed
        if not self.on_cpu:  # d_gate lies where dh was, d_up where up was, which is no scratch if it was kept
            dmid = self.x * stored
            return dy + max(gate + up + dh + decoded, d_gate + up + dn + max(decoded, normed + dmid))
        cast_dy = self.x * computed if self.cast else 0
        in_norm = 4 * self.x * (1 + (computed != 4) + (stored != 4))  # what it multiplies, and in float32
        at_down = gate + up + h + silu + dh + cast_dy + decoded
        return dy + max(at_down, d_gate + d_up + normed + dn + max(decoded, in_norm))

    def attention_scratch_bytes(self) -> int:
        """What is alive besides in backward of a block's attention: two gradients of x, and those of the heads.

        On a GPU those of k and v come for each query head, and FlashAttention adds up q's in float32, 128 rows of it
        free behind each run, beside a number a row.
        """
        config, number = self.config, self.computed if self.fused else self.stored
        shared = 2 * self.x * self.stored + (self.x * self.computed if self.cast and self.fused else 0)
        shared += 2 * (self.q + self.k) * number  # of what comes out, and of q, k and v
        if self.on_cpu:  # a rotation's halves, and what they become
            return shared + (2 * self.q * number if self.fused else 0) + self.decoded_bytes()
        shared += 2 * self.q * number if config.n_heads > config.n_kv_heads else 0
        if self.sees == "mask":
            return shared
        step = 32 if config.head_dim <= 128 else 64
        rows = config.n_heads * (self.tokens + 128 * (self.runs or self.rows))
        return shared + 4 * rows * (ceil(config.head_dim / step) * step + 1)

    def forward_bytes(self, new: int | None = None) -> dict[str, int]:
        """What a pass without gradients takes: the widest of the MLP, attention and loss; an estimate.

        new: tokens to be generated from prompts of this length, so with a KV cache; None for a loss
        """
        config, stored = self.config, self.stored
        slots = [0 if new is None else n_slots(window, self.length + new) for window in config.windows]
        keys, cast = self.rows * (max(self.length, *slots) + self.before), self.computed if self.cast else 0
        padded = new is not None and self.rows > 1  # prompts of unlike lengths
        mask = self.tokens * (self.length + self.before) if padded else self.mask
        # Without gradients a head that learns has none.
        adapter = self.adapter if self.before else replace(self.lora or LoraConfig(), modules_to_save=())
        frozen = replace(self, adapter=adapter, ahead=False)
        gates = 4 if self.on_cpu or self.lora else 3  # gate, up, h; silu(gate), or what an adapter adds
        mlp = (3 * self.x + gates * self.gate) * stored + self.gate * cast + frozen.decoded_bytes()
        repeated = 0 if self.on_cpu else config.n_heads
        heads = 2 * (config.n_kv_heads + repeated) * config.head_dim  # k and v, and repeated
        attention = (2 * self.x + 3 * self.q + keys * heads + mask) * stored + self.q * cast
        last = frozen.loss_bytes() if new is None else {"logits": self.rows * config.vocab_size * 4}
        of_slot = 2 * config.n_layers // len(slots) * self.rows * config.n_kv_heads * config.head_dim * stored
        cache = {"KV cache": sum(slots) * of_slot}
        shared = cache | {"attention": self.tokens * config.head_dim * stored + mask}
        return add_up(shared, max({"scratch": max(mlp, attention)}, last, key=lambda owners: sum(owners.values())))

    def loss_bytes(self) -> dict[str, int]:
        """The final norm's input and output, and the loss's tile of logits with what becomes of it (loss.py)."""
        dim, columns, head, norm = self.config.dim, self.config.vocab_size, self.learns.head, self.learns.norm
        if self.on_cpu:
            targets = self.tokens if self.targets is None else self.targets
            rows, columns = tile(targets, columns, head > 0)
            number = 4 if self.computed == 4 else 2 * self.computed + 4  # the product, in float32, and again in 16 bits
            in_work = rows * (columns * number + dim * (4 + self.computed))  # and h's gradient, the label's row
            in_work += dim * self.computed * (rows + columns) if self.cast else 0
            hidden = (self.tokens + targets) * dim * self.stored  # also of the targets alone
        else:
            targets, rows, hidden = self.tokens, whole_rows(self.tokens, columns, self.stored), self.x * self.stored
            in_work = rows * columns * self.stored
            if head:  # a tile's h where it is a target; the head in h's dtype
                in_work += rows * dim * self.stored + (head * self.stored if self.stored != 4 else 0)
        hidden += 4 * self.x if norm else 0  # x / rms
        dh, d_head = targets * dim * self.stored, 4 * head  # backward makes both anew, scaled
        logits = max(in_work, d_head + (0 if self.on_cpu else dh)) + d_head + dh
        kept = {"final hidden": hidden, "logits": logits}
        # The last block's output, which is the norm's input: by autograd, not fused, in float32.
        as_it_is = self.stored == 4 or (self.fused and not norm)
        return add_up(kept, {"residual stream": self.x * self.stored} if as_it_is else {"final hidden": 4 * self.x})

    def decoded_bytes(self) -> int:
        """The slice of a frozen weight, the largest, that is in work at a time, in the products' dtype, and what
        decoding takes."""
        size = self.widest
        if self.adapter is None or not self.decodes:
            return 0
        if not self.on_cpu:  # whole, and by a kernel
            return 0 if self.decodes_ahead else size * self.computed
        in_work = size // ceil(size * self.computed / SLICE_BYTES)
        decoding = 6 * min(nf4.chunk_of(self.device), in_work) + 4 * size // BLOCK_SIZE
        return in_work * self.computed + (0 if self.double_quant is None else decoding)
