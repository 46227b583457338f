"""A fine-tuning run: set up, step, validate, save, finish.

base -> NF4 -> adapters;  data -> samples -> packed rows
measure; then until done: take rows, step, now and then validate and save; then measure again
"""

import time
from collections.abc import Callable, Iterator
from copy import copy
from math import inf
from typing import Any

from torch import Tensor

from minilora.checkpoint.provenance import versions
from minilora.checkpoint.write import atomic_write
from minilora.config import RunConfig
from minilora.data.encode import Sample
from minilora.data.pack import PackedBatch, make_batch
from minilora.errors import UserError, is_out_of_memory
from minilora.evaluate.advice import advise
from minilora.evaluate.answers import Answer
from minilora.evaluate.measure import asked, measure
from minilora.evaluate.perplexity import mean_loss, perplexity
from minilora.generation import NotFiniteError
from minilora.lora import adapters_off
from minilora.train.graph import StepGraphs
from minilora.train.looks import TRAIN, looks, note_look
from minilora.train.results import records, write_answers, write_learnt, write_summary
from minilora.train.run_folder import HELD_OUT, RunFolder
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
    folder = RunFolder(config, resume, overwrite)
    try:
        run = set_up(config, folder, reporter)
        go_on_or_begin(run, resume)
        begun_at = run.state.counters.step
        run_steps(run)
        try:
            finish(run, with_test, anew=run.state.counters.step > begun_at)
        except NotFiniteError:  # as they were before training
            diverged = "training diverged: the trained model's logits are not finite"
            raise UserError(f"{folder.path}: {diverged}; lower train.lr or train.weight_decay") from None
        return run
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lower = "data.max_seq_len, lora.rank, train.batch_size (train.accumulate makes up for it) or eval.batch_size"
        raise UserError(f"out of memory; set train.activation_checkpointing, or lower {lower}") from error
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
        file = run.folder.path / "before.json"
        run.before = run.folder.read_json(file.name) if file.exists() else {}
        if not _fits(run, **run.before):
            raise UserError(f"{file} is missing, or not what a run writes; put it back, or add --overwrite")
    else:
        if resume and (run.folder.path / "summary.json").exists():
            raise UserError(f"{run.folder.path}: finished, and its checkpoints are gone; --overwrite begins anew")
        run.folder.begin(run.config)  # also on a resume: nothing is left to go on from but the configuration
        # A new prefix is noise, and an adapter may have learnt: "before" is the base, but for what train.reinit drew.
        with adapters_off(run.model):
            metrics, answers = _measure(run, run.validation)
        run.before = {"metrics": metrics, "answers": [vars(a) for a in answers], "probes": run.forgetting.base_answers}
        run.before |= {"data": run.state.origin["data"]}
        run.folder.write_json("before.json", run.before)
    if run.held_out:
        atomic_write(run.folder.path / HELD_OUT, run.held_out)
    run.folder.metrics.cut(run.state.counters.metrics_bytes)
    run.folder.timing.cut(run.state.counters.timing_bytes)


def _fits(run: Run, /, metrics: Any = None, answers: Any = None, probes: Any = None, **_rest: Any) -> bool:
    """Whether that is what before.json holds of this run: an answer for each that there will be after it."""
    n_answers, n_probes = len(asked(run.validation, run.config.eval)), len(run.forgetting.probes)
    if not (isinstance(metrics, dict) and isinstance(answers, list) and isinstance(probes, list)):
        return False
    given = [answer.get("given") if isinstance(answer, dict) else None for answer in answers]
    return (len(given), len(probes)) == (n_answers, n_probes) and all(isinstance(x, str) for x in [*given, *probes])


def _measure(run: Run, samples: list[Sample]) -> tuple[dict[str, Any], list[Answer]]:
    return measure(run.model, run.tokenizer, samples, run.config.data.max_seq_len, run.config.eval, run.reporter.say)


def run_steps(run: Run) -> None:
    """Step until the last step, no more progress, or a signal."""
    counters = run.state.counters
    check = MovementCheck(run.state.weights) if counters.updates < 2 else None
    run.model.train()
    run.reporter.begin(counters.step, run.n_steps)
    board = run.folder.path / "tensorboard" if run.config.train.tensorboard else None
    with StopRequest() as stop, scalars(board, counters.step + 1, run.reporter.say) as log_scalars:

        def follow() -> None:
            stop.follow(f"{run.folder.path}: stopped after step {counters.step}, saved; go on with --resume")

        while not _why_over(run):
            random = random_state()
            try:
                metrics, timing = one_step(run, follow)
            except Stopped:  # in the midst of the step: it is taken anew
                save(run, random)
                raise
            if check is not None and counters.updates <= 2 and "skipped" not in metrics:
                _refuse_still_weights(check, counters.updates, metrics["lr"])
            if counters.step % run.config.eval.every == 0 or _why_over(run):
                _make_room(run)
                metrics |= validate(run)
            for log, record in ((run.folder.metrics, metrics), (run.folder.timing, timing)):
                if trouble := log.append(record):
                    run.reporter.say(f"warning: {trouble}")
                log_scalars(record)
            run.reporter.step(metrics, timing)
            _refuse_bad_steps(run)
            is_due = counters.step % run.config.train.checkpoint_every == 0
            if is_due or stop.signum is not None or _why_over(run):
                save(run)
            follow()
    run.stopped_because = _why_over(run)
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
    run.memory.start()
    after = copy(run.state.sampler)
    taken = [after.take(train.batch_size) for _ in range(train.accumulate)]
    seen = [run.train[i] for rows in taken for row in rows for i in row]
    n_tokens, n_targets = sum(s.length for s in seen), sum(s.n_targets for s in seen)

    def batches() -> Iterator[PackedBatch]:
        for rows in taken:
            follow()
            yield make_batch(run.train, rows, run.config.data.max_seq_len)

    lr, scale = lr_at(counters.updates, run.n_steps, train), run.state.loss_scale
    result = train_step(run.backward, run.state.optimizer, batches(), n_targets, lr, train.clip_norm, scale)
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
        metrics |= {"skipped": True, "samples": [sample.where for sample in seen]}
    run.state.sampler = after
    seconds = time.perf_counter() - began
    timing = {"step": counters.step, "seconds": seconds, "tok_per_s": n_tokens / seconds}
    return metrics, timing | {"memory_bytes": run.memory.now_bytes()}


def _refuse_bad_steps(run: Run) -> None:
    """A step whose loss or gradient was not finite left everything as it was; too many in a row end the run."""
    counters, limit = run.state.counters, run.config.train.max_bad_steps
    if counters.bad_in_a_row >= limit and not run.state.loss_scale.shrinking:
        seen = f"loss or gradient was not finite {counters.bad_in_a_row} times in a row, up to step {counters.step}"
        remedy = "their samples stand in metrics.jsonl; lower train.lr, or look at those samples"
        raise UserError(f"{run.folder.path}: {seen}; {remedy}")


def _refuse_still_weights(check: MovementCheck, updates: int, lr: float) -> None:
    if still := check.still(updates, lr):
        which = f"{len(still)} of {len(check.parameters)} trained tensors stand still, the first: {still[0]}"
        raise UserError(f"after update {updates}, {which}; they would learn nothing, so the run stops here")


def validate(run: Run) -> dict[str, float]:
    """Loss on the validation file and on the general text, where they are given; a new best of the former is saved, and
    the validations since it are counted."""
    counters = run.state.counters
    general = {f"general_{name}": value for name, value in run.forgetting.glance(run.model).items()}
    if not run.validation:
        return general
    loss = mean_loss(run.model, run.validation, run.config.data.max_seq_len, run.config.eval.batch_size)
    if loss < (inf if counters.best_loss is None else counters.best_loss):  # never true of NaN
        counters.best_loss, counters.best_step, counters.validations_since_best = loss, counters.step, 0
        run.folder.drop_unsaved_best()
        run.state.save(run.folder.checkpoint("best", counters.step), weights_only=True)
    else:
        counters.validations_since_best += 1
    return {"val_loss": loss, "val_perplexity": perplexity(loss)} | general


def _why_over(run: Run) -> str:
    """Why there is no further step; nothing while there is one: beyond the last, too, until float16's scale lets one
    update."""
    counters, patience = run.state.counters, run.config.eval.patience
    if counters.step >= run.n_steps and (counters.updates or not run.state.loss_scale.shrinking):
        return "all steps done"
    if 0 < patience <= counters.validations_since_best:
        return f"no better validation in {patience} since step {counters.best_step}"
    return ""


def save(run: Run, random: dict[str, Tensor] | None = None) -> None:
    """A checkpoint to go on from, with this random state or the present one; then those it replaces are deleted."""
    counters, folder, memory = run.state.counters, run.folder, run.memory
    counters.metrics_bytes, counters.timing_bytes = folder.metrics.sync(), folder.timing.sync()
    counters.peak_private_bytes = memory.private
    counters.peak_device_allocated, counters.peak_device_reserved = memory.device_allocated, memory.device_reserved
    run.state.save(folder.checkpoint("step", counters.step), random=random)
    folder.prune(run.config.train.keep_checkpoints, counters.best_step)


def finish(run: Run, with_test: bool, anew: bool) -> None:
    """Put the best weights back, measure again, open the test file, write what was trained.

    anew: steps were taken; else what was trained may lie there already, and is left alone
    """
    counters, folder = run.state.counters, run.folder
    if counters.updates == 0:
        raise UserError(f"{folder.path}: no step could be taken, loss or gradient was never finite; lower train.lr")
    if counters.best_loss is not None and counters.best_step != counters.step:
        load_weights(run.state.weights, folder.checkpoint("best", counters.best_step))
    after, run.after = _measure(run, run.validation)
    write_answers(run)
    forgetting = run.forgetting.report(run.model)
    advice = advise(records(folder.path / "metrics.jsonl", "step", "lr"), forgetting)
    for sentence in advice:
        run.reporter.say(f"advice: {sentence}")
    test = open_test(run) if with_test else {}
    figures = {"before": run.before["metrics"], "after": after, "test": test}
    write_learnt(run, figures, anew)
    write_summary(run, figures | {"forgetting": forgetting, "advice": advice})


def open_test(run: Run) -> dict[str, Any]:
    """The figures of the test file. What this run has seen of it already, it does not look at again."""
    own = [look["figures"] for look in looks(run.folder.path) if look["command"] == TRAIN]
    if own or not run.test:
        return own[0] if own else {}
    figures, _ = _measure(run, run.test)
    if warning := note_look(run.folder.path, TRAIN, figures):
        run.reporter.say(f"warning: {warning}")
    return figures
