"""A run's three plots: the loss; the learning rate and the gradient's norm; the speed and the memory.

Figures are drawn by matplotlib's Agg canvas without its global state, so that they come out the same in any program,
thread or machine; equal records give equal bytes.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Record = Mapping[str, Any]  # a line of metrics.jsonl or timing.jsonl

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea580c", "#059669", "#dc2626", "#94a3b8"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#475569", "axes.titlecolor": "#0f172a", "xtick.color": "#475569", "ytick.color": "#475569",
    "axes.grid": True, "grid.color": "#e2e8f0", "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
}  # fmt: skip
SPAN = 40  # smoothing looks back over some 1/40 of the steps
MIN_SMOOTHED = 20  # steps; fewer are shown as they are


def draw(metrics: Sequence[Record], timing: Sequence[Record], clip_norm: float = 0.0) -> dict[str, bytes]:
    """The plots as PNG files by name. clip_norm: where gradients are cut, 0 for nowhere."""
    with mpl.rc_context(STYLE):
        figures = {
            "loss.png": _loss(metrics),
            "learning_rate.png": _learning_rate(metrics, clip_norm),
            "speed.png": _speed(timing),
        }
        return {name: to_png(figure) for name, figure in figures.items()}


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, of which the first are averaged over fewer.

    What is not finite is passed over: the average stays where it was.
    """
    keep = 1 - 1 / max(span, 1)
    total, weight, out = 0.0, 0.0, []
    for value in values:
        if isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight else value)
    return out


def _series(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key; a null, as of a loss that is not a number, becomes NaN."""
    points = [(r["step"], r[key]) for r in records if key in r]
    return [step for step, _ in points], [float("nan") if value is None else float(value) for _, value in points]


def _panels(*titles: str, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels, one above the other, that share the steps below them."""
    figure = Figure(figsize=(8, height), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, panels


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, smoothed: str = "") -> None:
    """A line; many points are drawn faint, with their moving average, named `smoothed`, above them."""
    if not any(map(isfinite, values)):
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    many = len(values) >= MIN_SMOOTHED and bool(smoothed)
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, values, color=colour, alpha=0.3 if many else 1, linewidth=1 if many else 1.8, marker=marker)
    if many:
        axes.plot(steps, smooth(values, len(values) / SPAN), color=colour, label=smoothed)


def legend(axes: Axes, place: Literal["upper right", "lower right"] = "upper right") -> None:
    """Draw a legend of what has a label, if anything has."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place)


def _start_at_zero(panels: Iterable[Axes]) -> None:
    """Let the panels begin at zero, so that heights compare; left alone where the values spread over powers of ten."""
    for axes in panels:
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0, top=1.05 * axes.get_ylim()[1])


def _loss(metrics: Sequence[Record]) -> Figure:
    figure, [axes] = _panels("Loss per target token", height=4.2)
    axes.set_ylabel("nats")
    steps, values = _series(metrics, "loss")
    _line(axes, steps, values, BLUE, "training, smoothed")
    val_steps, val_values = _series(metrics, "val_loss")
    if val_steps:
        axes.plot(val_steps, val_values, color=ORANGE, marker="o", markersize=5, linewidth=1.4, label="validation")
        best = min(range(len(val_values)), key=lambda i: val_values[i] if isfinite(val_values[i]) else inf)
        note = f"best {val_values[best]:.3f}, step {val_steps[best]}"
        axes.plot(val_steps[best], val_values[best], "o", markersize=10, mfc="none", mec=ORANGE, mew=1.6, label=note)
    general = _series(metrics, "general_loss")
    if general[0]:
        axes.plot(*general, color=GREEN, marker="s", markersize=4, linewidth=1.4, label="general text")
    if skipped := [r["step"] for r in metrics if r.get("skipped")]:
        over = axes.get_xaxis_transform()  # from the bottom of the panel, 0, to its top, 1
        label = f"{len(skipped)} skipped"
        axes.vlines(skipped, 0, 1, colors=RED, linestyles=":", linewidth=1, label=label, transform=over)
    legend(axes)
    return figure


def _learning_rate(metrics: Sequence[Record], clip_norm: float) -> Figure:
    figure, [above, below] = _panels("Learning rate", "Gradient norm, before clipping", height=5)
    above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _line(above, *_series(metrics, "lr"), GREEN)
    steps, norms = _series(metrics, "grad_norm")
    _line(below, steps, norms, BLUE, "smoothed")
    positive = [norm for norm in norms if isfinite(norm) and norm > 0]
    if positive and max(positive) > 100 * min(positive):
        below.set_yscale("log")
    if positive and 0 < clip_norm < inf:
        below.axhline(clip_norm, color=RED, linewidth=1, linestyle="--", label=f"clipped above {clip_norm:g}")
    legend(below)
    _start_at_zero((above, below))
    return figure


def _speed(timing: Sequence[Record]) -> Figure:
    figure, [above, below] = _panels("Speed", "Memory in use", height=5)
    above.set_ylabel("tokens/s")
    _line(above, *_series(timing, "tok_per_s"), BLUE, "smoothed")
    legend(above, "lower right")
    below.set_ylabel("GB")
    steps, memory = _series(timing, "memory_bytes")
    _line(below, steps, [n_bytes / 1e9 for n_bytes in memory], ORANGE)
    _start_at_zero((above, below))
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file, without the name of the program that drew it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()
