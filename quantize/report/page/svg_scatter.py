"""Pareto pictures of the HTML report: a point a model, its interval, its name beside it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from quantize.report.page.axes import tick_texts, ticks
from quantize.report.page.figures import Point, Scatter
from quantize.report.page.svg_parts import NOTHING, canvas, join, number, path, share, state_class

LABEL_GAP = 7.5  # percent of the height between two names


def draw_scatter(chart: Scatter) -> Markup:
    """The picture without its caption."""
    (x_low, x_high), (y_low, y_high) = scatter_limits(chart)
    places = [
        (share(point.x, x_low, x_high), share(point.y, y_low, y_high)) for point in chart.points
    ]
    parts = []
    front = sorted(place for place, point in zip(places, chart.points, strict=True) if point.best)
    if len(front) > 1:
        outline = "L".join(f"{10 * x:.1f} {10 * (100 - y):.1f}" for x, y in front)
        parts.append(path("front", f"M{outline}"))
    if y_low <= 0 <= y_high:
        at = f"{100 - share(0, y_low, y_high):.2f}%"
        parts.append(Markup('<line class="zero" x1="0" x2="100%" y1="{}" y2="{}"/>').format(at, at))
    for (x, y), point in zip(places, chart.points, strict=True):
        parts.append(_scatter_point(point, x, y, (y_low, y_high)))
    x_values, y_values = ticks(x_low, x_high, 4), ticks(y_low, y_high, 5)
    return Markup('<div class="y-title">{}</div>{}<div class="x-title">{}</div>').format(
        chart.y_axis,
        canvas(
            [
                (share(v, y_low, y_high), t)
                for v, t in zip(y_values, tick_texts(y_values), strict=True)
            ],
            [
                (share(v, x_low, x_high), t)
                for v, t in zip(x_values, tick_texts(x_values), strict=True)
            ],
            join(parts),
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
        ends = [f"{100 - share(end, *limits):.2f}%" for end in (point.low, point.high)]
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
    return join(spans)


def scatter_words(chart: Scatter) -> str:
    """Its text alternative."""
    rows = []
    for point in chart.points:
        words = f"{point.label}: {number(point.x)}, {number(point.y)}"
        if point.low is not None and point.high is not None:
            words += f" ({number(point.low)} to {number(point.high)})"
        rows.append(words + (", on the frontier" if point.best else ""))
    return f"{chart.title}: {chart.x_axis} against {chart.y_axis}. " + "; ".join(rows)
