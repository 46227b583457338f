"""The fast block in the plain one's place: the same layers under the same names, run by the functions of `fused.py`.

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
    """A block that `fused_block` runs, forward and backward, while gradients are made. keep: what it keeps for them."""

    keep = Keep.ALL

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm, self.mlp = block.post_attention_layernorm, block.mlp
        self.train(block.training)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not torch.is_grad_enabled() or context.cache is not None or context.prefix:
            return super().forward(x, context)
        attention, mlp = self.self_attn, self.mlp
        # k carries s dy B: its dy is made by a function of ours, which can leave room; v's is torch's attention's.
        layers = Layers(
            self.input_layernorm,
            Projections.of(attention.q_proj, attention.k_proj, attention.v_proj, carrier=1),
            Projections.of(attention.o_proj),
            self.post_attention_layernorm,
            Projections.of(mlp.gate_proj, mlp.up_proj),
            Projections.of(mlp.down_proj),
            context,
            context.sees(attention.layer),
        )
        y = fused_block(x, layers, self.keep, getattr(x, "dy_room", 0), *layers.learned)
        y.dy_room = layers.down.dy_room  # type: ignore[attr-defined]
        return y


class FusedNorm(RMSNorm):
    """The last norm, which `fused_norm` runs in the same way, while its own weight does not learn."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or self.weight.requires_grad:
            return super().forward(x)
        return fused_norm(x, self.weight, self.eps, getattr(x, "dy_room", 0))


def fuse(model: Mistral, keep: Sequence[Keep] = ()) -> bool:
    """Put the fast block in place of each plain one, and its norm in that of the last, if it applies to all of them;
    whether it did.

    keep: what each block keeps for backward; none: everything, or the input alone where the model has
        `activation_checkpointing`, which is switched off, as the fast blocks see to it; a fast one stays as it is

    It applies if no weight of the blocks learns but adapters, these are plain, without dropout and not DoRA's, and
    there is no prefix.
    """
    if model.prefix is not None:
        return False
    for block in model.layers:
        adapted = [m for m in block.modules() if isinstance(m, LoRALinear)]
        learn = {id(p) for p in block.parameters() if p.requires_grad}
        plain = all(m.dropout == 0 and m.lora_magnitude_vector is None for m in adapted)
        if not (plain and learn <= {id(p) for m in adapted for p in (m.lora_A, m.lora_B)}):
            return False
    kept = Keep.INPUT if model.activation_checkpointing else Keep.ALL
    model.activation_checkpointing = False
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        if not isinstance(block, FusedBlock):
            model.layers[i] = block = FusedBlock(block)
            block.keep = kept
        if keep:
            block.keep = keep[i]
    if type(model.norm) is RMSNorm and not model.norm.weight.requires_grad:
        model.norm = FusedNorm(model.norm)
    return True
