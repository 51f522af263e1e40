"""Several tasks together: their average, and whether any of them got worse.

The p-values are those of Kübler et al., arXiv:2602.10144: each task's one-sided exact McNemar test,
P(lost or more of the flips | each flip goes either way with probability ½), combined in three ways.
They take documents as independent, also where the tasks' intervals are clustered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from quantize.records import Aggregate, TaskDelta
from quantize.report.paired.intervals import Floats, Student


def average(estimates: Sequence[Student]) -> Student:
    """Mean over tasks of how much worse each is; every task weighs alike.

    Tasks are independent: error = √(Σ error²) / tasks. The degrees of freedom are Welch and
    Satterthwaite's, (Σ error²)² / Σ (error⁴ / freedom).
    """
    errors = np.array([estimate.error for estimate in estimates])
    freedoms = np.array([estimate.freedom for estimate in estimates])
    total, spread = float((errors**2).sum()), float((errors**4 / freedoms).sum())
    return Student(
        value=float(np.mean([estimate.value for estimate in estimates])),
        middle=float(np.mean([estimate.middle for estimate in estimates])),
        error=float(np.sqrt(total)) / len(estimates),
        freedom=total**2 / spread if spread > 0 else np.inf,
    )


def aggregate(deltas: Sequence[TaskDelta], estimates: Sequence[Student]) -> Aggregate:
    """All tasks that count: the average, and the three p-values where scores are 0/1.

    The interval of the mean recovery takes the baseline's scores as given, as that of each task
    does; it is absent where a task's recovery is no linear function of its score (lower is better).
    """
    mean = average(estimates)
    found = Aggregate(
        tasks=len(deltas),
        documents=sum(delta["documents"] for delta in deltas),
        worse=mean.value,
        low=mean.low,
        high=mean.high,
    )
    recoveries = [delta["recovery"] for delta in deltas if "recovery" in delta]
    if len(recoveries) == len(deltas):
        found["recovery"] = float(np.mean(recoveries))
        if all(delta["higher_is_better"] for delta in deltas):
            lost = average(
                [
                    estimate.over(delta["baseline"])
                    for delta, estimate in zip(deltas, estimates, strict=True)
                ]
            )
            found["recovery_low"], found["recovery_high"] = 1 - lost.high, 1 - lost.low
    flips = [
        (delta["lost"], delta["lost"] + delta["gained"]) for delta in deltas if "mcnemar_p" in delta
    ]
    if flips:
        found["pooled_p"] = pooled_p(flips)
        found["fisher_p"] = fisher_p(flips)
        found["max_p"] = max_p(flips)
    return found


def mcnemar_p(lost: int, flips: int) -> float:
    """One-sided exact McNemar: P(X ≥ lost), X ~ binomial(flips, ½); 1 without any flip."""
    return float(stats.binom.sf(lost - 1, flips, 0.5))


def pooled_p(flips: Sequence[tuple[int, int]]) -> float:
    """One McNemar test of all tasks' documents; `flips` holds (lost, flips) of each task.

    Strongest where a loss is spread over all tasks alike; large tasks weigh more.
    """
    lost, total = np.sum(flips, axis=0)
    return mcnemar_p(int(lost), int(total))


def fisher_p(flips: Sequence[tuple[int, int]]) -> float:
    """Fisher's combination, -2 Σ ln pᵢ against χ² with 2 · tasks degrees of freedom.

    The pᵢ are discrete, so it rejects at most as often as it says.
    """
    values = [mcnemar_p(*flip) for flip in flips]
    return float(stats.combine_pvalues(values, method="fisher").pvalue)


def max_p(flips: Sequence[tuple[int, int]]) -> float:
    """P-value of the task that shows the strongest loss, among all that were looked at.

    P(min p ≤ the one seen) = 1 - Π (1 - Fᵢ), where Fᵢ is the largest p-value that task i can have
    (at its number of flips) that is not above the one seen. This is what permuting the signs of all
    flips converges to, without the permutations: the flips of different tasks are independent.
    """
    seen = min(mcnemar_p(*flip) for flip in flips)
    reached = [_largest_up_to(seen, flips_of_task) for _, flips_of_task in flips]
    return float(-np.expm1(np.sum(np.log1p(-np.minimum(reached, 1 - 1e-16)))))


def _largest_up_to(seen: float, flips: int) -> float:
    possible: Floats = stats.binom.sf(np.arange(-1, flips), flips, 0.5)  # lost = 0 ... flips
    # Equal p-values may differ in the last digits.
    return float(possible[possible <= seen * (1 + 1e-9)].max(initial=0.0))
