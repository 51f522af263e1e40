"""Pieces of the report's pictures: axes, a canvas, paths, and the class of a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from quantize.report.page.formats import MINUS

UNITS = 1000  # of a path's own coordinates
NOTHING = Markup("")

Stops = Sequence[tuple[float, str]]
"""Where on an axis, in percent, stands which text."""


def join(parts: Iterable[Markup]) -> Markup:
    """One after the other."""
    return NOTHING.join(parts)


def number(value: float) -> str:
    """Four significant digits, for a text alternative."""
    return f"{value:.4g}".replace("-", MINUS)


def share(value: float, low: float, high: float) -> float:
    """Percent of the way from low to high, cut at both ends."""
    return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


def state_class(verdict: str) -> str:
    """The class that colours a verdict."""
    return f"is-{verdict.replace(' ', '-')}" if verdict else "is-open"


def x_axis(stops: Stops) -> Markup:
    """Texts at percentages of the width; those at the ends stay inside."""
    spans = []
    for at, text in stops:
        side = "start" if at < 4 else "end" if at > 96 else "mid"
        spans.append(
            Markup('<span class="{}" style="left:{}%">{}</span>').format(side, f"{at:.2f}", text)
        )
    return Markup('<div class="x-axis" aria-hidden="true">{}</div>').format(join(spans))


def y_axis(stops: Stops) -> Markup:
    """Texts at percentages of the height."""
    spans = [
        Markup('<span style="bottom:{}%">{}</span>').format(f"{at:.2f}", text) for at, text in stops
    ]
    # The widest text, unseen, gives the column its width.
    widest = max((text for _, text in stops), key=len, default="")
    return Markup('<div class="y-axis" aria-hidden="true"><i>{}</i>{}</div>').format(
        widest, join(spans)
    )


def canvas(
    y: Stops,
    x: Stops,
    marks: Markup,
    texts: Markup = NOTHING,
) -> Markup:
    """Both axes, the grid, and the marks between them."""
    grid = join(
        Markup('<line class="grid" x1="0" x2="100%" y1="{}%" y2="{}%"/>').format(
            *[f"{100 - at:.2f}"] * 2
        )
        for at, _ in y
    )
    return Markup(
        '{}<div class="canvas"><svg width="100%" height="100%" aria-hidden="true">{}{}</svg>{}'
        "</div><div></div>{}"
    ).format(y_axis(y), grid, marks, texts, x_axis(x))


def path(kind: str, outline: str) -> Markup:
    """A path in units of a thousandth of the canvas, its line as wide as the style sheet says."""
    return Markup(
        '<svg viewBox="0 0 {u} {u}" preserveAspectRatio="none" width="100%" height="100%">'
        '<path class="{kind}" d="{outline}"/></svg>'
    ).format(u=UNITS, kind=kind, outline=outline)
