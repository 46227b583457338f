"""How everything here is measured: contestants in their own processes, in turns, medians, private memory.

    parent   start A, start B;   round: step A, step B;   round: step A, step B; ...
    child    import and build once, then wait for {"step": {...}} on stdin, time it, answer on a pipe of its own

What disturbs the machine disturbs both sides of a pair, so a ratio of medians over interleaved steps is what is quoted,
with the spread of the pairs' own ratios. A process each keeps the libraries apart (two OpenMP runtimes in one process
spin against each other) and gives each side memory figures of its own.

Memory is the child's private memory (RssAnon), read by the parent every few milliseconds while a step runs and at no
other time: so loading does not count, and code that holds Python's lock cannot hide from it. The largest resident size
(ru_maxrss), which counts loading and mapped files, stands beside it.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import select
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isclose
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from minilora.checkpoint.write import atomic_write
from minilora.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SAMPLE_S = 0.005  # between two readings of a child's memory
LIBRARIES = (
    *("torch", "triton", "transformers", "peft", "bitsandbytes", "mistral-common", "safetensors"),
    *("torchtune", "torchao"),
)
LOAD_1MIN = os.getloadavg()[0]  # before measuring: what others did on these cores
CPU_FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")

# A step as a child has it: keyword arguments from the parent, a JSON object (or None) back to it.
Step = Callable[..., Mapping[str, Any] | None]


# -- where and when ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on, without a host's name or a path."""
    cores = len(os.sched_getaffinity(0))
    info = _cpu_info()
    commit = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README*")
    flags = info.get("flags", info.get("Features", "")).split()
    memory = Path("/proc/meminfo").read_text().split()
    return {
        "cpu": info.get("model name", platform.machine()),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS", cores)),
        "ram_gib": round(int(memory[memory.index("MemTotal:") + 1]) / 2**20, 1),
        "load_1min": round(LOAD_1MIN, 1),
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """What git says, None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command() -> str:
    """The command that is running, as it would be typed, folders' paths taken off."""
    name = getattr(sys.modules["__main__"], "__spec__", None)
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    module = name.name.removesuffix(".__main__") if name else Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", module, *words])


# -- contestants -------------------------------------------------------------------------------------------------------


class ContestantError(RuntimeError):
    """A child failed, died or took too long. The message is its error's last line."""


@dataclass(frozen=True)
class Contestant:
    """Who competes.

    factory: "package.module:function", which gives a Step when the child calls it with `arguments` (JSON)
    env: environment variables of the child, beside ours
    """

    name: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One step: the most private memory while it ran, the most resident ever, and what the step returned."""

    seconds: float
    private_bytes: int
    max_rss_bytes: int
    result: dict[str, Any]


class Worker:
    """A contestant's process. Raises ContestantError where it cannot be built or does not answer."""

    def __init__(self, contestant: Contestant, timeout_s: float = 600.0) -> None:
        self.name = contestant.name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        answers, answers_of_child = os.pipe()
        env = {**os.environ, **contestant.env, "BENCHMARK_ANSWERS": str(answers_of_child)}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])  # cwd is the user's
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness"],
            env=env, stdin=subprocess.PIPE, stdout=self._errors, stderr=self._errors, pass_fds=[answers_of_child],
        )  # fmt: skip
        os.close(answers_of_child)
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self._unread = b""
        try:
            self._send({"factory": contestant.factory, "arguments": dict(contestant.arguments)})
            self.rest_bytes = int(self._answer(timeout_s)["private_bytes"])  # built, before its first step
        except BaseException:
            self.close()
            raise

    def step(self, timeout_s: float = 600.0, watch: bool = True, **arguments: Any) -> Measured:
        """One step with these arguments. watch: read its memory meanwhile."""
        self._send({"step": arguments})
        peaks: list[int] = []
        answer = self._answer(timeout_s, peaks if watch else None)
        peak = max(peaks, default=0)
        return Measured(
            answer["seconds"], max(peak, answer["private_bytes"]), answer["max_rss_bytes"], answer["result"]
        )

    def close(self) -> None:
        """End the process, at once if it does not go by itself."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise ContestantError(self._last_words()) from None

    def _answer(self, timeout_s: float, peaks: list[int] | None = None) -> dict[str, Any]:
        """The child's next line; meanwhile its private memory goes to `peaks`."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                self._process.kill()
                raise ContestantError(f"took longer than {timeout_s:.0f} s")
            wait = left if peaks is None else min(left, SAMPLE_S)
            if select.select([self._answers], [], [], wait)[0]:
                read = self._answers.read(1 << 16)
                if not read:
                    raise ContestantError(self._last_words())
                self._unread += read
            elif peaks is not None:
                peaks[:] = [max(peaks[0] if peaks else 0, private_bytes(self._process.pid))]
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """What a process that died wrote last, and how it ended."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with status {status}" + (f": {without_folders(lines[-1])}" if lines else "")


def private_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process: what it wrote itself, without mapped files, which the system can take back at any time."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:  # it has gone
        return 0
    _, _, after = status.partition(b"RssAnon:")
    return int(after.split(maxsplit=1)[0]) * 1024 if after else 0


def serve() -> None:
    """The child's side: build what the first line of stdin names, then step at each further line."""
    with os.fdopen(int(os.environ["BENCHMARK_ANSWERS"]), "w") as answers:

        def answer(message: Mapping[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            setup = json.loads(sys.stdin.readline())
            module, _, function = setup["factory"].partition(":")
            step: Step = getattr(importlib.import_module(module), function)(**setup["arguments"])
            answer({"private_bytes": private_bytes()})
        except Exception as error:
            answer(_failure(error))
            return
        for line in sys.stdin:
            try:
                answer(_timed(step, json.loads(line)["step"]))
            except Exception as error:
                answer(_failure(error))


def _timed(step: Step, arguments: Mapping[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = step(**arguments)
    seconds = time.perf_counter() - start
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "private_bytes": private_bytes(), "max_rss_bytes": rss, "result": dict(result or {})}


def _failure(error: Exception) -> dict[str, Any]:
    traceback.print_exc()
    lines = str(error).strip().splitlines()
    return {"error": without_folders(f"{type(error).__name__}: {lines[-1] if lines else ''}")}


def without_folders(text: str) -> str:
    """At most 500 characters of an error, for a file that others read: paths lose their folders."""
    return re.sub(r"(?<![\w.])/[^\s'\":]*/", "", text)[:500]


# -- races -------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What is known of one contestant: its steps, in order, or why there are none."""

    name: str
    steps: list[Measured] = field(default_factory=list)
    first: Measured | None = None  # the very first step, a warm-up or not
    rest_bytes: int = 0
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Median of the steps."""
        return median(step.seconds for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """The most private memory in any step."""
        return max(step.private_bytes for step in self.steps)

    @property
    def losses(self) -> list[float]:
        """Of all its steps, the warm-ups' first one too; none if no step counts."""
        steps = [step for step in self.steps if step is not self.first]
        return [float(step.result["loss"]) for step in (self.first, *steps) if step and self.steps]

    def step(self, worker: Worker, counts: bool, step_cap_s: float, watch: bool = True, **arguments: Any) -> bool:
        """Let `worker` do a step and take it down; whether it could."""
        try:
            measured = worker.step(step_cap_s, watch, **arguments)
        except ContestantError as error:
            self.error = str(error)
            return False
        self.first = self.first or measured
        if counts:
            self.steps.append(measured)
        return True

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        if not self.steps:
            return {"error": self.error or "no step"}
        figures: dict[str, Any] = {
            "seconds": self.seconds,
            "seconds_of_each": [step.seconds for step in self.steps],
            "peak_private_bytes": self.peak_bytes,
            "max_rss_bytes": max(step.max_rss_bytes for step in self.steps),
            "rest_private_bytes": self.rest_bytes,
        }
        return figures | ({"error": self.error} if self.error else {})


@dataclass
class Entrant:
    """A contestant whose process stands ready, or whose error says why it does not."""

    name: str
    worker: Worker | None = None
    error: str | None = None


@contextlib.contextmanager
def started(contestants: Sequence[Contestant], at_once: bool = False) -> Iterator[list[Entrant]]:
    """The contestants' processes, which end with the block. at_once: they are built side by side, where cores are."""

    def entrant(contestant: Contestant) -> Entrant:
        try:
            return Entrant(contestant.name, stack.enter_context(Worker(contestant)))
        except ContestantError as error:
            return Entrant(contestant.name, error=str(error))

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(contestants) if at_once else 1) as pool:
        yield list(pool.map(entrant, contestants))


def race(
    entrants: Sequence[Entrant],
    rounds: int,
    warm_ups: int = 2,
    cap_s: float = 600.0,
    step_cap_s: float = 600.0,
    watch: bool = True,
    **arguments: Any,
) -> list[Record]:
    """Step the entrants in turns, `rounds` times after `warm_ups` that do not count; one Record each.

    cap_s: no further round begins once this has passed since the warm-ups, but the first one does
    step_cap_s: a step that takes longer fails
    watch: read the memory
    arguments: of every step

    Who fails is out, with its error on record; the others go on.
    """
    records = [
        Record(entrant.name, error=entrant.error, rest_bytes=entrant.worker.rest_bytes if entrant.worker else 0)
        for entrant in entrants
    ]
    start = time.monotonic()
    for turn in range(-warm_ups, rounds):
        if turn <= 0:  # all warm-ups, whatever they take: in them kernels are compiled, and a step is recorded
            start = time.monotonic()
        elif time.monotonic() - start > cap_s:
            break
        for entrant, record in zip(entrants, records, strict=True):
            if entrant.worker and not record.error:
                record.step(entrant.worker, turn >= 0, step_cap_s, watch, **arguments)
    return records


def screen(contestant: Contestant, steps: int, slow_s: float, step_cap_s: float) -> Record:
    """A contestant alone, briefly: a warm-up and `steps` steps; but a first step slower than `slow_s` is the figure."""
    with started([contestant]) as [entrant]:
        record = Record(entrant.name, error=entrant.error)
        if entrant.worker and record.step(entrant.worker, False, step_cap_s) and record.first:
            record.rest_bytes = entrant.worker.rest_bytes
            if record.first.seconds > slow_s:
                record.steps.append(record.first)
                return record
            while len(record.steps) < steps and record.step(entrant.worker, True, step_cap_s):
                pass
    return record


def ratio(ours: Record, peer: Record) -> dict[str, Any]:
    """How many times faster ours is: the peer's median over ours, and the spread of the pairs' own ratios."""
    pairs = [b.seconds / a.seconds for a, b in zip(ours.steps, peer.steps, strict=False)]
    if not pairs:
        return {"n_pairs": 0}
    low, _, high = quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else (pairs[0],) * 3
    return {
        "of_medians": peer.seconds / ours.seconds,
        "of_pairs": {"min": min(pairs), "quarter": low, "three_quarters": high, "max": max(pairs)},
        "n_pairs": len(pairs),
    }


def same_losses(ours: Sequence[float], theirs: Sequence[float], first_rtol: float, rtol: float) -> bool:
    """Step by step, of the steps that both have, one at least. rtol: after updates, which rounding drives apart"""
    pairs = list(zip(ours, theirs, strict=False))
    rtols = [first_rtol, *[rtol] * len(pairs)]
    return bool(pairs) and all(isclose(*pair, rel_tol=rtol) for pair, rtol in zip(pairs, rtols, strict=False))


# -- results -----------------------------------------------------------------------------------------------------------


def row(what: str, ours: str, peer: str, ratio: str) -> dict[str, str]:
    """A line of docs/measured.md. Results hold such lines under "rows"; `benchmarks.table` collects them."""
    return {"what": what, "ours": ours, "peer": peer, "ratio": ratio}


def ratio_text(ratios: Mapping[str, Any]) -> str:
    """What `ratio` found, for a row."""
    pairs = ratios["of_pairs"]
    return f"{ratios['of_medians']:.2f} ({pairs['min']:.2f} to {pairs['max']:.2f})"


def write_result(name: str, data: Mapping[str, Any], out: str | Path | None = None) -> Path:
    """Write benchmarks/results/NAME.json, or `out`: sorted, floats in six figures, with machine and command.

    Where `data` has "parts" (objects by name, measured together or not), each part gets machine and command for itself,
    and the parts of an older file that were not measured anew stay; so does one with rows whose new one failed, which
    has an "error", or errors within and no rows.
    """
    path = _result_path(name, out)
    stamp = {"machine": machine(), "command": command()}
    if "parts" in data:
        parts = json.loads(path.read_text())["parts"] if path.exists() else {}
        for part, value in data["parts"].items():
            failed = "error" in value or (not value.get("rows") and any(_errors(value)))
            if failed and parts.get(part, {}).get("rows"):
                print(f"{path.name}: {part} failed, and keeps the figures that it had", file=sys.stderr)
            else:
                parts[part] = {**stamp, **value}
        whole = {**data, "parts": parts}
    else:
        whole = {**stamp, **data}
    atomic_write(path, json.dumps(_rounded(whole), indent=1, sort_keys=True) + "\n")
    return path


def _result_path(name: str, out: str | Path | None = None) -> Path:
    return Path(out) if out else RESULTS / f"{name}.json"


def check_result(name: str, out: str | Path | None = None, parts: bool = True) -> None:
    """Raise UserError where `write_result` could not write its file, or add its parts; to be known before measuring."""
    path = _result_path(name, out)
    was_there = path.exists()
    try:
        if parts and was_there and not isinstance(json.loads(path.read_text())["parts"], dict):
            raise TypeError
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write to another file with --out") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{path}: is no object with "parts"; write to another file with --out') from None


def _rounded(value: Any) -> Any:
    """`value` with its floats in six significant figures."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def rows_of(result: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], Mapping[str, Any]]]:
    """The table's lines in a result, each with the stamped object (machine, command) that it comes from."""
    for part in (result, *result.get("parts", {}).values()):
        yield from ((line, part) for line in part.get("rows", []))


def show(result: Mapping[str, Any]) -> None:
    """Print the rows of a result as a table, what failed below it; in plain text, so that a bare machine can."""
    lines = [("", "minilora", "peer", "ratio")]
    lines += [(line["what"], line["ours"], line["peer"], line["ratio"]) for line, _ in rows_of(result)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    for path, error in _errors(result):
        print(f"failed: {path}: {error}")


def _errors(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "error":
                yield path, str(item)
            else:
                yield from _errors(item, f"{path}/{key}".lstrip("/"))


if __name__ == "__main__":
    if "BENCHMARK_ANSWERS" not in os.environ:
        sys.exit("harness: the other benchmarks run in it; run one of them, such as python -m benchmarks.train_step")
    serve()
