"""Pictures of the HTML report: inline SVG as wide as its column, with text of constant size.

Marks stand at percentages of the width, so a picture needs no script to fit a telephone; text is
HTML beside the SVG. Colours are classes, which the page's style sheet binds to light and dark.
Every string is escaped: labels come from files that strangers wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from quantize.report.figures import (
    Bars,
    Forest,
    Lines,
    Mark,
    Pair,
    Point,
    Scatter,
    log_ticks,
    tick_texts,
    ticks,
)
from quantize.report.formats import MINUS

ROW = 28  # height of a forest's row in px
UNITS = 1000  # of a path's own coordinates
NOTHING = Markup("")
LABEL_GAP = 7.5  # percent of a scatter's height between two labels


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
            return _figure(figure, "chart scatter", _scatter(figure), _scatter_words(figure))


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


def _join(parts: Iterable[Markup]) -> Markup:
    return NOTHING.join(parts)


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", MINUS)


# --- forest


def _forest(forest: Forest) -> Markup:
    rows = _join(_forest_row(forest, mark) for mark in forest.marks)
    values = ticks(forest.low, forest.high, 6)
    stops = forest.stops or list(zip(values, tick_texts(values), strict=True))
    axis = _x_axis([(_share(at, forest.low, forest.high), text) for at, text in stops])
    return Markup('{}<div class="label"></div>{}').format(rows, axis)


def _share(value: float, low: float, high: float) -> float:
    """Percent of the way from low to high, cut at both ends."""
    return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


def _forest_row(forest: Forest, mark: Mark) -> Markup:
    def at(value: float) -> str:
        return f"{_share(value, forest.low, forest.high):.2f}%"

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
    ).format(mark.label, state_class(mark.state), ROW, _join(parts))


def _shape(x: str, y: float, kind: str, outline: str) -> Markup:
    """A shape of constant size at a percentage of the width."""
    return Markup(
        '<svg x="{}" y="{}" width="1" height="1" overflow="visible"><path class="{}" d="{}"/></svg>'
    ).format(x, y, kind, outline)


def state_class(verdict: str) -> str:
    """The class that colours a verdict."""
    return f"is-{verdict.replace(' ', '-')}" if verdict else "is-open"


def _forest_words(forest: Forest) -> str:
    sentences = []
    for mark in forest.marks:
        words = f"{mark.label}: {_number(mark.value)}"
        if mark.low is not None and mark.high is not None:
            words += f", 95% interval {_number(mark.low)} to {_number(mark.high)}"
        if mark.margin is not None:
            words += f", margin at {_number(mark.margin)}"
        sentences.append(words + (f", {mark.state}" if mark.state else ""))
    return f"{forest.title}, in {forest.axis}; to the left is worse. " + "; ".join(sentences)


# --- charts with two axes


def _x_axis(stops: Sequence[tuple[float, str]]) -> Markup:
    """Texts at percentages of the width; those at the ends stay inside."""
    spans = []
    for at, text in stops:
        side = "start" if at < 4 else "end" if at > 96 else "mid"
        spans.append(
            Markup('<span class="{}" style="left:{}%">{}</span>').format(side, f"{at:.2f}", text)
        )
    return Markup('<div class="x-axis" aria-hidden="true">{}</div>').format(_join(spans))


def _y_axis(stops: Sequence[tuple[float, str]]) -> Markup:
    spans = [
        Markup('<span style="bottom:{}%">{}</span>').format(f"{at:.2f}", text) for at, text in stops
    ]
    # The widest text, unseen, gives the column its width.
    widest = max((text for _, text in stops), key=len, default="")
    return Markup('<div class="y-axis" aria-hidden="true"><i>{}</i>{}</div>').format(
        widest, _join(spans)
    )


def _chart(
    y: Sequence[tuple[float, str]],
    x: Sequence[tuple[float, str]],
    marks: Markup,
    texts: Markup = NOTHING,
) -> Markup:
    grid = _join(
        Markup('<line class="grid" x1="0" x2="100%" y1="{}%" y2="{}%"/>').format(
            *[f"{100 - at:.2f}"] * 2
        )
        for at, _ in y
    )
    return Markup(
        '{}<div class="canvas"><svg width="100%" height="100%" aria-hidden="true">{}{}</svg>{}'
        "</div><div></div>{}"
    ).format(_y_axis(y), grid, marks, texts, _x_axis(x))


def _path(kind: str, outline: str) -> Markup:
    """A path in units of a thousandth of the canvas, its line as wide as the style sheet says."""
    return Markup(
        '<svg viewBox="0 0 {u} {u}" preserveAspectRatio="none" width="100%" height="100%">'
        '<path class="{kind}" d="{outline}"/></svg>'
    ).format(u=UNITS, kind=kind, outline=outline)


def _lines(chart: Lines) -> Markup:
    scale = math.log if chart.logarithmic else float
    values = [value for line in chart.lines for value in line.values]
    values += [chart.reference] if chart.reference is not None else []
    low, high = scale(min(values)), scale(max(values))
    room = 0.08 * (high - low) or abs(high) * 0.01 or 1.0
    low, high = (0.0 if chart.from_zero else low - room), high + room

    def up(value: float) -> float:
        return _share(scale(value), low, high)

    parts = []
    if chart.reference is not None:
        at = f"{100 - up(chart.reference):.2f}%"
        parts.append(Markup('<line class="zero" x1="0" x2="100%" y1="{}" y2="{}"/>').format(at, at))
    parts += [
        _path(f"line {line.role}", _steps([up(v) for v in line.values])) for line in chart.lines
    ]
    if chart.logarithmic:
        shown = log_ticks(math.exp(low), math.exp(high))
        stops = [(up(value), f"{value:,.3g}") for value in shown]
    else:
        shown = ticks(low, high, 4)
        stops = [(up(v), text) for v, text in zip(shown, tick_texts(shown), strict=True)]
    return _chart(stops, _position_stops(chart), _join(parts))


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
        f"{line.label}: {_number(line.values[0])} in the first bin, "
        f"{_number(line.values[-1])} in the last, largest {_number(max(line.values))}"
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
            height = _share(math.log10(tokens), floor, top)
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
    y_stops = [(_share(math.log10(power), floor, top), f"{power:,}") for power in powers]
    return _chart(y_stops, _edge_stops(chart), _join(parts))


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
        f"{chart.counts[0]:,} of them below {_number(low)} and {chart.counts[-1]:,} at or above "
        f"{_number(high)}; the fullest bin has {max(chart.counts):,}"
    )


# --- pairs and scatter


def pair_bars(pair: Pair) -> Markup:
    """Both values of one row as bars, for a cell of the table that has them as numbers."""
    top = max(pair.baseline, pair.candidate)
    return _join(
        Markup(
            '<svg class="pair" height="7" aria-hidden="true">'
            '<rect class="{}" width="{}%" height="100%"/></svg>'
        ).format(role, f"{100 * value / top if top else 0:.2f}")
        for role, value in (("baseline", pair.baseline), ("candidate", pair.candidate))
    )


def _scatter(chart: Scatter) -> Markup:
    (x_low, x_high), (y_low, y_high) = scatter_limits(chart)
    places = [
        (_share(point.x, x_low, x_high), _share(point.y, y_low, y_high)) for point in chart.points
    ]
    parts = []
    front = sorted(place for place, point in zip(places, chart.points, strict=True) if point.best)
    if len(front) > 1:
        outline = "L".join(f"{10 * x:.1f} {10 * (100 - y):.1f}" for x, y in front)
        parts.append(_path("front", f"M{outline}"))
    if y_low <= 0 <= y_high:
        at = f"{100 - _share(0, y_low, y_high):.2f}%"
        parts.append(Markup('<line class="zero" x1="0" x2="100%" y1="{}" y2="{}"/>').format(at, at))
    for (x, y), point in zip(places, chart.points, strict=True):
        parts.append(_scatter_point(point, x, y, (y_low, y_high)))
    x_values, y_values = ticks(x_low, x_high, 4), ticks(y_low, y_high, 5)
    return Markup('<div class="y-title">{}</div>{}<div class="x-title">{}</div>').format(
        chart.y_axis,
        _chart(
            [
                (_share(v, y_low, y_high), t)
                for v, t in zip(y_values, tick_texts(y_values), strict=True)
            ],
            [
                (_share(v, x_low, x_high), t)
                for v, t in zip(x_values, tick_texts(x_values), strict=True)
            ],
            _join(parts),
            _scatter_labels(chart.points, places),
        ),
        chart.x_axis,
    )


def scatter_limits(chart: Scatter) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of both axes: all points with their intervals, no loss, and some room."""
    xs = [point.x for point in chart.points]
    ys = [0.0]
    for point in chart.points:
        ys += [v for v in (point.y, point.low, point.high) if v is not None]
    limits = []
    for values in (xs, ys):
        low, high = min(values), max(values)
        room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        limits.append((low - room, high + room))
    return limits[0], limits[1]


def _scatter_point(point: Point, x: float, y: float, limits: tuple[float, float]) -> Markup:
    interval = NOTHING
    if point.low is not None and point.high is not None:
        ends = [f"{100 - _share(end, *limits):.2f}%" for end in (point.low, point.high)]
        interval = Markup('<line class="interval" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(
            *[f"{x:.2f}"] * 2, *ends
        )
    return Markup('<g class="{}">{}<circle class="estimate" cx="{}%" cy="{}%" r="5"/></g>').format(
        state_class(point.state), interval, f"{x:.2f}", f"{100 - y:.2f}"
    )


def _scatter_labels(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> Markup:
    """Names beside the points, moved apart where they would cover each other."""
    taken: list[tuple[bool, float]] = []
    spans = []
    for (x, y), point in sorted(zip(places, points, strict=True), key=lambda pair: -pair[0][1]):
        left = x > 55
        while any(left == side and abs(y - other) < LABEL_GAP for side, other in taken):
            y -= LABEL_GAP / 4
        taken.append((left, y))
        style = f"right:{100 - x:.2f}%" if left else f"left:{x:.2f}%"
        spans.append(
            Markup('<span class="point-label {}" style="{};bottom:{}%">{}</span>').format(
                "before" if left else "after", style, f"{y:.2f}", point.label
            )
        )
    return _join(spans)


def _scatter_words(chart: Scatter) -> str:
    rows = []
    for point in chart.points:
        words = f"{point.label}: {_number(point.x)}, {_number(point.y)}"
        if point.low is not None and point.high is not None:
            words += f" ({_number(point.low)} to {_number(point.high)})"
        rows.append(words + (", on the frontier" if point.best else ""))
    return f"{chart.title}: {chart.x_axis} against {chart.y_axis}. " + "; ".join(rows)
