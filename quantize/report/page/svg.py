"""Pictures of the HTML report: inline SVG as wide as its column, with text of constant size.

Marks stand at percentages of the width, so a picture needs no script to fit a telephone; text is
HTML beside the SVG. Colours are classes, which the page's style sheet binds to light and dark.
Every string is escaped: labels come from files that strangers wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from quantize.report.page.axes import log_ticks, tick_texts, ticks
from quantize.report.page.figures import Bars, Forest, Lines, Mark, Pair, Scatter
from quantize.report.page.formats import MINUS
from quantize.report.page.svg_parts import (
    UNITS,
    canvas,
    join,
    number,
    path,
    share,
    state_class,
    x_axis,
)
from quantize.report.page.svg_scatter import draw_scatter, scatter_words

ROW = 28  # height of a forest's row in px


def draw(figure: Forest | Lines | Bars | Scatter) -> Markup:
    """The picture with its caption and its text alternative."""
    match figure:
        case Forest():
            return _figure(figure, "forest", _forest(figure), _forest_words(figure))
        case Lines():
            return _figure(figure, "chart", _lines(figure), _lines_words(figure))
        case Bars():
            return _figure(figure, "chart", _bars(figure), _bars_words(figure))
        case Scatter():
            return _figure(figure, "chart scatter", draw_scatter(figure), scatter_words(figure))


def _figure(figure: Forest | Lines | Bars | Scatter, kind: str, body: Markup, words: str) -> Markup:
    axis = "" if isinstance(figure, Scatter) else figure.axis
    return Markup(
        '<figure class="{}"><figcaption>{}{}</figcaption>'
        '<div class="picture" role="img" aria-label="{}">{}</div></figure>'
    ).format(
        kind,
        figure.title,
        Markup(' <span class="unit">{}</span>').format(axis.replace("-", MINUS)) if axis else "",
        words,
        body,
    )


# --- forest


def _forest(forest: Forest) -> Markup:
    rows = join(_forest_row(forest, mark) for mark in forest.marks)
    values = ticks(forest.low, forest.high, 6)
    stops = forest.stops or list(zip(values, tick_texts(values), strict=True))
    axis = x_axis([(share(at, forest.low, forest.high), text) for at, text in stops])
    return Markup('{}<div class="label"></div>{}').format(rows, axis)


def _forest_row(forest: Forest, mark: Mark) -> Markup:
    def at(value: float) -> str:
        return f"{share(value, forest.low, forest.high):.2f}%"

    middle = ROW / 2
    parts = []
    if mark.margin is not None:
        parts.append(
            Markup(
                '<rect class="beyond" x="0" y="0" width="{}" height="100%"/>'
                '<line class="margin" x1="{}" x2="{}" y1="0" y2="100%"/>'
            ).format(at(mark.margin), at(mark.margin), at(mark.margin))
        )
    parts.append(
        Markup('<line class="zero" x1="{}" x2="{}" y1="0" y2="100%"/>').format(at(0), at(0))
    )
    if mark.detectable is not None and -mark.detectable >= forest.low:
        parts.append(_shape(at(-mark.detectable), ROW - 1, "detectable", "M-4 0 4 0 0-6z"))
    if mark.low is not None and mark.high is not None:
        parts.append(
            Markup('<line class="interval" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                at(mark.low), at(mark.high), middle, middle
            )
        )
        if mark.low < forest.low:
            parts.append(_shape("0%", middle, "arrow", "M0 0 7-5 7 5z"))
        if mark.high > forest.high:
            parts.append(_shape("100%", middle, "arrow", "M0 0-7-5-7 5z"))
    if forest.low <= mark.value <= forest.high:
        outline = "M-7 0 0-7 7 0 0 7z" if mark.average else "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"
        parts.append(_shape(at(mark.value), middle, "estimate", outline))
    return Markup(
        '<div class="label">{}</div><svg class="strip {}" height="{}" aria-hidden="true">{}</svg>'
    ).format(mark.label, state_class(mark.state), ROW, join(parts))


def _shape(x: str, y: float, kind: str, outline: str) -> Markup:
    """A shape of constant size at a percentage of the width."""
    return Markup(
        '<svg x="{}" y="{}" width="1" height="1" overflow="visible"><path class="{}" d="{}"/></svg>'
    ).format(x, y, kind, outline)


def _forest_words(forest: Forest) -> str:
    sentences = []
    for mark in forest.marks:
        words = f"{mark.label}: {number(mark.value)}"
        if mark.low is not None and mark.high is not None:
            words += f", 95% interval {number(mark.low)} to {number(mark.high)}"
        if mark.margin is not None:
            words += f", margin at {number(mark.margin)}"
        sentences.append(words + (f", {mark.state}" if mark.state else ""))
    return f"{forest.title}, in {forest.axis}; to the left is worse. " + "; ".join(sentences)


# --- charts with two axes


def _lines(chart: Lines) -> Markup:
    scale = math.log if chart.logarithmic else float
    values = [value for line in chart.lines for value in line.values]
    values += [chart.reference] if chart.reference is not None else []
    low, high = scale(min(values)), scale(max(values))
    room = 0.08 * (high - low) or abs(high) * 0.01 or 1.0
    low, high = (0.0 if chart.from_zero else low - room), high + room

    def up(value: float) -> float:
        return share(scale(value), low, high)

    parts = []
    if chart.reference is not None:
        at = f"{100 - up(chart.reference):.2f}%"
        parts.append(Markup('<line class="zero" x1="0" x2="100%" y1="{}" y2="{}"/>').format(at, at))
    parts += [
        path(f"line {line.role}", _steps([up(v) for v in line.values])) for line in chart.lines
    ]
    if chart.logarithmic:
        shown = log_ticks(math.exp(low), math.exp(high))
        stops = [(up(value), f"{value:,.3g}") for value in shown]
    else:
        shown = ticks(low, high, 4)
        stops = [(up(v), text) for v, text in zip(shown, tick_texts(shown), strict=True)]
    return canvas(stops, _position_stops(chart), join(parts))


def _steps(heights: Sequence[float]) -> str:
    """A path of one level step a bin; heights in percent."""
    width = UNITS / len(heights)
    levels = [f"{UNITS * (1 - height / 100):.1f}" for height in heights]
    steps = [f"V{y}H{width * (index + 1):.1f}" for index, y in enumerate(levels)]
    return f"M0 {levels[0]}" + "".join(steps)


def _position_stops(chart: Lines) -> list[tuple[float, str]]:
    """About five starts of bins, and the last one's end."""
    bins = len(chart.starts)
    step = max(1, math.ceil(bins / 4))
    stops = [
        (100 * index / bins, f"{chart.starts[index]:,}")
        for index in range(0, bins, step)
        if bins - index >= step / 2
    ]
    return [*stops, (100.0, f"{chart.ends[-1]:,}")]


def _lines_words(chart: Lines) -> str:
    sentences = [
        f"{line.label}: {number(line.values[0])} in the first bin, "
        f"{number(line.values[-1])} in the last, largest {number(max(line.values))}"
        for line in chart.lines
    ]
    reach = f"from {chart.starts[0]} to {chart.ends[-1]} tokens of context"
    return f"{chart.title} ({chart.axis}) by position, {reach}. " + "; ".join(sentences)


def _bars(chart: Bars) -> Markup:
    top = max(1.0, math.log10(max(max(chart.counts), 1)) * 1.04)
    floor = -0.3  # one token is still seen
    bins = len(chart.counts)
    parts = []
    for index, tokens in enumerate(chart.counts):
        if tokens:
            height = share(math.log10(tokens), floor, top)
            parts.append(
                Markup('<rect class="bar" x="{}%" width="{}%" y="{}%" height="{}%"/>').format(
                    f"{100 * (index + 0.04) / bins:.3f}",
                    f"{92 / bins:.3f}",
                    f"{100 - height:.2f}",
                    f"{height:.2f}",
                )
            )
    zero = _edge_share(chart, 0.0)
    if zero is not None:
        parts.append(
            Markup('<line class="zero" x1="{}%" x2="{}%" y1="0" y2="100%"/>').format(
                *[f"{zero:.2f}"] * 2
            )
        )
    powers = [10**power for power in range(math.floor(top) + 1)]
    y_stops = [(share(math.log10(power), floor, top), f"{power:,}") for power in powers]
    return canvas(y_stops, _edge_stops(chart), join(parts))


def _edge_share(chart: Bars, value: float) -> float | None:
    """Percent of the width at which a value stands; all bins are equally wide, the outer open."""
    edges = chart.edges
    for index in range(len(edges) - 1):
        if edges[index] <= value <= edges[index + 1]:
            inside = (value - edges[index]) / (edges[index + 1] - edges[index])
            return 100 * (1 + index + inside) / len(chart.counts)
    return None


def _edge_stops(chart: Bars) -> list[tuple[float, str]]:
    values = ticks(chart.edges[0], chart.edges[-1], 4)
    texts = tick_texts(values)
    found = [(_edge_share(chart, value), text) for value, text in zip(values, texts, strict=True)]
    return [(at, text) for at, text in found if at is not None]


def _bars_words(chart: Bars) -> str:
    low, high = chart.edges[0], chart.edges[-1]
    return (
        f"{chart.title}, {chart.axis}: {sum(chart.counts):,} tokens, "
        f"{chart.counts[0]:,} of them below {number(low)} and {chart.counts[-1]:,} at or above "
        f"{number(high)}; the fullest bin has {max(chart.counts):,}"
    )


# --- pairs


def pair_bars(pair: Pair) -> Markup:
    """Both values of one row as bars, for a cell of the table that has them as numbers."""
    top = max(pair.baseline, pair.candidate)
    return join(
        Markup(
            '<svg class="pair" height="7" aria-hidden="true">'
            '<rect class="{}" width="{}%" height="100%"/></svg>'
        ).format(role, f"{100 * value / top if top else 0:.2f}")
        for role, value in (("baseline", pair.baseline), ("candidate", pair.candidate))
    )
