"""The data of a run as `minilora data check` sees them: what is wrong, what they come to, what an epoch of them costs.

    seconds of an epoch ~ FLOP of its products (`work`) / FLOP/s

The FLOP/s are those of one product of this machine, of the model's own shape, measured for a moment. Decoding, norms,
attention and the optimizer come on top, so a run takes longer.
"""

from dataclasses import replace
from timeit import Timer

import torch

from minilora.backend import pick_device, pick_dtype, product_dtype_of
from minilora.base import tokenizer_for
from minilora.checkpoint.write import atomic_write
from minilora.config import ModelConfig, RunConfig
from minilora.data.check import Data, Finding, figures, load_data, mended
from minilora.data.pack import RowSampler
from minilora.errors import UserError
from minilora.evaluate.forgetting import read_probes
from minilora.memory import as_text, free_bytes
from minilora.memory_at_rest import Learned
from minilora.report.figures import text_of
from minilora.train.ledger import ledger_of
from minilora.train.schedule import steps_of_run, too_short
from minilora.train.setup import settled
from minilora.train.strategies import learned_names


def check_data(config: RunConfig) -> tuple[Data, list[tuple[str, str]]]:
    """(the data and what was found in them, figures as names and texts; none if nothing is left).

    Raises UserError for a file that cannot be read, and as `settled` does.
    """
    if not config.data.train:
        raise UserError("data.train is empty; name a file, as in `minilora data check chats.jsonl`")
    config, checkpoint = settled(config)
    data = load_data(config.data, tokenizer_for(config.model, checkpoint), checkpoint.config)
    if not data.samples["train"] or (data.mix and 0 in data.mix.sizes):
        return data, []
    n_steps = steps_of_run([sample.length for sample in data.learnt], config, data.mix)
    if warning := too_short(n_steps, config.train):
        data.findings.append(Finding("warm-up", warning, False))
    costs = _costs(config, checkpoint.config, data, n_steps)
    return data, [*figures(data, config.data.max_seq_len, config.train.seed), *costs]


def _costs(config: RunConfig, sizes: ModelConfig, data: Data, n_steps: int) -> list[tuple[str, str]]:
    """Steps, time and memory of an epoch on this machine."""
    train, length, device = config.train, config.data.max_seq_len, pick_device(config.model.device)
    sampler = RowSampler([sample.length for sample in data.learnt], length, train.seed, mix=data.mix)
    probes = read_probes(config.eval, data.tokenizer)
    needed = sum(ledger_of(config, sizes, device, data, probes, sampler).fitted().predict().values())
    n_rows, per_step = len(sampler.rows), train.batch_size * train.accumulate
    speed = _flop_per_s(sizes, min(4096, train.batch_size * length), device, pick_dtype(device, config.model.dtype)[0])
    n_targets = [sample.n_targets for sample in data.learnt]
    targets = sum(n_targets[i] for row in sampler.rows for i in row)
    flop = work(sizes, _learned(config, sizes), n_rows * length, targets if device.type == "cpu" else n_rows * length)
    measured = f"products alone, at the {speed / 1e9:,.0f} GFLOP/s of a product measured here"
    an_epoch = n_rows / per_step
    run = f"train.epochs {train.epochs:g} comes to {n_steps:,} steps"
    if train.max_steps is not None:
        run = f"train.max_steps {train.max_steps:,} comes to {text_of(train.max_steps / an_epoch)} epochs"
    return [
        ("steps", f"{text_of(an_epoch)} to an epoch, each of rows: {per_step}; {run}"),
        ("time", f"an epoch takes more than {_duration(flop / speed)} on this {device.type}: {measured}"),
        ("memory", f"{as_text(needed)} predicted at a step's peak, {as_text(free_bytes(device))} free"),
    ]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    n, unit = (hours, "hours") if hours >= 2 else (minutes, "minutes") if minutes >= 2 else (seconds, "seconds")
    return f"{text_of(float(f'{n:.2g}'))} {unit}"  # two digits, for it is a guess


def _learned(config: RunConfig, sizes: ModelConfig) -> Learned | None:
    if config.train.base_learns:
        return Learned.of(sizes, learned_names(sizes, config.train))
    return None if config.train.strategy == "prefix" else Learned.of_lora(sizes, config.lora)


def work(sizes: ModelConfig, learned: Learned | None, tokens: int, predicted: int) -> int:
    """FLOP of the products with weights, at least: 2 a weight and token forward, 2 back through the blocks above the
    lowest that learns, 2 for what learns.

    predicted: tokens that the head multiplies; learned: None for a prefix, which is below all blocks
    """
    head, n = sizes.vocab_size * sizes.dim, sizes.n_layers
    block = (sizes.n_parameters - head * (1 if sizes.tied_embeddings else 2)) // n
    if learned is None:
        return 4 * (block * n * tokens + head * predicted)
    above = n if learned.embedding else max(0, len(learned.reached) - 1)
    blocks = block * (n + above) + sum(learned.blocks)
    heads = head * (1 + bool(learned.reached or learned.norm)) + learned.head
    return 2 * (blocks * tokens + heads * predicted)


def _flop_per_s(sizes: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    dtype = product_dtype_of(dtype, device)
    x, weight = (torch.ones(n, sizes.dim, device=device, dtype=dtype) for n in (tokens, sizes.hidden_dim))
    product = Timer(lambda: (x @ weight.T)[0, 0].item())  # waits for the device
    product.timeit(1)  # only warms up
    n, seconds = product.autorange()  # 0.2 seconds or more
    return 2 * n * x.numel() * sizes.hidden_dim / seconds


def fix_data(config: RunConfig, out: str) -> str:
    """Write the training data as JSONL without what is wrong in them; a line that says what was done.

    Kept of a damaged conversation is what stands before the damage, up to an answer. Left out are lines that cannot be
    mended, further copies of a record, and what validation or test hold, too.

    out: a new file. Raises UserError if nothing can be kept, or what was written has a fault still.
    """
    config, checkpoint = settled(config)
    whole = replace(config.data, validation_share=0.0, test_share=0.0, share=1.0)
    tokenizer, sizes = tokenizer_for(config.model, checkpoint), checkpoint.config
    text, left_out = mended(load_data(whole, tokenizer, sizes, mend=True))
    if not text:
        raise UserError(f"{out}: not written, nothing can be kept")
    atomic_write(out, text)
    load_data(replace(whole, train=out), tokenizer, sizes).refuse_faults()
    kinds = ", ".join(f"{n:,} x {kind}" for kind, n in left_out.items()) or "nothing"
    return f"written to {out}: {text.count(chr(10)):,} records; left out: {kinds}"
