"""The fast block in the plain one's place: the block's own layers under their own names, run by `fused.py`'s functions.

`fuse` puts it where it applies: frozen bases and norms, no dropout. It falls back to the plain block where there is
nothing to differentiate, so inference and the KV cache have one definition.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minilora.fused import Keep, Layers, fused_block, fused_norm
from minilora.lora import LoRALinear
from minilora.model import Block, Context, Mistral
from minilora.norm import RMSNorm
from minilora.projections import Projections


class FusedBlock(Block):
    """A block's own layers under their own names, run by the function while there is something to learn.

    keep: None is everything, or the input alone with activation checkpointing
    """

    makes_again = True
    keep: Keep | None = None

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm, self.mlp = block.post_attention_layernorm, block.mlp
        self.train(block.training)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not torch.is_grad_enabled() or context.cache is not None or context.prefix:
            return super().forward(x, context)
        attention, mlp = self.self_attn, self.mlp
        layers = Layers(
            self.input_layernorm,
            Projections.of(attention.q_proj, attention.k_proj, attention.v_proj, carrier=1),  # v's dy is torch's
            Projections.of(attention.o_proj),
            self.post_attention_layernorm,
            Projections.of(mlp.gate_proj, mlp.up_proj),
            Projections.of(mlp.down_proj),
            context,
            context.sees(attention.layer),
        )
        keep = self.keep if self.keep is not None else Keep.INPUT if context.checkpointing else Keep.ALL
        y = fused_block(x, layers, keep, getattr(x, "grad_room", 0), *layers.learned)
        y.grad_room = layers.down.room_back  # type: ignore[attr-defined]
        return y


class FusedNorm(RMSNorm):
    """The last norm's own weight under its own name, run by the function while there is something to learn."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or self.weight.requires_grad:
            return super().forward(x)
        return fused_norm(x, self.weight, self.eps, getattr(x, "grad_room", 0))


def fuse(model: Mistral, keep: Sequence[Keep] = ()) -> bool:
    """Put the fast block in place of each plain one, and its norm in that of the last, if it applies to all of them;
    whether it did.

    keep: of each block; none: everything, or the input alone with activation checkpointing

    It does if no weight of the blocks learns but adapters, and these are plain: without dropout, not DoRA's. (Under a
    prefix the fast block falls back to the plain one, so there `fuse` would gain nothing.)
    """
    for block in model.layers:
        adapted = [m for m in block.modules() if isinstance(m, LoRALinear)]
        learn = {id(p) for p in block.parameters() if p.requires_grad}
        plain = all(m.dropout == 0 and m.lora_magnitude_vector is None for m in adapted)
        if not (plain and learn <= {id(p) for m in adapted for p in (m.lora_A, m.lora_B)}):
            return False
    for i, what in enumerate(keep or [None] * len(model.layers)):
        block = model.layers[i]
        assert isinstance(block, Block)
        model.layers[i] = fast = block if isinstance(block, FusedBlock) else FusedBlock(block)
        fast.keep = what
    if type(model.norm) is RMSNorm and not model.norm.weight.requires_grad:
        model.norm = FusedNorm(model.norm)
    return True
