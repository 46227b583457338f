"""The run's page, report.html: one file that holds all of it, and three plots beside it.

What the run's files hold is text here, never markup: every word of it is escaped. A run that was cut off, that had no
validation or took one step only, has a page too; what is not there is left out.
"""

import json
import re
import tomllib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from minilora.checkpoint.json_file import parse_object, read_json
from minilora.checkpoint.write import atomic_write
from minilora.errors import UserError
from minilora.memory import as_text, peak_bytes
from minilora.report.figures import LOWER_IS_BETTER, label, text_of
from minilora.report.plots import draw

HIGHER_IS_BETTER = ("exact_match", "bleu", "rouge1", "rouge2", "rougeL", "f1")
SHOWN_ABOVE = ("before", "after", "test", "test_looks", "measured_on", "forgetting", "advice")
CAPTIONS = {
    "loss.png": "Training loss step by step; validation loss, and loss on the general text, where they were measured.",
    "learning_rate.png": "The learning rate, and how long the gradient was before it was clipped.",
    "speed.png": "Tokens a second, and memory in use after each step.",
}
CONTENTS = {
    "config.toml": "every setting; from where the run began, minilora train config.toml --overwrite runs it again",
    "metrics.jsonl": "a line a step: loss, learning rate, gradient norm, tokens",
    "timing.jsonl": "a line a step: seconds, tokens a second, memory",
    "summary.json": "the figures of this page",
    "samples.md": "the same prompts answered before and after",
    "generated.jsonl": "every validation answer before and after, with its metrics",
    "validation.jsonl": "the records that data.validation_share drew; a merge is audited on them",
    "test_looks.jsonl": "a line a look at the test file",
    "before.json": "what was measured before the first step",
    "adapter": "the trained adapter, in PEFT's layout",
    "model": "the trained model, in Hugging Face's layout",
    "merged": "base plus adapter as one model, in Hugging Face's layout",
    "checkpoints": "states to resume from",
    "tensorboard": "what TensorBoard shows",
}


def write_report(run_folder: Path) -> Path:
    """Draw loss.png, learning_rate.png and speed.png into the folder of a run, write its report.html, and return that.

    Raises UserError if the folder holds no metrics.jsonl, or a file in it cannot be read.
    """
    if not (run_folder / "metrics.jsonl").is_file():
        raise UserError(f"{run_folder}: no run lies here (no metrics.jsonl)")
    metrics, timing = _read_jsonl(run_folder / "metrics.jsonl"), _read_jsonl(run_folder / "timing.jsonl")
    config, results = _read_config(run_folder / "config.toml"), run_folder / "summary.json"
    summary = read_json(results) if results.exists() else {}
    train = config.get("train", {})
    adapter, plots = train.get("adapter"), draw(metrics, timing, float(train.get("clip_norm", 0.0)))
    for name, png in plots.items():
        atomic_write(run_folder / name, png)
    sections = [
        _header(run_folder, config, summary, metrics),
        _section("Before and after", _measured(summary, adapter) + _test_looks(run_folder / "test_looks.jsonl")),
        _section("Forgetting", _forgetting(summary, adapter)),
        _section("Advice", _advice(summary)),
        _section("The run", _figures(summary)),
        _section("Plots", "".join(_plot(name, png) for name, png in plots.items())),
        *_samples(run_folder / "samples.md"),
        _section("Settings", _settings(config)),
        _section("Files", _files(run_folder)),
    ]
    report = run_folder / "report.html"
    atomic_write(report, html_page(run_folder.resolve().name, "\n".join(filter(None, sections))))
    return report


# Reading


def _read(path: Path) -> str:
    """The text of a file, "" if it is not there."""
    try:
        return path.read_text("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path, key: str = "step", kind: type = int) -> list[dict[str, Any]]:
    """The records of a file, a line each. Half a line at its end, of a run that was killed, is passed over."""
    lines, records = _read(path).split("\n"), list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        record = dict[str, Any]()
        with suppress(ValueError):
            record = parse_object(line.encode())
        if isinstance(record.get(key), kind):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path} line {number}: not a JSON object with a {key}; remove the line")
    return records


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = tomllib.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    for name, section in config.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} stands in no section; put it below one, such as [train]")
    return config


# Sections


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Cells are HTML already. numbers: all columns but the first are figures. An empty head is left out."""
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    top = f"<thead><tr>{titles}</tr></thead>\n" if titles else ""
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="scroll"><table{kind}>\n{top}<tbody>\n{body}\n</tbody>\n</table></div>'


def _header(run_folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any], metrics: Sequence[Any]) -> str:
    model, train, lora = (config.get(section, {}) for section in ("model", "train", "lora"))
    n_steps = summary.get("steps", metrics[-1]["step"] if metrics else 0)
    strategy, base = train.get("strategy", ""), model.get("path")
    own = {"partial": ("layers", "parameters", "reinit"), "full": ("reinit",), "prefix": ("prefix_tokens",)}
    rank = None if strategy in own else lora.get("rank")
    facts = [
        f"{n_steps:,} step{'' if n_steps == 1 else 's'}",
        f"strategy {strategy}" if strategy else "",
        f"rank {rank}" + " with DoRA" * bool(lora.get("dora")) if rank else "",
        *(f"{_words(key)} {train[key]}" for key in own.get(strategy, ()) if train.get(key) not in (None, [], "none")),
        f"base {base}" if base else "",
        "" if summary else "not finished",
    ]
    title, subtitle = escape(run_folder.resolve().name), escape(" · ".join(filter(None, facts)))
    return f"<header>\n<h1>{title}</h1>\n<p>{subtitle}</p>\n{_tiles(summary, train.get('adapter'))}</header>"


def _tiles(summary: Mapping[str, Any], adapter: object) -> str:
    """What one looks for first, in large figures."""
    before, after = _flat(summary.get("before")), _flat(summary.get("after"))
    tiles: list[tuple[str, str]] = [
        (f"{name}, {label('before', adapter)} → after", f"{_figure(before[name])} → {_figure(after[name])}")
        for name in ("loss", "exact_match")
        if name in before and name in after
    ]
    if isinstance(summary.get("tok_per_s"), int | float):
        tiles.append(("tokens a second", f"{summary['tok_per_s']:,.0f}"))
    peaks = _flat(summary.get("peak_memory_bytes"))
    if isinstance(peak := peak_bytes(peaks), int | float) and peak:
        tiles.append((f"peak {'GPU' if 'device_allocated' in peaks else 'private'} memory", as_text(peak)))
    boxes = (f"<div><b>{escape(value)}</b><span>{escape(_words(name))}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{"".join(boxes)}</div>\n' if tiles else ""


def _measured(summary: Mapping[str, Any], adapter: object) -> str:
    """The figures before and after; of which data they are, and of which model."""
    first, data = label("before", adapter).capitalize(), summary.get("measured_on", "the validation data")
    base = f" Base: without the adapter that training went on from, {adapter}." if adapter else ""
    told = escape(f"{first} and after are measured on {data}.{base}")
    return _before_after(summary, adapter) + (f"<p>{told}</p>\n" if summary.get("before") else "")


def _before_after(summary: Mapping[str, Any], adapter: object) -> str:
    columns = {name: _flat(summary.get(name)) for name in ("before", "after", "test")}
    before, after = columns["before"], columns["after"]
    head = [name for name, values in columns.items() if values]
    rows = []
    for key in dict.fromkeys([*before, *after, *columns["test"]]):
        cells = [escape(_figure(columns[name][key])) if key in columns[name] else "" for name in head]
        rows.append([escape(_words(key)), *cells, _change(key, before.get(key), after.get(key))])
    return _table(["", *(label(name, adapter) for name in head), "change"], rows) if rows else ""


def _test_looks(path: Path) -> str:
    """How often the test file was opened, and when: only the first figure is one of unseen text."""
    looks = _read_jsonl(path, "time", str)
    rows = [[escape(look["time"]), f"<code>{escape(str(look.get('command')))}</code>"] for look in looks]
    often = "once" if len(looks) == 1 else f"{len(looks)} times: only the first figure counts as unseen"
    return f"<p>The test file was opened {often}.</p>\n" + _table(["when", "by"], rows, numbers=False) if looks else ""


def _forgetting(summary: Mapping[str, Any], adapter: object) -> str:
    """The general text before and after, and how far the model went from its base."""
    lost = summary.get("forgetting") or {}
    distance = f"KL(base, tuned) is {_figure(lost.get('kl'))} nats a token, on {_figure(lost.get('kl_tokens'))} tokens."
    return _before_after(lost, adapter) + (f"<p>{escape(distance)}</p>" if lost else "")


def _advice(summary: Mapping[str, Any]) -> str:
    sentences = summary.get("advice") or []
    return f"<ul>{''.join(f'<li>{escape(str(sentence))}</li>' for sentence in sentences)}</ul>" if sentences else ""


def _change(key: str, before: Any, after: Any) -> str:
    """After less before, green where that is better and red where it is worse."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after)):
        return ""
    change = after - before
    better = -change if key.endswith(LOWER_IS_BETTER) else change if key.endswith(HIGHER_IS_BETTER) else 0
    kind = "good" if better > 0 else "bad" if better < 0 else "same"
    return f'<span class="{kind}">{escape(_figure(change, "+"))}</span>'


def _figures(summary: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in summary.items() if key not in SHOWN_ABOVE}
    rows = []
    for key, value in _flat(rest).items():
        text = as_text(value) if "bytes" in key and isinstance(value, int | float) else _figure(value)
        rows.append([escape(_words(key.replace("_bytes", ""))), escape(text)])
    return _table([], rows) if rows else ""


def _plot(name: str, png: bytes) -> str:
    caption = escape(CAPTIONS[name])
    image = f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _samples(path: Path) -> Iterator[str]:
    """A section for each "# title" of samples.md, with the table below it; whatever else may stand there as it is."""
    parts = re.split(r"^# (.*)\n", _read(path), flags=re.MULTILINE)
    for title, text in zip(["Samples", *parts[1::2]], parts[::2], strict=True):
        yield _section(title, _markdown([line for line in text.splitlines() if line.strip()]))


def _markdown(lines: Sequence[str]) -> str:
    """A table as HTML."""
    rows = [_cells(line) for line in lines if line.startswith("|")]
    if len(rows) < 3 or len(rows) != len(lines) or len({len(row) for row in rows}) != 1:
        return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
    return _table(rows[0], rows[2:], numbers=False)  # rows[1] is Markdown's rule of dashes


def _cells(line: str) -> list[str]:
    """A row of a Markdown table as HTML; `\\|` in it is a bar, `<br>` a new line."""
    inside = line.strip().removeprefix("|").removesuffix("|")
    cells = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inside))
    return [escape(cell).replace("&lt;br&gt;", "<br>") for cell in cells]


def _settings(config: Mapping[str, Any]) -> str:
    rows = [
        [f"<code>{escape(f'{section}.{key}')}</code>", f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"]
        for section, values in config.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    table = _table(["key", "value"], rows, numbers=False)
    return f"<details>\n<summary>{len(rows)} settings</summary>\n{table}\n</details>" if rows else ""


def _files(run_folder: Path) -> str:
    rows = []
    for name, what in CONTENTS.items():
        path = run_folder / name
        if path.exists():
            shown = f"{name}/" if path.is_dir() else name
            n_bytes = sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file())
            rows.append([f'<a href="{quote(shown)}">{escape(shown)}</a>', escape(what), f"{n_bytes:,} bytes"])
    where = f"<p>In <code>{escape(str(run_folder.resolve()))}</code></p>\n"
    return where + _table(["file", "what it is", "size"], rows, numbers=False)


# Words and figures


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """A nested object as one level, "a b": value; {} for what is none."""
    flat = dict[str, Any]()
    for key, value in values.items() if isinstance(values, dict) else ():
        flat |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _words(key: str) -> str:
    return key.replace("tok_per_s", "tokens per second").replace("_", " ")


def _figure(value: Any, sign: str = "") -> str:
    return "–" if value is None else text_of(value, sign)


def html_page(name: str, body: str) -> str:
    """A page that needs no other file; `body` is HTML."""
    page = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    return page.substitute(title=escape(f"{name} – minilora"), body=body)
