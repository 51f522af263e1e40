"""Candidate against baseline: perplexity and tasks, paired, with intervals.

Pure functions of what the two `measure` artifacts hold. Both sides answered the same questions, so
every number here is paired (by token, by document): the questions' own spread, which is much larger
than the effect of quantization, cancels. KL divergence is in :mod:`quantize.report.divergence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from quantize.errors import SourceError
from quantize.recipe import Margins
from quantize.records import CompareRecord, Gate, PerplexityDelta, Task, TaskDelta
from quantize.report.divergence import SAME_QUESTIONS, Floats, Integers, TokenLogprobs, check_paired
from quantize.report.intervals import NORMAL_HALF_WIDTH, proportion_interval, ratio_interval

MIN_UNITS = 20
"""Fewer resampled units than this, and a bootstrap interval is too narrow to be believed."""


def perplexity_delta(baseline: TokenLogprobs, candidate: TokenLogprobs) -> PerplexityDelta:
    """Perplexity of both sides and their ratio, with a 95% interval.

    perplexity = exp(-Σ logprob / tokens), over all scored tokens, each counted once;
    ratio = candidate / baseline = exp(Σ (logprob_b - logprob_c) / tokens): 1.01 means that the
    candidate is as surprised as if it chose among 1% more tokens. The interval is a bootstrap-t
    over documents, because tokens of one document are not independent
    (:func:`quantize.report.intervals.ratio_interval`). A text of fewer than `MIN_UNITS` documents
    is resampled in `MIN_UNITS` blocks of consecutive tokens.

    Raises SourceError if the sides scored other tokens, or fewer than `MIN_UNITS`.
    """
    check_paired(baseline, candidate)
    lost_nats = baseline.logprob - candidate.logprob  # (tokens,)
    unit = _resampling_units(baseline.document)
    nats = np.bincount(unit, weights=lost_nats).astype(np.float64)  # (units,)
    low, high = ratio_interval(nats, np.bincount(unit).astype(np.float64))
    return PerplexityDelta(
        baseline=float(np.exp(-baseline.logprob.mean())),
        candidate=float(np.exp(-candidate.logprob.mean())),
        ratio=float(np.exp(lost_nats.mean())),
        ratio_low=low,
        ratio_high=high,
        scored_tokens=len(baseline.token),
        documents=len(np.unique(baseline.document)),
    )


def _resampling_units(document: Integers) -> Integers:
    """Index (tokens,) of the unit each token is resampled with: its document, or its block."""
    names, unit = np.unique(document, return_inverse=True)
    if len(names) >= MIN_UNITS:
        return unit.astype(np.int64)
    if len(document) < MIN_UNITS:
        raise SourceError(
            f"{len(document)} scored tokens are too few for an interval",
            f"give the suite a held-out text of more than {MIN_UNITS} tokens",
        )
    return np.arange(len(document)) * MIN_UNITS // len(document)


def task_delta(
    task: Task, baseline: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]
) -> TaskDelta:
    """Candidate minus baseline score of one task, paired by document.

    score = mean over documents, in the metric's unit. standard_error = sd(differences)/√n
    (ddof 1), with documents taken as independent; documents that share a passage are not, and
    clustering by their group would widen the interval. The 95% interval is difference ± 1.96
    standard errors; for 0/1 scores it is Bonett and Price's (2012) adjusted Wald interval for
    paired proportions, which does not collapse to a point when few or no answers flipped.
    `lost` and `gained` count documents whose score got worse or better (for 0/1: right before and
    wrong after). `mcnemar_p`: exact two-sided McNemar test, binomial(lost; lost + gained, ½).

    Raises SourceError if documents or their prompts differ, or if there are fewer than two.
    """
    before, after = _paired_scores(task["name"], baseline, candidate)
    if len(before) < 2:
        raise SourceError(f"task {task['name']} has {len(before)} documents: no interval exists")
    change = after - before
    better = change if task["higher_is_better"] else -change
    lost, gained = int((better < 0).sum()), int((better > 0).sum())
    standard_error = float(change.std(ddof=1) / np.sqrt(len(change)))
    difference = float(change.mean())
    half = NORMAL_HALF_WIDTH * standard_error
    delta = TaskDelta(
        name=task["name"],
        metric=task["metric"],
        higher_is_better=task["higher_is_better"],
        baseline=float(before.mean()),
        candidate=float(after.mean()),
        difference=difference,
        difference_low=difference - half,
        difference_high=difference + half,
        standard_error=standard_error,
        documents=len(change),
        lost=lost,
        gained=gained,
    )
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        up, down = int((change > 0).sum()), int((change < 0).sum())
        delta["difference_low"], delta["difference_high"] = proportion_interval(
            up, down, len(change)
        )
        flips = lost + gained
        delta["mcnemar_p"] = float(stats.binomtest(lost, flips).pvalue) if flips else 1.0
    return delta


def _paired_scores(
    name: str, baseline: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]]
) -> tuple[Floats, Floats]:
    """Scores (documents,) of both sides in the baseline's order."""
    before, after = _by_document(name, baseline), _by_document(name, candidate)
    for document in [*before, *after]:
        for side, samples in (("baseline", before), ("candidate", after)):
            if document not in samples:
                raise SourceError(
                    f"task {name}: the {side} has no answer to document {document}", SAME_QUESTIONS
                )
        if before[document]["prompt_sha256"] != after[document]["prompt_sha256"]:
            raise SourceError(
                f"task {name}: the two sides were asked different prompts for document {document}",
                SAME_QUESTIONS,
            )
    scores = [(before[document]["score"], after[document]["score"]) for document in before]
    pairs = np.array(scores, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(pairs).all():
        raise SourceError(f"task {name} has scores that are not finite numbers")
    return pairs[:, 0], pairs[:, 1]


def _by_document(name: str, samples: Sequence[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    """Samples by document id; an id that comes twice is an error."""
    found: dict[Any, Mapping[str, Any]] = {}
    for sample in samples:
        if sample["doc"] in found:
            raise SourceError(f"task {name} has two answers to document {sample['doc']}")
        found[sample["doc"]] = sample
    return found


def gates(margins: Margins, compare: CompareRecord) -> list[Gate]:
    """The recipe's margins as gates; what was not measured has no gate.

    `perplexity_ratio`: ratio ≤ limit. `task_drop:<name>`: how much worse the score is, in the
    metric's unit, ≤ limit. The point estimates decide, not the ends of the intervals.
    """
    found = []
    if margins.perplexity_ratio is not None and "perplexity" in compare:
        ratio = compare["perplexity"]["ratio"]
        found.append(_gate("perplexity_ratio", margins.perplexity_ratio, ratio))
    if margins.task_drop is not None:
        for task in compare["tasks"]:
            worse = -task["difference"] if task["higher_is_better"] else task["difference"]
            found.append(_gate(f"task_drop:{task['name']}", margins.task_drop, worse))
    return found


def _gate(name: str, limit: float, value: float) -> Gate:
    return Gate(name=name, limit=limit, value=value, passed=value <= limit)
