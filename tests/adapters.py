"""What tests ask of a model with adapters, and how far two models are apart, batch by batch."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from minilora.checkpoint.merge import merged_weight
from minilora.checkpoint.names import tensor_specs
from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, batches
from minilora.evaluate.distance import Distance
from minilora.lora import LoRALinear, adapters_off
from minilora.loss import IGNORE
from minilora.model import Mistral

Predictor = Callable[[PackedBatch], Tensor]  # a batch -> the logits (targets, V) of its target tokens, float32


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers with an adapter, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


@torch.no_grad()
def as_trained(model: Mistral, strength: float = 0.05) -> Mistral:
    """The model, its adapters no longer as they began: B is not zero, a magnitude not the weight's."""
    for _, layer in lora_layers(model):
        layer.lora_B.normal_(0, strength)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(1.1)
    return model


def merged_weights(model: Mistral, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight with its adapter's share, each summed in float32 and rounded once to dtype."""
    for spec in tensor_specs(model.config):
        yield spec.name, merged_weight(model.get_submodule(spec.module)).to(dtype)


def predictor(model: Mistral) -> Predictor:
    """The model's own predictions."""

    def logits(batch: PackedBatch) -> Tensor:
        batch = batch.to(model.device)
        hidden = model.hidden(batch.tokens, batch.positions, batch.segments, runs=batch.runs)
        rows: Tensor = model.lm_head(hidden[batch.labels != IGNORE])
        return rows.float()

    return logits


def base_predictor(model: Mistral) -> Predictor:
    """The predictions of a model with its adapters off."""

    def logits(batch: PackedBatch) -> Tensor:
        with adapters_off(model):
            return predictor(model)(batch)

    return logits


@torch.no_grad()
def distance(p: Predictor, q: Predictor, samples: Sequence[Sample], max_seq_len: int, batch_size: int = 1) -> Distance:
    """From p to q, of models in evaluation mode, over all target tokens of the samples."""
    total: Distance | None = None
    for batch in batches(samples, max_seq_len, batch_size, "cpu"):
        logits_p = p(batch)
        found = Distance.of(logits_p, q(batch).to(logits_p.device))
        total = found if total is None else total + found
    assert total is not None, "there is a sample"
    return total
