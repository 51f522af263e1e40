"""Estimates with 95% intervals, and how well a limit above them is refuted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CONFIDENCE = 0.95
ALPHA = (1 - CONFIDENCE) / 2
"""Of one side: 0.025."""
POWER = 0.8
"""With which a loss of the size called detectable is found."""
RESAMPLES = 10_000
MIN_UNITS = 20
"""Fewer resampled units than this, and a bootstrap interval is too narrow to be believed."""


class Estimate(Protocol):
    """A number with its 95% interval and the one-sided tests that belong to this interval."""

    @property
    def value(self) -> float:
        """The estimate itself."""
        ...

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        ...

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        ...

    @property
    def error(self) -> float:
        """Standard error."""
        ...

    def p_above(self, limit: float) -> float:
        """One-sided p-value of "the truth is at most `limit`"; below `ALPHA` where low > limit."""
        ...


@dataclass(frozen=True)
class Student:
    """A mean whose error follows Student's t; `freedom` is inf for the normal distribution."""

    value: float
    middle: float  # of the interval: not the value itself where the interval is an adjusted one
    error: float
    freedom: float
    bound: float = np.inf  # the truth lies between -bound and bound

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return max(-self.bound, self.middle - self._quantile(1 - ALPHA) * self.error)

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return min(self.bound, self.middle + self._quantile(1 - ALPHA) * self.error)

    @property
    def detectable(self) -> float:
        """True value that a two-sided 5% test tells from 0 with 80% power: (t₀.₉₇₅ + t₀.₈) error.

        For a paired difference this is the minimum detectable effect at this number of documents
        and this discordance.
        """
        return (self._quantile(1 - ALPHA) + self._quantile(POWER)) * self.error

    def over(self, unit: float) -> Student:
        """The same in shares of `unit`, which is taken as given."""
        return Student(
            self.value / unit,
            self.middle / unit,
            self.error / unit,
            self.freedom,
            self.bound / unit,
        )

    def p_above(self, limit: float) -> float:
        """One-sided p-value of "the truth is at most `limit`"."""
        if self.error == 0:
            return 0.0 if self.middle > limit else 1.0
        return float(special.stdtr(self.freedom, (limit - self.middle) / self.error))

    def _quantile(self, probability: float) -> float:
        return float(special.stdtrit(self.freedom, probability))


@dataclass(frozen=True)
class Resampled:
    """A bootstrap over `units` units; `draws` (resamples,) are in ascending order.

    Percentile intervals of few units are too narrow; the quantiles are moved out to
    Φ(-√(n/(n-1)) t₀.₉₇₅,ₙ₋₁), which corrects for it (Hesterberg, "What teachers should know about
    the bootstrap", 2015: expanded percentile interval).
    """

    value: float
    draws: Floats
    units: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return float(np.quantile(self.draws, self._tail))

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return float(np.quantile(self.draws, 1 - self._tail))

    @property
    def error(self) -> float:
        """Standard deviation of the draws."""
        return float(self.draws.std())

    def p_above(self, limit: float) -> float:
        """The level at which the interval's lower end would be `limit`: its inversion.

        The share of draws at or below the limit, at least one of all: more is not known.
        """
        below = int(np.searchsorted(self.draws, limit, side="right"))
        share = max(below, 1) / len(self.draws)
        student = special.ndtri(share) / np.sqrt(self.units / (self.units - 1))
        return float(special.stdtr(self.units - 1, student))

    @property
    def _tail(self) -> float:
        student = special.stdtrit(self.units - 1, 1 - ALPHA)
        return float(special.ndtr(-np.sqrt(self.units / (self.units - 1)) * student))


def paired_mean(values: Floats, cluster: Integers | None = None, *, binary: bool) -> Student:
    """Mean of paired differences (documents,) with its error.

    - Graded scores: Student's t of the differences, n-1 degrees of freedom.
    - 0/1 scores (`binary`: differences of -1, 0, 1): Bonett and Price's (2012) adjusted Wald
      interval of paired proportions. One flip is added in each direction, so that the interval has
      a width without any flip too; it is normal, and lies within [-1, 1].
    - With `cluster` (documents,): the cluster-robust error of :func:`clustered_error` with t of G-1
      degrees of freedom for G clusters (Miller, arXiv:2411.00640); the two added flips of 0/1
      scores are clusters of their own. Of few clusters of very unequal size it is too narrow.

    At least two documents, and two clusters.
    """
    value = float(values.mean())
    bound = 1.0 if binary else np.inf
    if cluster is not None:
        freedom = float(len(np.unique(cluster)) - 1)
        if binary:
            new = int(cluster.max()) + 1
            values = np.append(values, (1.0, -1.0))
            cluster = np.append(cluster, (new, new + 1))
        error = clustered_error(values, cluster)
        return Student(value, float(values.mean()), error, freedom, bound)
    count = len(values)
    if binary:
        values = np.append(values, (1.0, -1.0))
        error = float(values.std() / np.sqrt(count + 2))
        return Student(value, float(values.mean()), error, np.inf, bound)
    error = float(values.std(ddof=1) / np.sqrt(count))
    return Student(value, value, error, float(count - 1), bound)


def clustered_error(values: Floats, cluster: Integers) -> float:
    """Standard error of the mean of `values` (documents,) that are not independent in a cluster.

    √(G/(G-1) Σ_c (Σ_{i in c} (xᵢ - x̄))²) / n: CR1, what ordinary least squares on a constant gives
    with cluster-robust covariance.
    """
    return float(np.sqrt(clustered_covariance(values[None, :], cluster)[0, 0]))


def clustered_covariance(values: Floats, cluster: Integers) -> Floats:
    """Covariance (k, k) of the means of `values` (k, documents), CR1 as above."""
    _, place = np.unique(cluster, return_inverse=True)
    clusters = int(place.max()) + 1
    centred = values - values.mean(axis=1, keepdims=True)
    sums = np.stack([np.bincount(place, weights=row, minlength=clusters) for row in centred])
    found: Floats = sums @ sums.T * clusters / (clusters - 1) / values.shape[1] ** 2
    return found


def resampled_mean(totals: Floats, tokens: Floats) -> Resampled:
    """Bootstrap of Σ totals / Σ tokens; both are (units,), at least two units.

    The units are drawn with replacement `RESAMPLES` times (seed 0: the same input gives the same
    interval).
    """
    count = len(totals)
    generator = np.random.default_rng(0)
    shares = np.full(count, 1 / count)
    drawn = []
    for resamples in chunks(RESAMPLES, 4_000_000 // count + 1):
        weights = generator.multinomial(count, shares, size=resamples).astype(np.float64)
        drawn.append(weights @ totals / (weights @ tokens))  # (resamples,)
    value = float(totals.sum() / tokens.sum())
    return Resampled(value, np.sort(np.concatenate(drawn)), count)


def token_units(document: Integers) -> Integers:
    """Index (tokens,) of the unit that each token is resampled with.

    Its document: tokens of one document are not independent. With fewer than `MIN_UNITS` documents,
    its block among `MIN_UNITS` of consecutive tokens.
    """
    names, unit = np.unique(document, return_inverse=True)
    if len(names) >= MIN_UNITS:
        return unit.astype(np.int64)
    return np.arange(len(document)) * MIN_UNITS // len(document)


def chunks(total: int, size: int) -> Iterator[int]:
    """`total` in pieces of at most `size`, to bound memory."""
    for start in range(0, total, size):
        yield min(size, total - start)
