"""95% intervals of paired differences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NORMAL_HALF_WIDTH = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
"""1.96: standard errors from the middle of a normal 95% interval to its ends."""
RESAMPLES = 10_000


def ratio_interval(nats: Floats, tokens: Floats) -> tuple[float, float]:
    """Bootstrap interval of exp(Σ nats / Σ tokens); `nats`, `tokens` (units,), at least two units.

    The units are drawn with replacement `RESAMPLES` times (seed 0: the same input gives the same
    interval). Percentile intervals of few units are too narrow; the quantiles are moved out to
    Φ(-√(n/(n-1)) t₀.₉₇₅,ₙ₋₁), which corrects for it (Hesterberg, "What teachers should
    know about the bootstrap", 2015: expanded percentile interval).
    """
    count = len(nats)
    generator = np.random.default_rng(0)
    shares = np.full(count, 1 / count)
    drawn = []
    for resamples in chunks(RESAMPLES, 4_000_000 // count + 1):
        weights = generator.multinomial(count, shares, size=resamples).astype(np.float64)
        drawn.append(weights @ nats / (weights @ tokens))  # (resamples,)
    student = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    tail = float(stats.norm.cdf(-np.sqrt(count / (count - 1)) * student))
    low, high = np.exp(np.quantile(np.concatenate(drawn), [tail, 1 - tail]))
    return float(low), float(high)


def proportion_interval(up: int, down: int, documents: int) -> tuple[float, float]:
    """Bonett–Price interval of (up - down)/documents, within [-1, 1].

    Adjusted Wald interval for a difference of paired proportions (Bonett & Price 2012): one is
    added to each of the two counts of flips, so that the interval has a width without any flip too.
    """
    share_up, share_down = (up + 1) / (documents + 2), (down + 1) / (documents + 2)
    middle = share_up - share_down
    spread = np.sqrt((share_up + share_down - middle**2) / (documents + 2))
    half = float(NORMAL_HALF_WIDTH * spread)
    return max(-1.0, middle - half), min(1.0, middle + half)


def chunks(total: int, size: int) -> Iterator[int]:
    """`total` in pieces of at most `size`, to bound memory."""
    for start in range(0, total, size):
        yield min(size, total - start)
