"""The run's page and plots: complete, escaped, self-contained, and there for runs that were cut off too."""

import json
import math
import re
import struct
from base64 import b64decode
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minilora.config import METRICS, DataConfig, LoraConfig, RunConfig, TrainConfig
from minilora.errors import UserError
from minilora.evaluate.metrics import figure_names
from minilora.report import page as page_module
from minilora.report.page import write_report
from minilora.report.plots import draw, smooth
from minilora.toml import config_toml
from minilora.train.run_folder import FILES

PLOTS = ["loss.png", "learning_rate.png", "speed.png"]
EVIL = """<script>alert("1")</script> & 'quotes' "here" </td>"""


def metrics(n: int, every: int = 10) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, n + 1):
        record: dict[str, Any] = {"step": step, "loss": 3 / step, "lr": 1e-4, "grad_norm": 2.0 / step}
        record |= {"tokens": step * 100, "target_tokens": step * 40}
        if step % every == 0:
            record |= {"val_loss": 4 / step, "val_perplexity": math.exp(4 / step)}
        records.append(record)
    return records


def timing(n: int) -> list[dict[str, Any]]:
    return [
        {"step": s, "seconds": 0.1, "tok_per_s": 1000.0 + s, "memory_bytes": 2_000_000_000} for s in range(1, n + 1)
    ]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


SUMMARY: dict[str, Any] = {
    "before": {"loss": 2.5, "perplexity": 12.18, "exact_match": 0.04, "rows": 12},
    "after": {"loss": 0.5, "perplexity": 1.65, "exact_match": 0.01, "rows": 12},
    "peak_memory_bytes": {"private": 3_210_000_000, "max_rss": 4_560_000_000},
    "predicted_memory_bytes": {"absmax": 52_140},
    "tok_per_s": 1234.5,
    "steps": 40,
    "merge": {"base": {"argmax": 0.987}},
    "stopped_because": "last step",
}
SAMPLES = """# Samples

| prompt | expected | before | after |
|---|---|---|---|
| one \\| two<br>three | kæt | <b>dog</b> | kæt |
| 翻译 | hello | hi | hello |
"""


def run_folder(tmp_path: Path, n: int = 40, name: str = "run") -> Path:
    folder = tmp_path / name
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    config = RunConfig(data=DataConfig(train="cats & dogs.jsonl"), train=TrainConfig(clip_norm=0.5))
    (folder / "config.toml").write_text(config_toml(config))
    write_lines(folder / "metrics.jsonl", metrics(n))
    write_lines(folder / "timing.jsonl", timing(n))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "samples.md").write_text(SAMPLES)
    return folder


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page's text: plots take most of its time."""
    monkeypatch.setattr(page_module, "draw", lambda *_: dict.fromkeys(PLOTS, b"a plot"))


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order. Keeps tables, titles, images and links."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "h2":
            self.titles.append("")
        elif tag == "br":
            self.handle_data("\n")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.titles[-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)


def page_of(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


# A whole run


STRATEGIES: list[tuple[RunConfig, str]] = [
    (RunConfig(lora=LoraConfig(dora=True)), "strategy qlora · rank 16 with DoRA · base"),
    (RunConfig(train=TrainConfig(strategy="full", reinit="top:2")), "strategy full · reinit top:2 · base"),
    (RunConfig(train=TrainConfig(strategy="full")), "strategy full · base"),
    (RunConfig(train=TrainConfig(strategy="partial", layers=2)), "strategy partial · layers 2 · base"),
    (
        RunConfig(train=TrainConfig(strategy="partial", parameters=("lm_head",))),
        "strategy partial · parameters ['lm_head'] · base",
    ),
    (RunConfig(train=TrainConfig(strategy="prefix")), "strategy prefix · prefix tokens 32 · base"),
]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("config", "facts"), STRATEGIES)
def test_the_head_says_what_learnt(tmp_path: Path, config: RunConfig, facts: str) -> None:
    folder = run_folder(tmp_path)
    (folder / "config.toml").write_text(config_toml(config))
    assert facts in page_of(folder).text


@pytest.mark.usefixtures("no_plots")
def test_a_whole_run_has_all_sections_and_figures(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path, name="ipa"))
    assert page.titles == ["Before and after", "The run", "Plots", "Samples", "Settings", "Files"]
    assert page.text.strip().startswith("ipa")
    assert "40 steps · strategy qlora · rank 16 · base demo" in page.text
    assert "not finished" not in page.text
    assert page.row("loss") == ["loss", "2.5", "0.5", "-2"]
    assert page.row("exact match") == ["exact match", "0.04", "0.01", "-0.03"]
    assert page.row("tokens per second")[1] == "1,234"
    assert page.row("peak memory private")[1] == "3.21 GB"
    assert page.row("predicted memory absmax")[1] == "0.1 MB"
    assert page.row("merge base argmax")[1] == "0.987"
    assert page.row("data.train")[1] == '"cats & dogs.jsonl"'
    assert page.row("train.clip_norm")[1] == "0.5"
    assert page.row("one | two\nthree") == ["one | two\nthree", "kæt", "<b>dog</b>", "kæt"]
    assert page.row("翻译")[3] == "hello"
    assert page.row("adapter/")[2] == "1,000 bytes"
    assert ("href", "metrics.jsonl") in page.attributes


@pytest.mark.usefixtures("no_plots")
def test_of_what_the_figures_are_is_said(tmp_path: Path) -> None:
    """Of which data, and of which model: where an adapter learns on, the first are not its own."""
    folder = run_folder(tmp_path)
    page = page_of(folder)
    assert "Before and after are measured on the validation data." in page.text
    assert "loss, before → after" in page.text
    (folder / "config.toml").write_text(config_toml(RunConfig(train=TrainConfig(adapter="runs/<first>"))))
    forgetting = {"before": {"loss": 1.0}, "after": {"loss": 1.5}, "kl": 0.1, "kl_tokens": 9}
    mixed = {"measured_on": "the moon; rows elsewhere", "forgetting": forgetting}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | mixed))
    page = page_of(folder)
    assert "Base and after are measured on the moon; rows elsewhere. Base: without the adapter " in page.text
    assert "went on from, runs/<first>." in page.text
    assert "loss, base → after" in page.text
    assert page.rows.count(["", "base", "after", "change"]) == 2
    assert not [row for row in page.rows if row[0] == "measured on"]
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"before": {}, "after": {}, "test": {"loss": 1.0}}))
    assert "measured on" not in page_of(folder).text


def test_every_file_of_a_run_is_told() -> None:
    assert set(FILES) - set(page_module.CONTENTS) == {"report.html", *PLOTS}


@pytest.mark.usefixtures("no_plots")
def test_better_is_green_and_worse_is_red(tmp_path: Path) -> None:
    html = write_report(run_folder(tmp_path)).read_text("utf-8")
    assert '<span class="good">-2</span>' in html  # loss fell
    assert '<span class="bad">-0.03</span>' in html  # exact match fell
    assert '<span class="same">+0</span>' in html  # rows: neither good nor bad


@pytest.mark.usefixtures("no_plots")
def test_every_figure_has_its_colour_and_speed_no_exponent(tmp_path: Path) -> None:
    names = ["loss", "perplexity", *figure_names(METRICS)]
    higher = dict.fromkeys(names, 0.5)
    figures = {"before": dict.fromkeys(names, 0.25), "after": higher, "tok_per_s": 12345.6}
    folder = run_folder(tmp_path)
    (folder / "summary.json").write_text(json.dumps(figures))
    html = write_report(folder).read_text("utf-8")
    assert html.count('<span class="good">+0.25</span>') == len(names) - 2
    assert html.count('<span class="bad">+0.25</span>') == 2
    assert Page(html).row("tokens per second")[1] == "12,346"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """No scripts, nothing from elsewhere; the images inside are those beside it."""
    folder = run_folder(tmp_path)
    page = page_of(folder)
    assert not page.tags & {"script", "link", "iframe", "object"}
    sources = [value for name, value in page.attributes if name == "src"]
    assert [b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [
        (folder / name).read_bytes() for name in PLOTS
    ]
    assert "url(" not in (folder / "report.html").read_text("utf-8")
    assert "http" not in (folder / "report.html").read_text("utf-8")
    for name in PLOTS:
        width, height = png_size((folder / name).read_bytes())
        assert width == 1200
        assert height >= 600


def test_writing_it_again_gives_equal_bytes_and_leaves_the_run_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    write_report(folder)
    first = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert set(first) - set(before) == {"report.html", *PLOTS}
    assert before.items() <= first.items()
    write_report(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == first


def test_forgetting_advice_probes_and_looks_are_shown(tmp_path: Path) -> None:
    """Each of them, and the page still opens without a network."""
    folder = run_folder(tmp_path)
    figures = {"before": {"loss": 1.0, "perplexity": 3.0}, "after": {"loss": 1.3, "perplexity": 3.7}}
    more = {"forgetting": {**figures, "kl": 0.197, "kl_tokens": 1024}, "advice": ["Do <this>.", "And that."]}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | more | {"test": {"loss": 0.6}, "test_looks": 2}))
    probes = "\n# Probes\n\n| prompt | before | after |\n|---|---|---|\n| sky? | blue | ˈbɻu |\n"
    (folder / "samples.md").write_text(SAMPLES + probes)
    looks = [{"time": f"2026-01-0{day}T00:00:00+00:00", "command": EVIL} for day in (1, 2)]
    write_lines(folder / "test_looks.jsonl", looks)
    records = [r | ({"general_loss": 1.0} if "val_loss" in r else {}) for r in metrics(40)]
    plain = (write_report(folder), (folder / "loss.png").read_bytes())[1]
    write_lines(folder / "metrics.jsonl", records)
    page = page_of(folder)
    assert page.titles == [
        "Before and after", "Forgetting", "Advice", "The run", "Plots", "Samples", "Probes", "Settings", "Files",
    ]  # fmt: skip
    assert ["perplexity", "3", "3.7", "+0.7"] in page.rows
    assert "KL(base, tuned) is 0.197 nats a token, on 1,024 tokens." in page.text
    assert "Do <this>." in page.text
    assert page.row("sky?") == ["sky?", "blue", "ˈbɻu"]
    assert "The test file was opened 2 times: only the first figure counts as unseen." in page.text
    assert page.row(looks[1]["time"])[1] == EVIL
    assert (folder / "loss.png").read_bytes() != plain, "the general loss has a line"
    html = (folder / "report.html").read_text("utf-8")
    assert "http" not in html
    assert not page.tags & {"script", "link", "iframe", "object"}
    (folder / "test_looks.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"test_looks\.jsonl line 1"):
        write_report(folder)


# Text is text


@pytest.mark.usefixtures("no_plots")
def test_whatever_the_files_hold_is_escaped(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, name="a<b> & c")
    (folder / "summary.json").write_text(
        json.dumps({"before": {EVIL: 1.0, "s": EVIL}, "after": {EVIL: 2.0}, EVIL: {EVIL: EVIL}, "tok_per_s": 1})
    )
    (folder / "config.toml").write_text(
        f"[model]\npath = {json.dumps(EVIL)}\n[{json.dumps(EVIL)}]\n{json.dumps(EVIL)} = 1\n"
    )
    (folder / "samples.md").write_text(f"| prompt | after |\n|---|---|\n| {EVIL} | <img src=x onerror=alert(1)> |\n")
    page = page_of(folder)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.row(EVIL)[1] in ("1", "<img src=x onerror=alert(1)>")
    assert any(row == [EVIL, "<img src=x onerror=alert(1)>"] for row in page.rows)
    assert any(row[0] == f"{EVIL}.{EVIL}" for row in page.rows)
    assert page.text.strip().startswith("a<b> & c")
    (folder / "samples.md").write_text(f"no table: {EVIL}\n")
    assert f"no table: {EVIL}" in page_of(folder).text


# Parts of a run


@pytest.mark.parametrize("n", [0, 1, 2, 300])
def test_any_number_of_steps(tmp_path: Path, n: int) -> None:
    page = page_of(run_folder(tmp_path, n))
    assert page.titles[0] == "Before and after"


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("missing", ["timing.jsonl", "summary.json", "config.toml", "samples.md", "adapter"])
def test_a_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    folder = run_folder(tmp_path)
    path = folder / missing
    if path.is_dir():
        (path / "adapter_model.safetensors").unlink()
        path.rmdir()
    else:
        path.unlink()
    page = page_of(folder)
    gone = {"summary.json": {"Before and after", "The run"}, "samples.md": {"Samples"}, "config.toml": {"Settings"}}
    expected = ["Before and after", "The run", "Plots", "Samples", "Settings", "Files"]
    assert page.titles == [title for title in expected if title not in gone.get(missing, set())]
    assert ("not finished" in page.text) == (missing == "summary.json")


def test_metrics_alone_make_a_page(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", metrics(1))
    page = page_of(tmp_path)
    assert page.titles == ["Plots", "Files"]
    assert "1 step · not finished" in page.text


@pytest.mark.usefixtures("no_plots")
def test_no_validation_and_empty_figures(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    write_lines(folder / "metrics.jsonl", metrics(40, every=99))
    (folder / "summary.json").write_text(
        json.dumps(SUMMARY | {"before": {}, "after": {}, "test": {}, "best_step": None})
    )
    page = page_of(folder)
    assert "Before and after" not in page.titles
    assert page.row("best step")[1] == "–"


def test_skipped_steps_and_numbers_that_are_none(tmp_path: Path) -> None:
    folder, records = run_folder(tmp_path), metrics(40)
    records[4] |= {"loss": float("nan"), "grad_norm": float("inf"), "skipped": True}
    records[9] |= {"loss": None, "grad_norm": None, "skipped": True, "val_loss": float("nan")}
    nothing = [r | {"loss": None, "val_loss": float("nan"), "skipped": True} for r in records]
    for lines in (records, nothing):
        write_lines(folder / "metrics.jsonl", lines)
        page = page_of(folder)
        assert page.titles == ["Before and after", "The run", "Plots", "Samples", "Settings", "Files"]
        assert page.tags >= {"img"}


def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, drawn = run_folder(tmp_path), []

    def note(records: Any, *_: Any) -> dict[str, bytes]:
        drawn.append(records)
        return {}

    monkeypatch.setattr(page_module, "draw", note)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    write_report(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.5}')  # whole, but for its line end
    write_report(folder)
    assert drawn == [metrics(40), [*metrics(40), {"step": 41, "loss": 1.5}]]


# Damage


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "x"}', "", "NaN", "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    folder = run_folder(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:], ""]))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3: "):
        write_report(folder)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b"{"),
        ("summary.json", b"[]"),
        ("config.toml", b"a = "),
        ("samples.md", b"\xff\xfe"),
        ("timing.jsonl", b"\xff\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = run_folder(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("no_plots")
def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no run lies here"):
            write_report(folder)
    assert list(tmp_path.iterdir()) == []


# Plots


def test_smoothing_is_an_average_of_what_came_before() -> None:
    assert smooth([3.0, 5.0, 1.0], 1) == [3.0, 5.0, 1.0]
    assert smooth([2.0] * 50, 10) == pytest.approx([2.0] * 50)
    assert smooth([1.0, 2.0], 2) == pytest.approx([1.0, (0.5 * 1 + 2) / 1.5])
    assert smooth([], 3) == []
    with_gap = smooth([1.0, float("nan"), float("inf"), 1.0], 4)
    assert with_gap == pytest.approx([1.0] * 4)


def test_plots_show_what_they_are_given() -> None:
    """Each of these changes exactly the plot that it belongs to."""
    base = draw(metrics(40), timing(40), 0.5)
    assert list(base) == PLOTS

    def changed(other: dict[str, bytes]) -> list[str]:
        return [name for name in PLOTS if other[name] != base[name]]

    assert changed(draw(metrics(40, every=99), timing(40), 0.5)) == ["loss.png"]
    assert changed(draw(metrics(40), timing(40), 0.0)) == ["learning_rate.png"]
    assert changed(draw(metrics(40), [r | {"memory_bytes": 1} for r in timing(40)], 0.5)) == ["speed.png"]
