"""How much of what the fine-tune gained over its base is left after quantization."""

from __future__ import annotations

import numpy as np
from scipy import special

from quantize.records import Retention, Task
from quantize.report.paired.intervals import (
    ALPHA,
    Floats,
    clustered_covariance,
    paired_mean,
)
from quantize.report.paired.pairing import Paired


def retention(task: Task, paired: Paired) -> Retention:
    """(candidate - base) / (fine-tune - base) of one task, with Fieller's 95% interval.

    `paired` holds the base, the fine-tune and the candidate, in this order. The numerator and the
    denominator share documents and are strongly correlated: their covariance is that of the paired
    differences. `gain` is how much better the fine-tune is than its base, with its own interval;
    where that reaches 0 the quotient means nothing and is left out.
    """
    base, tuned, candidate = paired.scores
    sign = 1.0 if task["higher_is_better"] else -1.0
    gain = paired_mean(sign * (tuned - base), paired.cluster, binary=paired.binary)
    found = Retention(
        name=task["name"],
        metric=task["metric"],
        base=float(base.mean()),
        fine_tuned=float(tuned.mean()),
        candidate=float(candidate.mean()),
        gain=gain.value,
        gain_low=gain.low,
        gain_high=gain.high,
    )
    interval = _fieller(sign * (candidate - base), sign * (tuned - base), paired)
    if gain.low <= 0 or interval is None:
        what = "is worse than its base" if gain.high < 0 else "cannot be told from its base"
        found["reason"] = f"on these documents the fine-tune {what}: there is no gain to retain"
        return found
    found["retained"] = float((candidate - base).mean() / (tuned - base).mean())
    found["retained_low"], found["retained_high"] = interval
    return found


def _fieller(left: Floats, gained: Floats, paired: Paired) -> tuple[float, float] | None:
    """Fieller's 95% interval of mean(left) / mean(gained), both (documents,); None: unbounded.

    The quotients ρ for which mean(left - ρ · gained) is not told from 0:
    (N - ρD)² ≤ t² (v_NN - 2ρ v_ND + ρ² v_DD). It is bounded where D² > t² v_DD.

    For 0/1 scores two documents are added as in Bonett and Price's interval, so that it has a width
    without any flip too: one that the fine-tune gained and the candidate lost again, and one the
    other way round.
    """
    cluster, freedom = paired.cluster, float(len(left) - 1)
    if paired.binary:
        left, gained = np.append(left, (0.0, 0.0)), np.append(gained, (1.0, -1.0))
    if cluster is None:
        cluster = np.arange(len(left))
    else:
        freedom = float(len(np.unique(cluster)) - 1)
        if paired.binary:
            cluster = np.append(cluster, (cluster.max() + 1, cluster.max() + 2))
    covariance = clustered_covariance(np.stack([left, gained]), cluster)
    squared = special.stdtrit(freedom, 1 - ALPHA) ** 2
    # a ρ² - 2 b ρ + c ≤ 0
    a = gained.mean() ** 2 - squared * covariance[1, 1]
    b = left.mean() * gained.mean() - squared * covariance[0, 1]
    c = left.mean() ** 2 - squared * covariance[0, 0]
    if a <= 0:
        return None
    # Rounding can take the root of an interval that is one point below zero.
    root = float(np.sqrt(max(0.0, b * b - a * c)))
    return float((b - root) / a), float((b + root) / a)
