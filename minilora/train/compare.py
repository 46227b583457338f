"""Strategies, or any keys, on the same data and seed: a run each, ranked on validation; the best alone opens the test.

Each run is a process of its own, so its memory and its speed are its own, and one that fails ends nothing but itself.
"""

import os
import re
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from itertools import product
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minilora.checkpoint.json_file import read_json
from minilora.checkpoint.provenance import read_provenance
from minilora.checkpoint.write import atomic_json
from minilora.config import RunConfig
from minilora.errors import UsageError, UserError
from minilora.evaluate.comparable import made_of, refuse_unranked
from minilora.report.comparison import SHARE, best_of
from minilora.report.console import Console
from minilora.report.figures import figures_of
from minilora.report.page import write_report
from minilora.toml import config_toml
from minilora.train.looks import looks
from minilora.train.loop import fine_tune
from minilora.train.progress import ConsoleReporter
from minilora.train.run_folder import LOCK, hold, refuse_both
from minilora.train.setup import settled
from minilora.train.signals import SIGNALS, Stopped, StopRequest
from minilora.train.state import STATE, refuse_other_run

RESULT = "compare.json"

# What a strategy sets, whatever the configuration's own is, and how large its learning rate is beside that of adapters:
# with all weights smaller steps go as far, and a prefix, which starts as noise of size 1, wants ones as large as
# ChatGLM's (2e-2 where 2e-4 is usual). A prefix goes with any base; of the others qlora and dora alone have it in NF4.
_STORED = {"model.quantize": "auto"}
_NOT_PARTIAL, _NOT_DORA = {"train.layers": "null", "train.parameters": "[]"}, {"lora.dora": "false"}
STRATEGIES: dict[str, tuple[dict[str, str], float]] = {
    "full": ({"train.strategy": "full"} | _STORED | _NOT_PARTIAL | _NOT_DORA, 0.1),
    "partial": ({"train.strategy": "partial", "train.layers": "2"} | _STORED | _NOT_DORA, 1.0),
    "lora": ({"train.strategy": "lora"} | _STORED | _NOT_PARTIAL | _NOT_DORA, 1.0),
    "qlora": ({"train.strategy": "qlora"} | _STORED | _NOT_PARTIAL | _NOT_DORA, 1.0),
    "dora": ({"train.strategy": "qlora", "lora.dora": "true"} | _STORED | _NOT_PARTIAL, 1.0),
    "prefix": ({"train.strategy": "prefix"} | _NOT_PARTIAL | _NOT_DORA, 100.0),
}


# Of a grid. A section's name alone would name a file of it, and the verb's own options are no part of a run.
_KEYS = {"recipe", *(f"{s.name}.{key.name}" for s in fields(RunConfig) for key in fields(getattr(RunConfig(), s.name)))}

Configured = Callable[[Mapping[str, str]], RunConfig]


@dataclass(frozen=True)
class Variant:
    """One of the runs: what it is called, what it changes of the common configuration, and its own."""

    name: str
    changes: dict[str, str]
    config: RunConfig


def combinations(
    strategies: Sequence[str], grid: Sequence[str], shares: Sequence[str], lr: float, own: str = "qlora"
) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, keys and values) of each run: every strategy with every combination of the grid, on all of the data, and
    with the first combination on the `shares` of them. No strategy: the configuration's own.

    grid: "KEY=A,B", each; commas in brackets are a value's own
    lr, own: learning rate and strategy of the configuration; a partial one says itself which weights learn

    Raises UsageError for what is no grid, for a key that no configuration has, and for an unknown strategy.
    """
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise UsageError(f"there is no strategy {unknown[0]!r} to compare; there are {', '.join(STRATEGIES)}")
    axes = list[list[tuple[str, str]]]()
    for axis in grid:
        key, text = axis.partition("=")[0].replace("-", "_"), axis.partition("=")[2]
        values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", text)]
        if not key or not all(values):
            raise UsageError(f"--grid {axis}: it must be KEY=A,B, such as train.lr=1e-4,2e-4")
        if key not in _KEYS:
            raise UsageError(f"--grid {axis}: {key} is no key of a configuration, such as lora.rank")
        not_here = {"train.output": "folders go by --output"} | {known: "twice" for (known, _), *_ in axes}
        not_here |= {"train.strategy": "--strategies names them"} if strategies else {}
        if key in not_here:
            raise UsageError(f"--grid {axis}: {not_here[key]}; drop it")
        axes.append([(key, value) for value in values])
    for strategy in strategies or [""]:
        sets, times = STRATEGIES.get(strategy, ({}, STRATEGIES[own][1]))
        sets = {"train.strategy": "partial"} | _NOT_DORA if own == strategy == "partial" else sets
        if (factor := times / STRATEGIES[own][1]) != 1:
            sets = {"train.lr": f"{lr * factor:g}"} | sets
        for n, values_of in enumerate(product(*axes)):
            for share in [None, *(shares if n == 0 else [])]:
                varied = dict(values_of) | ({} if share is None else {SHARE: share})
                name = [strategy, *(f"{key.split('.')[-1]}={value}" for key, value in varied.items())]
                yield _folder_name("-".join(part for part in name if part)) or "run", sets | varied


def _folder_name(name: str) -> str:
    """The name as a folder's, which has 255 bytes at most, its log's ending included."""
    data = os.fsencode(name := name.replace("/", "_"))
    cut = f"{data[:90].decode(errors='ignore')}-{blake2b(data, digest_size=4).hexdigest()}"
    return name if len(data) <= 100 else cut


def all_variants(
    strategies: Sequence[str], grid: Sequence[str], shares: Sequence[str], configured: Configured
) -> list[Variant]:
    """The `combinations` as runs, one a configuration. configured: the common configuration with these keys changed.

    Raises UsageError as `combinations` does, where two runs have one name, and for what an adapter to go on from fixes.
    """
    common = configured({}).train
    pairs = list(combinations(strategies, grid, shares, common.lr, common.strategy))
    varied = sorted({key for _, changes in pairs for key, _ in changes.items() - _NOT_DORA.items()} - {"lora.dropout"})
    fixed = [key for key in varied if key.startswith("lora.")]
    if fixed and common.adapter:
        raise UsageError(f"{fixed[0]} cannot be compared: it is the adapter's own that train.adapter names; drop one")
    variants = [Variant(name, changes, configured(changes)) for name, changes in pairs]
    if twins := [name for name, n in Counter(variant.name for variant in variants).items() if n > 1]:
        raise UsageError(f"two of the runs are {twins[0]}; name each strategy and value once")
    return [v for n, v in enumerate(variants) if v.config not in [earlier.config for earlier in variants[:n]]]


def compare(
    variants: Sequence[Variant],
    output: Path,
    say: Callable[[str], None],
    rank_by: str = "loss",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run all, each in a folder of its name in `output`; what compare.json holds: a row a run, the winner and its test,
    with the runs in `output` for which that was opened.

    rank_by: "loss", "perplexity" or a figure of eval.metrics; resume: keep the runs that are finished, and go on with
    the others. A run that fails is a row with "failed". Raises UserError if there is nothing to rank by, before one is
    trained where that can be known, and if `output` is taken.
    """
    refuse_both(resume, overwrite)
    refuse_unranked({variant.name: variant.config for variant in variants}, rank_by)
    taken = output.exists() and (not output.is_dir() or {child.name for child in output.iterdir()} - {LOCK})
    if taken and not (resume or overwrite):
        raise UserError(f"{output} is not empty; add --resume to go on, --overwrite to begin anew, or --output")
    rows = list[dict[str, Any]]()
    configs = {v.name: replace(v.config, train=replace(v.config.train, output=str(output / v.name))) for v in variants}
    with hold(output, "comparison", "--output"):  # two would mix their runs
        finished = {name for name, config in configs.items() if resume and _is_finished(config)}
        for n, variant in enumerate(variants, 1):
            config = configs[variant.name]
            what = f"{n} of {len(variants)}  {variant.name}"
            if variant.name not in finished:
                say(f"{what} ...  (its steps are in {config.train.output}.log)")
            failed = None if variant.name in finished else in_a_process(config, resume, overwrite)
            figures: dict[str, Any] = {"failed": failed} if failed else _figures(config)
            rows.append({"name": variant.name, "changes": variant.changes} | figures)
            say(f"{what}: {failed or figures_of(figures['after'])}")
        best = best_of(rows, rank_by)
        winner = configs[best]
        summary = Path(winner.train.output) / "summary.json"
        is_closed = (winner.data.test or winner.data.test_share) and not read_json(summary)["test"]
        if is_closed and (failed := in_a_process(winner, resume=True, overwrite=False, with_test=True)):
            raise UserError(f"{winner.train.output}: its test could not be opened: {failed}")
        test = read_json(summary)["test"]
        # An earlier comparison here may have opened it for another run.
        seen = {run.name: [look.get("sha256") for look in looks(run)] for run in output.iterdir() if run.is_dir()}
        seen_by = sorted(name for name, files in seen.items() if any(file in seen[best] for file in files))
        result = {"ranked_by": rank_by, "winner": best, "test": test, "test_seen_by": seen_by, "rows": rows}
        atomic_json(output / RESULT, result)
    return result


def _figures(config: RunConfig) -> dict[str, Any]:
    """The figures of a finished run that the comparison shows."""
    summary = read_json(Path(config.train.output) / "summary.json")
    kept = ("before", "after", "forgetting", "peak_memory_bytes", "tok_per_s", "steps", "trainable_parameters")
    own = {"lr": config.train.lr, "share": config.data.share}
    return own | {key: summary[key] for key in (*kept, "best_step") if key in summary}


def _is_finished(config: RunConfig) -> bool:
    """Whether the folder holds that run whole. Raises UserError if data, base or tokenizer of the run that it holds,
    whole or not, are others by now."""
    folder = Path(config.train.output)
    if not (folder / "config.toml").exists():
        return False
    config, checkpoint = settled(config)
    same = (folder / "config.toml").read_bytes() == config_toml(config).encode()
    is_whole = same and (folder / "summary.json").exists()
    provenance = read_provenance(folder / ("model" if config.train.base_learns else "adapter")) if is_whole else {}
    latest = max(folder.glob(f"checkpoints/step-{'[0-9]' * 8}/{STATE}"), default=None)
    if began := provenance or (read_json(latest).get("origin", {}) if latest else {}):
        now = made_of(config, checkpoint)
        refuse_other_run({key: began.get(key, began.get("base")) for key in now}, now, folder)  # as a state has it
    return bool(provenance)  # else its process goes on with it, or says why it cannot


def in_a_process(
    config: RunConfig, resume: bool = False, overwrite: bool = False, with_test: bool = False, stop_after: int = 0
) -> str | None:
    """Run it; return why it failed, if it did. A signal is handed on, and raises Stopped once the run has saved.

    stop_after: the step after which the run stops as if by a signal; 0: none
    """
    context = get_context("forkserver")  # torch is imported once, and each run starts from there
    context.set_forkserver_preload(["minilora.train.compare"])
    ours, theirs = context.Pipe(duplex=False)
    resume = resume and (Path(config.train.output) / "config.toml").exists()
    process = context.Process(target=_run, args=(config, resume, overwrite, with_test, stop_after, theirs))
    resource_tracker.ensure_running()  # else `start` runs it, and that lets signals through
    with StopRequest() as stop:
        # What is sent to all of us, as by a Ctrl-C, must not end the fork server, or a run that is yet to be set up.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            process.start()
        except OSError as error:
            lies = f"its socket lies in TMPDIR, {os.environ.get('TMPDIR', '/tmp')}: name a short one, with room"
            raise UserError(f"the process of a run cannot be started: {error}; {lies}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        while process.is_alive() and stop.signum is None:
            process.join(0.1)
        if stop.signum is not None and process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, stop.signum)
        process.join()
        stop.follow(f"{Path(config.train.output).parent}: stopped; go on with --resume")
    try:
        message: str = ours.recv()
    except EOFError:
        message = f"its process ended with exit status {process.exitcode}, see {config.train.output}.log"
    return message or None


class _Stopping(ConsoleReporter):
    """Stops its run after the step `at`, as a signal does."""

    def __init__(self, console: Console, at: int) -> None:
        super().__init__(console)
        self._at = at

    def step(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        super().step(metrics, timing)
        if metrics["step"] == self._at:
            signal.raise_signal(signal.SIGTERM)


def _run(
    config: RunConfig, resume: bool, overwrite: bool, with_test: bool, stop_after: int, result: Connection
) -> None:
    """Fine-tune, in the new process, and send "" over `result` if all went well, else what went wrong."""
    os.setsid()  # a Ctrl-C goes to the parent alone, which hands it on
    log, wrong = Path(f"{config.train.output}.log"), ""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        with log.open("a" if resume else "w") as file:
            run = fine_tune(config, _Stopping(Console(file=file), stop_after), resume, overwrite, with_test)
        write_report(run.folder.path)
    except (UserError, Stopped) as error:
        wrong = "" if stop_after and isinstance(error, Stopped) else str(error)
    except KeyboardInterrupt:  # before its steps, or after them
        wrong = "stopped"
    except Exception as error:
        wrong = f"{type(error).__name__}, see {log}"
        with suppress(OSError), log.open("a") as file:
            traceback.print_exc(file=file)
    with suppress(BrokenPipeError):  # nobody waits for it any more
        result.send(wrong)
