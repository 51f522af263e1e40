"""The report's pictures as PNG and SVG files, for slides and papers; drawn by matplotlib.

The same data as on the page (:mod:`quantize.report.page.figures`), in the light colours. The same
record gives the same bytes with the same matplotlib: no dates, fixed ids, no user settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.report.page.axes import log_ticks
from quantize.report.page.figures import (
    Bars,
    Figure,
    Forest,
    Lines,
    Mark,
    Pairs,
    Scatter,
)
from quantize.report.page.formats import MINUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

STYLE: Any = {
    "svg.hashsalt": "quantize",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": "#605d56",
    "axes.labelcolor": "#605d56",
    "xtick.color": "#605d56",
    "ytick.color": "#605d56",
    "text.color": "#1d1c1a",
    "text.parse_math": False,  # a name with a dollar sign is no formula
}
DPI = 160
BASELINE, CANDIDATE, MUTED, BEYOND = "#6f6b63", "#1c5d99", "#605d56", "#f5e4e0"
STATES = {
    "non-inferior": "#1b6b3f",
    "inferior": "#a8261c",
    "not comparable": "#a8261c",
    "inconclusive": "#80560a",
}


def save(figure: Figure, folder: Path) -> tuple[Path, Path]:
    """Write `<name>.png` and `<name>.svg`."""
    svg = folder / f"{figure.name}.svg"
    with _drawn(figure) as canvas:
        canvas.savefig(svg, metadata={"Date": None, "Creator": None})
    return save_png(figure, folder), svg


def save_png(figure: Figure, folder: Path) -> Path:
    """Write `<name>.png` alone."""
    png = folder / f"{figure.name}.png"
    with _drawn(figure) as canvas:
        canvas.savefig(png, dpi=DPI, metadata={"Software": None})
    return png


@contextmanager
def _drawn(figure: Figure) -> Iterator[Canvas]:
    """The picture, in the style that it must be saved with."""
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    with style.context(["default", STYLE]):
        canvas = Canvas(figsize=_inches(figure), layout="constrained")
        _draw(canvas, figure)
        yield canvas


def _inches(figure: Figure) -> tuple[float, float]:
    match figure:
        case Forest():
            return 7.2, 1.2 + 0.34 * len(figure.marks)
        case Pairs():
            return 7.2, 0.5 + 0.62 * len(figure.pairs)
        case Scatter():
            return 7.2, 4.4
    return 6.0, 3.4


def _draw(canvas: Canvas, figure: Figure) -> None:
    if isinstance(figure, Pairs):
        _pairs(canvas, figure)
        return
    axes = canvas.subplots()
    axes.set_title(figure.title)
    match figure:
        case Forest():
            _forest(axes, figure)
        case Lines():
            _lines(axes, figure)
        case Bars():
            _bars(axes, figure)
        case Scatter():
            _scatter(axes, figure)


def _forest(axes: Axes, forest: Forest) -> None:
    for row, mark in enumerate(forest.marks):
        _forest_row(axes, forest, row, mark)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_xlim(forest.low, forest.high)
    axes.set_ylim(len(forest.marks) - 0.5, -0.5)
    axes.set_yticks(range(len(forest.marks)), [mark.label for mark in forest.marks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if forest.stops:
        axes.set_xticks([at for at, _ in forest.stops], [text for _, text in forest.stops])
    axes.set_xlabel(f"worse  ←  {forest.axis}  →  better")


def _forest_row(axes: Axes, forest: Forest, row: int, mark: Mark) -> None:
    colour = STATES.get(mark.state, CANDIDATE)
    if mark.margin is not None:
        span = (forest.low, min(mark.margin, forest.high))
        axes.fill_betweenx([row - 0.5, row + 0.5], *span, color=BEYOND, linewidth=0)
        axes.plot([mark.margin] * 2, [row - 0.5, row + 0.5], color=STATES["inferior"], lw=1, ls=":")
    if mark.low is not None and mark.high is not None:
        ends = [max(mark.low, forest.low), min(mark.high, forest.high)]
        axes.plot(ends, [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    if mark.detectable is not None and -mark.detectable >= forest.low:
        axes.plot([-mark.detectable], [row + 0.42], marker="^", color=MUTED, markersize=4)
    axes.plot([mark.value], [row], "D" if mark.average else "o", color=colour, markersize=6)


def _lines(axes: Axes, chart: Lines) -> None:
    edges = list(range(len(chart.starts) + 1))
    if chart.reference is not None:
        axes.axhline(chart.reference, color=MUTED, linewidth=1)
    for line in chart.lines:
        own = line.role == "baseline"
        axes.stairs(
            line.values,
            edges,
            baseline=None,
            color=BASELINE if own else CANDIDATE,
            linestyle="--" if own else "-",
            linewidth=1.3 if own else 1.8,
            label=line.label,
        )
    if chart.logarithmic:
        axes.set_yscale("log")
        values = log_ticks(*axes.get_ylim())
        axes.set_yticks(values, [f"{value:,.3g}" for value in values])
        axes.minorticks_off()
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    step = max(1, len(chart.starts) // 5)
    shown = range(0, len(chart.starts), step)
    axes.set_xticks(list(shown), [f"{chart.starts[place]:,}" for place in shown])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(chart.axis)
    if len(chart.lines) > 1:
        axes.legend(frameon=False)


def _bars(axes: Axes, chart: Bars) -> None:
    width = chart.edges[1] - chart.edges[0]
    places = [chart.edges[0] - width, *chart.edges]
    axes.bar(places, chart.counts, width=0.86 * width, align="edge", color=CANDIDATE)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"{chart.axis.replace('-', MINUS)}; the outer bins hold everything beyond")
    axes.set_ylabel("tokens")


def _pairs(canvas: Canvas, chart: Pairs) -> None:
    canvas.suptitle(chart.title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    rows = canvas.subplots(len(chart.pairs), 1, squeeze=False)
    for axes, pair in zip(rows[:, 0], chart.pairs, strict=True):
        values = [pair.candidate, pair.baseline]
        bars = axes.barh([0, 1], values, color=[CANDIDATE, BASELINE], height=0.8)
        texts = [
            f"{name}  {pair.form.format(value)}"
            for name, value in zip(("this model", "BF16"), values, strict=True)
        ]
        axes.bar_label(bars, texts, padding=4, fontsize=8.5)
        axes.set_xlim(0, 1.35 * max(*values, 1e-9))
        axes.set_yticks([0.5], [pair.label])
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines[["bottom"]].set_visible(False)


def _scatter(axes: Axes, chart: Scatter) -> None:
    front = sorted((point.x, point.y) for point in chart.points if point.best)
    axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1, linestyle="--", zorder=1)
    axes.axhline(0, color=MUTED, linewidth=1, zorder=1)
    for point in chart.points:
        colour = STATES.get(point.state, CANDIDATE)
        if point.low is not None and point.high is not None:
            axes.plot([point.x] * 2, [point.low, point.high], color=colour, linewidth=1.8)
        axes.plot([point.x], [point.y], "o", color=colour, markersize=7, markeredgecolor="white")
        axes.annotate(
            point.label,
            (point.x, point.y),
            (7, 3),
            textcoords="offset points",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.margins(x=0.18)
    axes.set_xlabel(chart.x_axis)
    axes.set_ylabel(chart.y_axis)
