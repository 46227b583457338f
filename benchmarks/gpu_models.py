"""A model of full size on a GPU, by minilora and by transformers + peft + bitsandbytes: the contestants' processes.

Its weights are random and made on the device, one tensor at a time, by the same draws on both sides; so the first loss
must be equal. Linear layers of the blocks are NF4 with double quantization. A process does what it is asked for:

    train      one QLoRA step over random tokens, as in `contestants`
    generate   some tokens after a random prompt, greedily, with a KV cache

A new setting begins with fresh adapters and an empty cache of memory; its first step is a warm-up. A result says which
way ours went: the backend, and whether what it did was replayed as a graph; and of both sides what warnings there were.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.contestants import ALPHA, LEARNING_RATE, RANK, adamw, peft_model, same_adapters
from benchmarks.feeds import packed_batches, peer_batches
from benchmarks.gpu_harness import sixteen_bits
from benchmarks.harness import Record, Step, without_folders
from benchmarks.shapes import shape
from minilora import generation
from minilora.ahead import Ahead
from minilora.backend import backend_for
from minilora.checkpoint.config_files import config_to_hf
from minilora.checkpoint.names import TensorSpec, tensor_specs
from minilora.config import LoraConfig, ModelConfig, RunConfig, TrainConfig
from minilora.decode_graph import Steps
from minilora.dispatch import quantize
from minilora.errors import UserError
from minilora.fast_block import FusedBlock
from minilora.fused import Keep
from minilora.linear import NF4Linear
from minilora.memory_of_step import StepPlan
from minilora.model import Mistral
from minilora.train.graph import StepGraphs
from minilora.train.setup import optimizer_for, settle_heap
from minilora.train.step import LossScale, backward_of, train_step
from minilora.train.strategies import apply_strategy, trainable

Work = Callable[..., dict[str, Any]]


def ours(shape_name: str, device: str, adapters: bool) -> Step:
    """minilora's own pieces. Raises UserError on a GPU that the kernels do not compute on."""
    config, where = shape(shape_name), torch.device(device)
    backend = backend_for(where)
    if where.type == "cuda" and backend.name == "torch":
        raise UserError(f"{device} has no kernels: {backend.reason}")
    model = our_model(config, where)
    train_config = TrainConfig(strategy="qlora", weight_decay=0.0)
    run = RunConfig(lora=LoraConfig(rank=RANK, alpha=ALPHA), train=train_config)
    if adapters:
        settle_heap(train_config, ())
        apply_strategy(model, run).train()
    weights = trainable(model) if adapters else {}
    state: dict[str, Any] = {}

    def begin(ahead: bool = False, limit_bytes: int | None = None, **_: Any) -> None:
        state.clear()
        if limit_bytes:
            _limit(limit_bytes)
        same_adapters(weights.items())
        state["optimizer"] = optimizer = optimizer_for(weights, run) if weights else None
        if optimizer is not None:
            decodes = Ahead(where) if ahead else None
            graphs = StepGraphs.can_record(model)
            state["backward"] = (StepGraphs if graphs else backward_of)(model, optimizer, ahead=decodes)

    def train(rows: int, length: int, keep: str, ahead: bool = False, **_: Any) -> dict[str, Any]:
        for block in model.layers:
            assert isinstance(block, FusedBlock)
            block.keep = Keep[keep]
        [batch] = packed_batches({"rows": rows, "length": length, "vocab_size": config.vocab_size})
        optimizer, back = state["optimizer"], state["backward"]
        scale = LossScale.of(torch.float32)
        done = train_step(back, optimizer, [batch], batch.n_targets, LEARNING_RATE, 0.0, scale)
        way = {"backend": backend.name, "graph": isinstance(back, StepGraphs) and bool(back._graphs)}
        return {"loss": done.loss, "predicted_bytes": predicted_bytes(rows, length, keep, ahead), **way}

    @cache
    def predicted_bytes(rows: int, length: int, keep: str, ahead: bool) -> int:
        kept = (Keep[keep],) * config.n_layers
        plan = StepPlan(config, compute_dtype(where), True, run.lora, rows, length, device=where, keep=kept)
        return sum(replace(plan, ahead=ahead).predict().values())

    def continue_(prompt: int, new: int, **_: Any) -> dict[str, Any]:
        with patch.object(generation, "Steps", ToldSteps):
            tokens = generation.generate(model, random_prompt(config, prompt, where), new)
        way = {"backend": backend.name, "graph": ToldSteps.had_graph}
        return {"tokens": tokens[0, prompt:].tolist(), **way}

    return steps(where, begin, {"train": train, "generate": continue_})


class ToldSteps(Steps):
    """One that remembers whether the last text ended with a graph."""

    had_graph = False

    def release(self) -> None:
        ToldSteps.had_graph = self._graph is not None
        super().release()


def peer(
    shape_name: str, device: str, adapters: bool, prepared: bool = False, autocast: bool = False, compiled: bool = False
) -> Step:
    """The usual stack; prepared: by `prepare_model_for_kbit_training`; autocast: as transformers' Trainer does with
    `bf16`, without which PEFT multiplies with adapters in float32; compiled: each decoder layer by torch.compile.
    Attention by sdpa."""
    config, where = shape(shape_name), torch.device(device)
    model = peer_model(config, where)
    model = peft_model(model, checkpointing=False, prepared=prepared) if adapters else model.eval()
    weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad] if adapters else []
    state: dict[str, Any] = {}
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile()

    def begin(keep: str = "", **_: Any) -> None:
        if not weights:
            return
        same_adapters(weights)
        state["optimizer"] = adamw(p for _, p in weights)
        if keep == Keep.INPUT.name:
            how = {"use_reentrant": False}
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        else:
            model.base_model.model.gradient_checkpointing_disable()

    def train(rows: int, length: int, keep: str) -> dict[str, Any]:  # noqa: ARG001 - begin has seen to it
        [batch] = peer_batches({"rows": rows, "length": length, "vocab_size": config.vocab_size}, "rows")
        state["optimizer"].zero_grad()
        with torch.autocast(where.type, compute_dtype(where), enabled=autocast):
            loss = model(**{name: part.to(where) for name, part in batch.items()}, use_cache=False).loss
        loss.backward()
        state["optimizer"].step()
        return {"loss": float(loss)}

    def continue_(prompt: int, peer_new: int, **_: Any) -> dict[str, Any]:
        new, tokens = peer_new, random_prompt(config, prompt, where)
        ids = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new, max_new_tokens=new
        )
        return {"tokens": ids[0, prompt:].tolist()}

    return steps(where, begin, {"train": train, "generate": continue_})


def steps(device: torch.device, begin: Callable[..., None], works: Mapping[str, Work]) -> Step:
    """Each step ends when the device has done it; its result holds the device's memory at its peak, where there is a
    `limit_bytes` the whole card's as well, and the texts of all warnings since its setting began."""
    last, said = list[object](), dict[str, None]()

    def step(work: str, **setting: Any) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            result = measured(work, **setting)
        said.update(dict.fromkeys(without_folders(str(warning.message)) for warning in caught))
        return result | {"warnings": list(said)}

    def measured(work: str, **setting: Any) -> dict[str, Any]:
        if [work, setting] != last:
            last[:] = [work, setting]
            said.clear()
            begin(**setting)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if device.type != "cuda":
            return works[work](**setting)
        torch.cuda.reset_peak_memory_stats(device)
        result = works[work](**setting)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_reserved(device)
        whole = {"card_bytes": _beside() + peak} if "limit_bytes" in setting else {}
        allocated = torch.cuda.max_memory_allocated(device)
        return result | whole | {"peak_allocated_bytes": allocated, "peak_reserved_bytes": peak}

    return step


def _beside() -> int:
    """What the card lacks and torch has not reserved here: others' memory, and the driver's own."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _limit(n_bytes: int) -> None:
    """Refuse to torch what would make the card's use, by all, more."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (n_bytes - _beside()) / total))  # of the current device


def way_of(*records: Record) -> dict[str, Any]:
    """Which way the last step of the last one went, where it says so, and what any has warned of."""
    results = [record.steps[-1].result for record in records]
    way = {key: results[-1][key] for key in ("backend", "graph") if key in results[-1]}
    return way | {"warnings": list(dict.fromkeys(text for result in results for text in result.get("warnings", [])))}


# -- the models --------------------------------------------------------------------------------------------------------


def our_model(config: ModelConfig, device: torch.device) -> Mistral:
    """NF4 in the blocks, the rest in 16 bits; no parameter requires a gradient."""
    with torch.device("meta"):
        model = Mistral(config)
    for spec, weight in random_weights(config, device):
        if spec.is_projection:
            _put(model, spec.module, NF4Linear(quantize(weight, double_quant=True)))
        else:
            model.get_submodule(spec.module).register_parameter("weight", nn.Parameter(weight))
    return model.requires_grad_(False).eval()


def peer_model(config: ModelConfig, device: torch.device) -> Any:
    """transformers' Mistral of the same weights, the blocks' layers bitsandbytes' Linear4bit."""
    import transformers
    from bitsandbytes.nn import Linear4bit, Params4bit

    transformers.utils.logging.set_verbosity_error()
    dtype = compute_dtype(device)
    with torch.device("meta"):
        settings = transformers.MistralConfig(**config_to_hf(config, str(dtype).removeprefix("torch.")))
        model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    for spec, weight in random_weights(config, device):
        name = spec.key("hf").removesuffix(".weight")
        if spec.is_projection:
            n_out, n_in = spec.shape
            layer = Linear4bit(n_in, n_out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            values = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
            layer.weight = values.to(device)
            _put(model, name, layer)
        else:
            model.get_submodule(name).register_parameter("weight", nn.Parameter(weight))
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)  # its table is no weight: not on meta
    model.is_loaded_in_4bit = True  # PEFT asks
    return model.requires_grad_(False)


def random_weights(config: ModelConfig, device: torch.device) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Every tensor in the dtype that is computed in: norms are ones, the rest normal, std 0.02."""
    generator = torch.Generator(device).manual_seed(0)
    for spec in tensor_specs(config):
        weight = torch.ones(spec.shape, dtype=compute_dtype(device), device=device)
        yield spec, weight if len(spec.shape) == 1 else weight.normal_(std=0.02, generator=generator)


def random_prompt(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """(1, length) tokens, always the same."""
    drawn = torch.randint(10, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """16 bits on a GPU, float32 in a dry run."""
    return sixteen_bits(device) if device.type == "cuda" else torch.float32


def _put(model: Any, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
