"""A fine-tuning run: set up, step, validate, save, finish.

base -> NF4 -> adapters;  data -> samples -> packed rows
measure; then until done: take rows, step, now and then validate and save; then measure again
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.json_file import parse_object
from minilora.checkpoint.provenance import read_provenance, versions
from minilora.checkpoint.save import save_hf
from minilora.checkpoint.write import atomic_write, verify_manifest
from minilora.config import RunConfig, to_dict
from minilora.data.encode import Sample
from minilora.data.pack import RowSampler, make_batch
from minilora.data.sources import sources
from minilora.errors import UserError, is_out_of_memory
from minilora.evaluate.advice import advise
from minilora.evaluate.answers import Answer, answer_samples, has_prompt
from minilora.evaluate.metrics import score
from minilora.evaluate.perplexity import mean_loss, perplexity
from minilora.hub import is_hub_id
from minilora.lora import adapters_off
from minilora.train.graph import StepGraphs
from minilora.train.looks import TRAIN, looks, note_look
from minilora.train.run_folder import HELD_OUT, RunFolder, refuse_theirs, to_json
from minilora.train.schedule import lr_at
from minilora.train.setup import Reporter, Run, set_up
from minilora.train.signals import Stopped, StopRequest
from minilora.train.state import load_weights, random_state
from minilora.train.step import train_step
from minilora.train.strategies import MovementCheck
from minilora.train.tensorboard import scalars


def fine_tune(
    config: RunConfig, reporter: Reporter, resume: bool = False, overwrite: bool = False, with_test: bool = True
) -> Run:
    """Train as configured and leave the run folder complete but for the report. The model comes back in eval mode.

    with_test: False leaves the test file closed; a resume of the finished run opens it

    Raises UserError for what the user can mend, and Stopped (from signals.py) once a signal was followed.
    """
    folder = RunFolder.open(config, resume, overwrite)
    try:
        run = set_up(config, folder, reporter)
        go_on_or_begin(run, resume)
        begun_at = run.state.counters.step
        run_steps(run)
        finish(run, with_test, anew=run.state.counters.step > begun_at)
        return run
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory; set train.activation_checkpointing, or lower "
            "data.max_seq_len, lora.rank, train.batch_size (train.accumulate makes up for it) or eval.batch_size"
        ) from error
    finally:
        reporter.end()
        folder.close()


def go_on_or_begin(run: Run, resume: bool) -> None:
    """Load the last checkpoint, or measure the untrained model. A run without one begins again: it ends the same.

    Only here does a new run change what the folder holds: a mistake in the configuration or the data has shown by now.
    """
    latest = run.folder.latest() if resume else None
    if latest is not None:
        written_by = run.state.load(latest)
        changed = [f"{k} {old} -> {versions()[k]}" for k, old in written_by.items() if versions()[k] != old]
        if changed:
            run.reporter.say(f"warning: {', '.join(changed)} since {latest.name}; the last bits may differ")
        counters, memory = run.state.counters, run.memory
        memory.private = counters.peak_private_bytes
        memory.device_allocated, memory.device_reserved = counters.peak_device_allocated, counters.peak_device_reserved
        run.reporter.say(f"going on after step {run.state.counters.step}")
        run.before = run.folder.read_json("before.json")
        if not run.before.keys() >= {"metrics", "answers", "probes"}:
            raise UserError(f"{run.folder.path}/before.json is not what a run writes; put it back, or add --overwrite")
    else:
        if resume and (run.folder.path / "summary.json").exists():
            raise UserError(f"{run.folder.path}: finished, and its checkpoints are gone; --overwrite begins anew")
        run.folder.begin(run.config)  # also on a resume: nothing is left to go on from but the configuration
        with adapters_off(run.model):  # a new prefix is noise: "before" is the base
            metrics, answers = measure(run, run.validation)
        run.before = {"metrics": metrics, "answers": [vars(a) for a in answers], "probes": run.forgetting.said}
        run.before |= {"data": run.state.origin["data"]}
        run.folder.write_json("before.json", run.before)
    if run.held_out:
        atomic_write(run.folder.path / HELD_OUT, run.held_out)
    run.folder.metrics.cut(run.state.counters.metrics_bytes)
    run.folder.timing.cut(run.state.counters.timing_bytes)


def measure(run: Run, samples: list[Sample]) -> tuple[dict[str, Any], list[Answer]]:
    """Loss and perplexity of all samples, and `eval.metrics` of the first `eval.answers` that end in an answer; those
    answers, or as many as `eval.samples` shows, if that is more."""
    if not samples:
        return {}, []
    limits = run.config.eval
    loss, _ = mean_loss(run.model, samples, run.config.data.max_seq_len, limits.batch_size)
    chats = [s for s in samples if has_prompt(s)][: max(limits.answers, limits.samples)]
    answers = answer_samples(run.model, run.tokenizer, chats, limits.max_new_tokens, limits.batch_size)
    figures, _ = score(answers[: limits.answers], limits.metrics)
    return {"loss": loss, "perplexity": perplexity(loss)} | figures, answers


def run_steps(run: Run) -> None:
    """Step until the last step, no more progress, or a signal."""
    counters = run.state.counters
    check: MovementCheck | None = MovementCheck(run.state.weights) if counters.updates < 2 else None
    run.model.train()
    run.reporter.begin(counters.step, run.n_steps)
    board = run.folder.path / "tensorboard" if run.config.train.tensorboard else None
    with StopRequest() as stop, scalars(board, counters.step + 1, run.reporter.say) as log_scalars:

        def follow() -> None:
            stop.follow(f"{run.folder.path}: stopped after step {counters.step}, saved; go on with --resume")

        while counters.step < run.n_steps and not _out_of_patience(run):
            random = random_state()
            try:
                metrics, timing = one_step(run, follow)
            except Stopped:  # in the midst of the step: it is taken anew
                save(run, random)
                raise
            if check is not None and "skipped" not in metrics:
                _refuse_still_weights(check, counters.updates, metrics["lr"])
                check = check if counters.updates < 2 else None
            if counters.step % run.config.eval.every == 0 or counters.step == run.n_steps:
                _make_room(run)
                metrics |= validate(run)
            for log, record in ((run.folder.metrics, metrics), (run.folder.timing, timing)):
                if trouble := log.append(record):
                    run.reporter.say(f"warning: {trouble}")
                log_scalars(record)
            run.reporter.step(metrics, timing)
            _refuse_bad_steps(run)
            is_last = counters.step == run.n_steps or _out_of_patience(run)
            if stop.requested or is_last or counters.step % run.config.train.checkpoint_every == 0:
                save(run)
            follow()
    _make_room(run)
    run.model.eval()


def _make_room(run: Run) -> None:
    """Recorded steps hold the memory of their activations, which evaluation needs for its own."""
    if isinstance(run.backward, StepGraphs):
        run.backward.release()


def one_step(run: Run, follow: Callable[[], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the next rows, train on them, count; the step's lines for metrics.jsonl and timing.jsonl.

    follow: called before each micro-batch; where it raises, the step has changed nothing but the random state
    """
    train, counters, began = run.config.train, run.state.counters, time.perf_counter()

    def micro_batches(sampler: RowSampler) -> Iterator[list[list[int]]]:
        for _ in range(train.accumulate):
            follow()
            yield sampler.take(train.batch_size)

    run.memory.start()
    ahead, n_tokens, n_targets = copy(run.state.sampler), 0, 0
    for rows in micro_batches(ahead):  # counted first, since a target's weight in the loss depends on all of them
        n_tokens += sum(run.train[i].length for row in rows for i in row)
        n_targets += sum(run.train[i].n_targets for row in rows for i in row)
    length = run.config.data.max_seq_len
    batches = (make_batch(run.train, rows, length) for rows in micro_batches(copy(run.state.sampler)))
    lr, scale = lr_at(counters.updates, run.n_steps, train), run.state.loss_scale
    result = train_step(run.model, run.state.optimizer, batches, lr, train.clip_norm, scale, run.backward, n_targets)
    run.memory.note()
    counters.step += 1
    counters.tokens += n_tokens
    counters.target_tokens += n_targets
    metrics: dict[str, Any] = {"step": counters.step, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
    metrics |= {"tokens": counters.tokens, "target_tokens": counters.target_tokens}
    if result.updated:
        counters.updates += 1
        counters.bad_in_a_row = 0
    else:
        counters.bad_in_a_row += 1
        rows = run.state.sampler.take(train.batch_size * train.accumulate)
        metrics |= {"skipped": True, "samples": [run.train[i].where for row in rows for i in row]}
    run.state.sampler = ahead
    seconds = time.perf_counter() - began
    timing = {"step": counters.step, "seconds": seconds, "tok_per_s": n_tokens / seconds}
    return metrics, timing | {"memory_bytes": run.memory.now_bytes()}


def _refuse_bad_steps(run: Run) -> None:
    """A step whose loss or gradient was not finite left everything as it was; too many in a row end the run."""
    counters, limit = run.state.counters, run.config.train.max_bad_steps
    if counters.bad_in_a_row >= limit and not run.state.loss_scale.shrinking:
        raise UserError(
            f"{run.folder.path}: loss or gradient was not finite {counters.bad_in_a_row} times in a row, up to step "
            f"{counters.step}; their samples stand in metrics.jsonl; lower train.lr, or look at those samples"
        )


def _refuse_still_weights(check: MovementCheck, updates: int, lr: float) -> None:
    if still := check.still(updates, lr):
        raise UserError(
            f"after update {updates}, {len(still)} of {len(check.parameters)} trained tensors stand still, "
            f"the first: {still[0]}; they would learn nothing, so the run stops here"
        )


def validate(run: Run) -> dict[str, float]:
    """Loss on the validation file and on the general text, where they are given; a new best of the former is saved, and
    the validations since it are counted."""
    counters = run.state.counters
    general = {f"general_{name}": value for name, value in run.forgetting.glance(run.model).items()}
    if not run.validation:
        return general
    loss, _ = mean_loss(run.model, run.validation, run.config.data.max_seq_len, run.config.eval.batch_size)
    if loss < (inf if counters.best_loss is None else counters.best_loss):  # never true of NaN
        counters.best_loss, counters.best_step, counters.validations_since_best = loss, counters.step, 0
        run.state.save(run.folder.checkpoint("best", counters.step), weights_only=True)
    else:
        counters.validations_since_best += 1
    return {"val_loss": loss, "val_perplexity": perplexity(loss)} | general


def _out_of_patience(run: Run) -> bool:
    patience, counters = run.config.eval.patience, run.state.counters
    if patience == 0 or counters.validations_since_best < patience:
        return False
    run.stopped_because = f"no better validation in {patience} since step {counters.best_step}"
    return True


def save(run: Run, random: dict[str, Tensor] | None = None) -> None:
    """A checkpoint to go on from, with this random state or the present one; then those it replaces are deleted."""
    counters, folder, memory = run.state.counters, run.folder, run.memory
    counters.metrics_bytes, counters.timing_bytes = folder.metrics.sync(), folder.timing.sync()
    counters.peak_private_bytes = memory.private
    counters.peak_device_allocated, counters.peak_device_reserved = memory.device_allocated, memory.device_reserved
    run.state.save(folder.checkpoint("step", counters.step), random=random)
    folder.prune(run.config.train.keep_checkpoints, {counters.best_step})


def finish(run: Run, with_test: bool, anew: bool) -> None:
    """Put the best weights back, measure again, open the test file, write what was trained.

    anew: steps were taken; else what was trained may lie there already, and is left alone
    """
    counters, folder = run.state.counters, run.folder
    if counters.updates == 0:
        raise UserError(f"{folder.path}: no step could be taken, loss or gradient was never finite; lower train.lr")
    if counters.best_loss is not None and counters.best_step != counters.step:
        load_weights(run.state.weights, folder.checkpoint("best", counters.best_step))
    after, run.after = measure(run, run.validation)
    _write_answers(run)
    forgetting = run.forgetting.report(run.model)
    advice = advise(_records(folder.path / "metrics.jsonl", "step", "lr"), forgetting)
    for sentence in advice:
        run.reporter.say(f"advice: {sentence}")
    test = open_test(run) if with_test else {}
    held_out = _absolute(str(folder.path / HELD_OUT)) if run.held_out else None
    provenance = {k: run.state.origin[k] for k in ("data", "tokenizer")} | {
        "base_path": _absolute(run.config.model.path),
        "tokenizer_path": run.config.model.tokenizer and _absolute(run.config.model.tokenizer),
        "validation_path": next((_absolute(s.path) for s in sources(run.config.data.validation)), held_out),
        "config": {"lora": to_dict(run.config.lora), "train": to_dict(run.config.train) | {"output": ""}},
        "versions": versions() | {"python": platform.python_version()},
        "metrics": {"before": run.before["metrics"], "after": after, "test": test},
    }
    learnt = folder.path / ("model" if run.config.train.base_learns else "adapter")
    if anew or not _is_whole(learnt, provenance["metrics"]):
        refuse_theirs(learnt)
        if run.config.train.base_learns:
            save_hf(run.model, learnt, dtype=torch.float32, tokenizer=run.tokenizer.path, overwrite=True)
        else:
            save_adapter(run.model, learnt, provenance=provenance, overwrite=True)
    speeds = [record["tok_per_s"] for record in _records(folder.path / "timing.jsonl", "tok_per_s")]
    summary = {
        "before": run.before["metrics"], "after": after, "test": test, "test_looks": len(looks(folder.path)),
        "forgetting": forgetting, "advice": advice, "peak_memory_bytes": run.memory.summary(),
        "predicted_memory_bytes": run.predicted_bytes, "stopped_because": run.stopped_because,
        "tok_per_s": statistics.median(speeds) if speeds else None,  # None if the disk was too full to note any
        "steps": counters.step, "updates": counters.updates, "best_step": counters.best_step,
        "trainable_parameters": sum(p.numel() for p in run.state.weights.values()),
    }  # fmt: skip
    folder.write_json("summary.json", summary)


def _is_whole(folder: Path, metrics: dict[str, Any]) -> bool:
    """Whether what was trained lies there as it was written, and tells of these figures, if it tells of any."""
    with suppress(UserError):
        verify_manifest(folder)
        return bool(read_provenance(folder).get("metrics", metrics) == metrics)
    return False


def open_test(run: Run) -> dict[str, Any]:
    """The figures of the test file. What this run has seen of it already, it does not look at again."""
    own = [look["figures"] for look in looks(run.folder.path) if look["command"] == TRAIN]
    if own or not run.test:
        return own[0] if own else {}
    figures, _ = measure(run, run.test)
    data = run.state.origin["data"]
    source = data.get("test", data["train"])  # a test that is split off has no file of its own
    if warning := note_look(run.folder.path, TRAIN, source, figures):
        run.reporter.say(f"warning: {warning}")
    return figures


def _absolute(path: str) -> str:
    """The path as it is found from everywhere; "demo" and what the hub has are names."""
    return path if path == "demo" or is_hub_id(path) else str(Path(path).expanduser().resolve())


def _write_answers(run: Run) -> None:
    """generated.jsonl: every validation answer before and after; samples.md: the first ones, and the probes."""
    said = [answer["given"] for answer in run.before["answers"]]
    _, each = score(run.after, run.config.eval.metrics)
    rows = [(a.where, a.prompt, a.expected, b, a.given) for a, b in zip(run.after, said, strict=True)]
    keys = ("where", "prompt", "expected", "before", "after")
    lines = [to_json(dict(zip(keys, row, strict=True)) | figures) for row, figures in zip(rows, each, strict=True)]
    atomic_write(run.folder.path / "generated.jsonl", "".join(line + "\n" for line in lines))
    text = _markdown("Samples", keys[1:], [row[1:] for row in rows[: run.config.eval.samples]])
    if prompts := [run.tokenizer.decode(probe.tokens.tolist()) for probe in run.forgetting.probes]:
        probes = zip(prompts, run.before["probes"], run.forgetting.answers(run.model), strict=True)
        text += "\n" + _markdown("Probes", ("prompt", "before", "after"), probes)
    atomic_write(run.folder.path / "samples.md", text)


def _markdown(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table under a title."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
    return "\n".join([f"# {title}", "", lines[0], "|" + "---|" * len(head), *lines[1:], ""])


def _cell(text: str) -> str:
    return "<br>".join(text.strip().replace("|", "\\|").splitlines())


def _records(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Those that can be read and have the keys: none, if the disk was too full to note any."""
    records = list[dict[str, Any]]()
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            records.append(parse_object(line))
    return [record for record in records if record.keys() >= {*keys}]
