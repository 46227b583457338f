"""What a finished run leaves: what was trained, with where it comes from, the answers, and summary.json."""

import platform
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minilora.checkpoint.adapter import save_adapter
from minilora.checkpoint.chat_template import write_tokenizer
from minilora.checkpoint.json_file import parse_object
from minilora.checkpoint.provenance import read_provenance, versions, write_provenance
from minilora.checkpoint.save import save_hf
from minilora.checkpoint.write import atomic_jsonl, atomic_write, verify_manifest
from minilora.config import base_folder, to_dict
from minilora.data.sources import sources
from minilora.errors import UserError
from minilora.evaluate.metrics import score
from minilora.hub import hub_name
from minilora.report.figures import label
from minilora.report.samples import markdown_table
from minilora.train.looks import looks
from minilora.train.run_folder import HELD_OUT, refuse_theirs
from minilora.train.setup import Run


def write_learnt(run: Run, metrics: dict[str, Any], anew: bool) -> None:
    """adapter/ or model/, with its provenance, of which `metrics` are a part; what lies there whole and tells of the
    same stays, unless `anew`."""
    learnt = run.folder.path / ("model" if run.config.train.base_learns else "adapter")
    if not anew and _is_whole(learnt, metrics):
        return
    refuse_theirs(learnt)
    provenance = _provenance(run) | {"metrics": metrics}

    def beside(model: Path) -> None:
        write_tokenizer(run.tokenizer, model)
        write_provenance(model, provenance | {"base_fingerprint": run.model.base_fingerprint})

    if run.config.train.base_learns:
        save_hf(run.model, learnt, dtype=torch.float32, overwrite=True, finish=beside)
    else:
        save_adapter(run.model, learnt, provenance=provenance, overwrite=True)


def _provenance(run: Run) -> dict[str, Any]:
    config, origin = run.config, run.state.origin
    held_out = [source.path for source in sources(config.data.validation)]
    held_out += [str(run.folder.path / HELD_OUT)] if run.held_out else []
    return {
        "data": origin["data"], "tokenizer": origin["tokenizer"], "base_path": _absolute(config.model.path),
        "tokenizer_path": config.model.tokenizer and _absolute(config.model.tokenizer),
        "validation_path": _absolute(held_out[0]) if held_out else None,
        "config": {"lora": to_dict(config.lora), "train": to_dict(config.train) | {"output": ""}},
        "versions": versions() | {"python": platform.python_version()},
    }  # fmt: skip


def _absolute(path: str) -> str:
    """The path as it is found from everywhere; "demo" and what the hub has are names."""
    return path if path == "demo" or hub_name(path) else str(base_folder(path).resolve())


def _is_whole(folder: Path, metrics: dict[str, Any]) -> bool:
    """Whether what was trained lies there as it was written, and tells of these figures, if it tells of any."""
    with suppress(UserError):
        verify_manifest(folder)
        return bool(read_provenance(folder).get("metrics", metrics) == metrics)
    return False


def write_summary(run: Run, figures: dict[str, Any]) -> None:
    """summary.json: the figures, and what the run took."""
    counters, path = run.state.counters, run.folder.path
    speeds = [record["tok_per_s"] for record in records(path / "timing.jsonl", "tok_per_s")]
    summary = figures | {
        "test_looks": len(looks(path)), "peak_memory_bytes": run.memory.summary(),
        "predicted_memory_bytes": run.predicted_bytes, "stopped_because": run.stopped_because,
        "tok_per_s": statistics.median(speeds) if speeds else None,  # None if the disk was too full to note any
        "steps": counters.step, "updates": counters.updates, "best_step": counters.best_step or None,
        "trainable_parameters": sum(p.numel() for p in run.state.weights.values()),
    }  # fmt: skip
    run.folder.write_json("summary.json", summary)


def write_answers(run: Run) -> None:
    """generated.jsonl: every validation answer before and after; samples.md: the first ones, and the probes."""
    given_before = [answer["given"] for answer in run.before["answers"]]
    _, each = score(run.after, run.config.eval.metrics)
    keys = ("where", "prompt", "expected", "before", "after")
    rows = [(a.where, a.prompt, a.expected, b, a.given) for a, b in zip(run.after, given_before, strict=True)]
    lines = [dict(zip(keys, row, strict=True)) | figures for row, figures in zip(rows, each, strict=True)]
    atomic_jsonl(run.folder.path / "generated.jsonl", lines)
    prompts = [run.tokenizer.decode(probe.tokens.tolist()) for probe in run.forgetting.probes]
    probes = zip(prompts, run.before["probes"], run.forgetting.answers(run.model), strict=True)
    head = [label(key, run.config.train.adapter) for key in keys[1:]]
    samples = markdown_table("Samples", head, [row[1:] for row in rows[: run.config.eval.samples]])
    tables = filter(None, (samples, markdown_table("Probes", (head[0], *head[2:]), probes)))
    atomic_write(run.folder.path / "samples.md", "\n".join(tables))


def records(log: Path, *keys: str) -> list[dict[str, Any]]:
    """The lines of a log that can be read and have the keys: none, if the disk was too full to note any."""
    parsed = list[dict[str, Any]]()
    for line in log.read_bytes().split(b"\n") if log.exists() else ():
        with suppress(ValueError):
            parsed.append(parse_object(line))
    return [record for record in parsed if record.keys() >= {*keys}]
