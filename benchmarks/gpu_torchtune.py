"""A model of full size by torchtune, where it can be imported: one more contestant of `gpu_train`.

Put together as its recipe lora_finetune_single_device does it for Mistral in NF4: everything in 16 bits, adapters too,
its chunked cross entropy, torch's fused AdamW; not compiled. Its quantizer takes the same levels in the same blocks,
but keeps their absmax in other 8 bits, which the first loss hardly shows.
"""

import re
import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import ALPHA, RANK, adamw, same_adapters
from benchmarks.feeds import packed_batches
from benchmarks.gpu_models import compute_dtype, random_weights, steps
from benchmarks.harness import Step
from benchmarks.shapes import shape
from minilora.checkpoint.names import tensor_specs
from minilora.config import ModelConfig
from minilora.fused import Keep

# Of Mistral's own names, whose order of rows it has.
RENAMED = {
    **{f"attention.w{letter}": f"attn.{letter}_proj" for letter in "qkv"},
    "attention.wo": "attn.output_proj", "feed_forward": "mlp", "attention_norm": "sa_norm", "ffn_norm": "mlp_norm",
}  # fmt: skip
NEEDED = ("torchtune.models.mistral", "torchtune.modules.loss", "torchao.dtypes.nf4tensor")


def is_there() -> bool:
    """Whether what it needs can be imported; says why not. Its 0.6.1 needs an older torchao than the newest."""
    try:
        for module in NEEDED:
            import_module(module)
    except Exception as error:  # whatever a library may raise that was built for another
        print(f"torchtune is left out: {error}", file=sys.stderr, flush=True)
        return False
    return True


def torchtune(shape_name: str, device: str, adapters: bool) -> Step:
    """adapters: true, as all contestants of a step have them."""
    assert adapters
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    config, where = shape(shape_name), torch.device(device)
    model = _model(config, where)
    layers, loss_of, state = list(model.layers), CEWithChunkedOutputLoss(), dict[str, Any]()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    adapted = [model.get_submodule(_name(spec.mistral_module)) for spec in tensor_specs(config) if spec.is_projection]
    weights = [pair for m in adapted for pair in (("lora_A", m.lora_a.weight), ("lora_B", m.lora_b.weight))]

    def begin(keep: str, **_: Any) -> None:
        same_adapters(weights)
        state["optimizer"] = adamw(p for _, p in weights)
        wraps = keep == Keep.INPUT.name
        model.layers = nn.ModuleList([checkpoint_wrapper(layer) if wraps else layer for layer in layers])

    def train(rows: int, length: int, keep: str) -> dict[str, Any]:  # noqa: ARG001 - begin has seen to it
        [batch] = packed_batches({"rows": rows, "length": length, "vocab_size": config.vocab_size})
        state["optimizer"].zero_grad()
        loss = loss_of(model(batch.tokens.to(where)), batch.labels.to(where))
        loss.backward()
        state["optimizer"].step()
        return {"loss": float(loss)}

    return steps(where, begin, {"train": train})


def _model(config: ModelConfig, device: torch.device) -> Any:
    """Its Mistral with the weights of `random_weights`, NF4 in the blocks; only the adapters learn."""
    from torchao.dtypes.nf4tensor import to_nf4
    from torchtune.models.mistral import lora_mistral

    assert config.head_dim * config.n_heads == config.dim, "its heads are a share of the width each"
    assert config.sliding_window is None, "it has no window"
    before = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(device))
    try:
        with device:
            model = lora_mistral(
                ["q_proj", "k_proj", "v_proj", "output_proj"],
                apply_lora_to_mlp=True,
                vocab_size=config.vocab_size,
                num_layers=config.n_layers,
                num_heads=config.n_heads,
                num_kv_heads=config.n_kv_heads,
                embed_dim=config.dim,
                max_seq_len=config.max_seq_len,
                intermediate_dim=config.hidden_dim,
                norm_eps=config.norm_eps,
                rope_base=int(config.rope_theta),
                lora_rank=RANK,
                lora_alpha=ALPHA,
                quantize_base=True,
            )
    finally:
        torch.set_default_dtype(before)
    for spec, weight in random_weights(config, device):
        drawn = spec.to_layout(weight, "mistral")
        kind = "scale" if len(spec.shape) == 1 else "weight"
        put = to_nf4(drawn) if spec.is_projection else drawn
        model.get_submodule(_name(spec.mistral_module)).register_parameter(kind, nn.Parameter(put))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model.train()


def _name(mistral: str) -> str:
    return re.sub("|".join(RENAMED), lambda found: RENAMED[found[0]], mistral)
