"""One whole QLoRA step, by minilora and by transformers + peft + bitsandbytes: what runs in the contestants' processes.

Both: NF4 with double quantization, rank 16, alpha 32 on all seven projections, no dropout, mean loss of the target
tokens, backward, AdamW without weight decay (the peer's is torch's, fused), no clipping. The same files, the same
adapters to begin with, the same tokens; so the losses of step after step must be equal, and `train_step` leaves out
whose are not.
"""

import gc
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.feeds import Feed, packed_batches, peer_batches, tokens_of_steps
from benchmarks.harness import Step
from benchmarks.shapes import shape
from minilora.attention import attend_back, attend_kept
from minilora.backend import product_dtype_of
from minilora.checkpoint.load import load_model
from minilora.compiled import compile_loops
from minilora.config import PROJECTIONS, BaseConfig, DataConfig, LoraConfig, RunConfig, TrainConfig
from minilora.linear import multiply, multiply_back
from minilora.scratch import keep_freed_memory
from minilora.train.ledger import Ledger
from minilora.train.setup import optimizer_for, settle_heap
from minilora.train.step import LossScale, backward_of, train_step
from minilora.train.strategies import apply_strategy, trainable
from minilora.visible import Pieces

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
HEAD_ROWS = 2048  # of the head in a product


def ours(base: str, dtype: str, feed: Feed, checkpointing: bool, compiled: bool = False) -> Step:
    """minilora's own pieces, put together as `minilora train` does it. compiled: by `train.compile`"""
    compile_loops(compiled)
    model = load_model(base, quantize="nf4", dtype=getattr(torch, dtype), device="cpu")
    batches, tokens, turns = packed_batches(feed), tokens_of_steps(feed), count()
    rows, length = batches[0].tokens.shape
    train = TrainConfig(strategy="qlora", batch_size=rows, activation_checkpointing=checkpointing)
    data, lora = DataConfig(max_seq_len=length), LoraConfig(rank=RANK, alpha=ALPHA)
    run = RunConfig(model=BaseConfig(dtype=dtype), lora=lora, data=data, train=train)  # type: ignore[arg-type]
    ledger = Ledger(run, model.config, model.device, batches[0], length).fitted()
    settle_heap(train, ledger.keep)
    apply_strategy(model, run, ledger.keep).train()
    weights = trainable(model)
    same_adapters(weights.items())
    optimizer = optimizer_for(weights, run)
    backward, loss_scale = backward_of(model, optimizer), LossScale.of(torch.float32)
    if compiled:
        _compile_all(lambda batch: backward(batch, 1.0), batches)

    def step() -> dict[str, Any]:
        turn = next(turns) % len(batches)
        batch = batches[turn]
        done = train_step(backward, optimizer, [batch], batch.n_targets, LEARNING_RATE, 0.0, loss_scale)
        return {"loss": done.loss, "tokens": tokens[turn]}

    gc.collect()
    return step


def peer(
    base: str,
    dtype: str,
    feed: Feed,
    form: str,
    attention: str,
    checkpointing: bool,
    prepared: bool,
    compute: str | None = None,
    autocast: bool = False,
    compiled: bool = False,
) -> Step:
    """The usual stack, in train mode (in eval mode bitsandbytes would repack the weights for inference).

    attention: "sdpa" or "eager"; prepared: by `prepare_model_for_kbit_training`, which makes norms, embedding and head
    float32; form: see `peer_batches`; compute: what the 4-bit layers compute in, `dtype` if None; autocast: to `dtype`,
    as transformers' Trainer does with `bf16`: else PEFT multiplies with adapters in float32, theirs; compiled: each
    decoder layer by torch.compile
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute or dtype),
        ),
    )
    model = peft_model(model, checkpointing, prepared)
    weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    same_adapters(weights)
    optimizer = adamw(p for _, p in weights)
    batches, tokens, turns = peer_batches(feed, form), tokens_of_steps(feed), count()

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        # Without a cache: with one, positions that begin anew would not keep the samples of a flat row apart.
        with torch.autocast("cpu", getattr(torch, dtype), enabled=autocast):
            loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile()
        _compile_all(lambda batch: loss_of(batch).backward(), batches)

    def step() -> dict[str, Any]:
        turn = next(turns) % len(batches)
        optimizer.zero_grad()
        loss = loss_of(batches[turn])
        loss.backward()
        optimizer.step()
        return {"loss": float(loss), "tokens": tokens[turn]}

    gc.collect()
    return step


def _compile_all(backward: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Forward and backward of each batch, so that what is compiled for its sizes is there before the first step."""
    for batch in batches:
        backward(batch)


def peft_model(model: Any, checkpointing: bool, prepared: bool) -> Any:
    """A 4-bit model of transformers with PEFT's adapters, in train mode."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model, prepare_model_for_kbit_training

    how = {"use_reentrant": False}
    if prepared:
        model = prepare_model_for_kbit_training(model, checkpointing, gradient_checkpointing_kwargs=how)
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    targets = list(PROJECTIONS)
    return get_peft_model(model, PeftConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)).train()


def shared_work(dtype: str, feed: Feed, shape_name: str) -> Step:
    """What every step of random tokens has to do: none that multiplies and attends as ours can be faster than this.

    Products with the frozen weights, forward and back to their input; the head's; attention. No decoding, no adapters,
    nothing elementwise, no loss, no update. The same numbers go into each block.
    """
    keep_freed_memory(large_pages=True)
    config, rows, length = shape(shape_name), feed["rows"], feed["length"]
    generator, kind = torch.Generator().manual_seed(0), product_dtype_of(getattr(torch, dtype), torch.device("cpu"))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(kind)

    d, f, (q, kv) = config.dim, config.hidden_dim, (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    sizes = ((q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f))
    blocks = [[draw(*size) for size in sizes] for _ in range(config.n_layers)]
    head, numbers = draw(config.vocab_size, d).split(HEAD_ROWS), {n: draw(rows * length, n) for n in (d, f, q, kv)}
    query, key = (draw(rows, length, n, config.head_dim) for n in (config.n_heads, config.n_kv_heads))
    sees = [Pieces.of((length,) * rows, window) for window in config.windows]

    def step() -> dict[str, Any]:
        for layer, weights in enumerate(blocks):
            for weight in weights:
                multiply(numbers[weight.shape[1]], weight)
            of_layer = sees[layer % len(sees)]
            y, rest = attend_kept(query, key, key, of_layer)
            attend_back(y, query, key, key, y, rest, of_layer)
            for weight in weights if layer else weights[3:]:  # before the first q, k and v nothing learns
                multiply_back(numbers[weight.shape[0]], weight)
        for weight in head:
            multiply_back(multiply(numbers[d], weight), weight)
        return {"tokens": rows * length}

    return step


def matmul_ceiling(dtype: str, seconds: float = 1.0) -> Step:
    """torch's own rate: the best of large square products in `seconds`, GFLOP/s; small ones first, where it is slow."""
    import time

    def step() -> dict[str, Any]:
        best, start, size = 0.0, time.perf_counter(), 256
        while time.perf_counter() - start < seconds:
            a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
            begin = time.perf_counter()
            a @ b
            rate = 2 * size**3 / (time.perf_counter() - begin) / 1e9
            best = max(best, rate)
            size = min(2 * size, 2048) if 2 * (2 * size) ** 3 / rate / 1e9 < seconds / 4 else size
        return {"gflop_per_s": best}

    return step


def same_adapters(weights: Iterable[tuple[str, nn.Parameter]]) -> None:
    """The same A on both sides, B zero: the layers come in the same order, whatever they are called."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in weights:
            if "lora_A" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            else:
                weight.zero_()


def adamw(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(weights), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
