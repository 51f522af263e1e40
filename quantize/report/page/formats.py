"""Numbers for the HTML report: each is a `<data>` element that carries the record's own value."""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup

from quantize.report.results import bytes_text

MINUS = "\N{MINUS SIGN}"


def data(value: float, text: str) -> Markup:
    """The value as the record has it, and as a person reads it."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number to show")
    return Markup('<data value="{}">{}</data>').format(repr(value), text.replace("-", MINUS))


def count(value: int) -> Markup:
    """1,234"""
    return data(value, f"{value:,}")


def fixed(value: float, digits: int = 4) -> Markup:
    """0.8450"""
    return data(value, f"{value:,.{digits}f}")


def signed(value: float, digits: int = 4) -> Markup:
    """+0.0012"""
    return data(value, _signed(value, digits))


def percent(value: float, digits: int = 2) -> Markup:
    """A share: 84.50%"""
    return data(value, f"{100 * value:.{digits}f}%")


def signed_percent(value: float, digits: int = 2) -> Markup:
    """A change: +0.93%"""
    return data(value, f"{_signed(100 * value, digits)}%")


def points(value: float, digits: int = 2) -> Markup:
    """A difference of shares, in percentage points: -0.50"""
    return data(value, _signed(100 * value, digits))


def bare_points(value: float, digits: int = 2) -> Markup:
    """A width in percentage points, without a sign: 0.50"""
    return data(value, f"{100 * value:.{digits}f}")


def _signed(value: float, digits: int) -> str:
    text = f"{value:+,.{digits}f}"
    return text[1:] if float(text.replace(",", "")) == 0 else text


def ratio(value: float, digits: int = 4) -> Markup:
    """×1.0093"""
    return data(value, f"×{value:.{digits}f}")


def significant(value: float, digits: int = 3) -> Markup:
    """Three significant digits, plain where that is short: 0.00645, 1.2e-06"""
    if value == 0:
        return data(value, "0")
    if 1e-5 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return data(value, f"{value:,.{decimals}f}")
    return data(value, f"{value:.{digits - 1}e}")


def plain(value: float) -> Markup:
    """As few digits as say it, four at most: 1, 0.25"""
    return data(value, f"{value:.4g}")


def size(value: int) -> Markup:
    """Decimal units: 3.75 MB"""
    return data(value, bytes_text(value))


def seconds(value: float) -> Markup:
    """12.3 s"""
    return data(value, f"{value:,.1f} s")


def formatted(value: float, form: str) -> Markup:
    """By a format of :data:`quantize.report.results.SERVING`."""
    return data(value, form.format(value))


FILTERS: dict[str, Callable[..., Markup]] = {
    "count": count,
    "fixed": fixed,
    "signed": signed,
    "percent": percent,
    "signed_percent": signed_percent,
    "points": points,
    "bare_points": bare_points,
    "ratio": ratio,
    "significant": significant,
    "plain": plain,
    "size": size,
    "seconds": seconds,
    "formatted": formatted,
}
