"""Candidate against baseline: perplexity and tasks, paired, with intervals.

Pure functions of what the two `measure` artifacts hold. Both sides answered the same questions, so
every number here is paired (by token, by document): the questions' own spread, which is much larger
than the effect of quantization, cancels. KL divergence is in
:mod:`quantize.report.paired.divergence`.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from quantize.errors import SourceError
from quantize.records import PerplexityDelta, Task, TaskDelta
from quantize.report.paired.divergence import TokenLogprobs, check_paired
from quantize.report.paired.intervals import (
    MIN_UNITS,
    Floats,
    Resampled,
    Student,
    clustered_error,
    paired_mean,
    resampled_mean,
    token_units,
)
from quantize.report.paired.pairing import Paired


def perplexity_delta(
    baseline: TokenLogprobs, candidate: TokenLogprobs
) -> tuple[PerplexityDelta, Resampled]:
    """Perplexity of both sides, their ratio with a 95% interval, and ratio - 1 as an estimate.

    perplexity = exp(-Σ logprob / tokens), over all scored tokens, each counted once;
    ratio = candidate / baseline = exp(Σ (logprob_b - logprob_c) / tokens): 1.01 means that the
    candidate is as surprised as if it chose among 1% more tokens. The interval is a bootstrap over
    documents, because tokens of one document are not independent
    (:class:`quantize.report.paired.intervals.Resampled`). A text of fewer than `MIN_UNITS`
    documents is resampled in `MIN_UNITS` blocks of consecutive tokens.

    Raises SourceError if the sides scored other tokens, or fewer than `MIN_UNITS`.
    """
    check_paired(baseline, candidate)
    if len(baseline.token) < MIN_UNITS:
        raise SourceError(
            f"{len(baseline.token)} scored tokens are too few for an interval",
            f"give the suite a held-out text of more than {MIN_UNITS} tokens",
        )
    nats, tokens = lost_nats(baseline, candidate)
    mean = resampled_mean(nats, tokens)
    worse = Resampled(float(np.expm1(mean.value)), np.expm1(mean.draws), mean.units)
    delta = PerplexityDelta(
        baseline=float(np.exp(-baseline.logprob.mean())),
        candidate=float(np.exp(-candidate.logprob.mean())),
        ratio=1 + worse.value,
        ratio_low=1 + worse.low,
        ratio_high=1 + worse.high,
        scored_tokens=len(baseline.token),
        documents=len(np.unique(baseline.document)),
    )
    return delta, worse


def lost_nats(baseline: TokenLogprobs, candidate: TokenLogprobs) -> tuple[Floats, Floats]:
    """Σ (logprob_b - logprob_c) and the number of tokens of each resampling unit, both (units,)."""
    unit = token_units(baseline.document)
    nats = np.bincount(unit, weights=baseline.logprob - candidate.logprob)
    return nats.astype(np.float64), np.bincount(unit).astype(np.float64)


def task_delta(task: Task, paired: Paired) -> tuple[TaskDelta, Student]:
    """Candidate minus baseline score of one task, and how much worse it is as an estimate.

    `paired` holds the baseline and the candidate. score = mean over documents, in the metric's
    unit; a sampled answer's score is the mean of its repeats. standard_error: paired,
    sd(differences)/√n (ddof 1), or clustered where documents are not independent. The 95% interval
    is that of :func:`quantize.report.paired.intervals.paired_mean`; for 0/1 scores it does not
    collapse to a point when few or no answers flipped.

    `lost` and `gained` count documents whose score got worse or better (for 0/1: right before and
    wrong after). `mcnemar_p`: exact two-sided McNemar test, binomial(lost; lost + gained, ½); it
    takes documents as independent, also where the interval does not.

    `recovery` = candidate / baseline (baseline / candidate where lower is better: 1 is nothing
    lost, less is worse). Its interval is the difference's over the baseline's score, which is taken
    as given: so it lies above a margin of recovery exactly when the verdict is non-inferior. For a
    recovery below 1 it is a little wider than one that takes the baseline's score as random.

    `detectable`: smallest true loss that 80% of such measurements would find
    (:attr:`quantize.report.paired.intervals.Student.detectable`).
    """
    before, after = paired.scores
    change = after - before
    sign = -1.0 if task["higher_is_better"] else 1.0
    worse = paired_mean(sign * change, paired.cluster, binary=paired.binary)
    lost, gained = int((sign * change > 0).sum()), int((sign * change < 0).sum())
    low, high = sorted((sign * worse.low, sign * worse.high))
    delta = TaskDelta(
        name=task["name"],
        metric=task["metric"],
        higher_is_better=task["higher_is_better"],
        baseline=float(before.mean()),
        candidate=float(after.mean()),
        difference=float(change.mean()),
        difference_low=low,
        difference_high=high,
        standard_error=_standard_error(change, paired),
        documents=len(change),
        lost=lost,
        gained=gained,
        detectable=worse.detectable,
    )
    if paired.cluster is not None:
        delta["clusters"] = len(np.unique(paired.cluster))
    if paired.binary:
        flips = lost + gained
        delta["mcnemar_p"] = float(stats.binomtest(lost, flips).pvalue) if flips else 1.0
    _add_recovery(delta)
    return delta, worse


def _standard_error(change: Floats, paired: Paired) -> float:
    if paired.cluster is not None:
        return clustered_error(change, paired.cluster)
    return float(change.std(ddof=1) / np.sqrt(len(change)))


def _add_recovery(delta: TaskDelta) -> None:
    """Nothing is added where the quotient has no meaning: a baseline of 0, or a score below it."""
    baseline = delta["baseline"]
    scores = [delta["candidate"], baseline + delta["difference_low"]]
    if baseline <= 0 or (not delta["higher_is_better"] and min(scores) <= 0):
        return
    shares = [
        (baseline + change) / baseline
        if delta["higher_is_better"]
        else baseline / (baseline + change)
        for change in (delta["difference"], delta["difference_low"], delta["difference_high"])
    ]
    delta["recovery"] = shares[0]
    delta["recovery_low"], delta["recovery_high"] = sorted(shares[1:])
    delta["recovery_low"] = max(0.0, delta["recovery_low"])
