"""Non-inferior, inferior or inconclusive: intervals held against the recipe's margins.

Everything is "how much worse" (positive: worse): a task's score in its metric's unit, perplexity as
ratio - 1.

    non-inferior    the whole 95% interval is inside the margin: high <= margin
    inferior        it is outside, low > margin, and that is no accident of asking often:
                    Holm-adjusted p < 0.025 over every verdict that counts
    inconclusive    otherwise
    not comparable  the two sides answered different questions

So a candidate that is exactly as bad as the margin passes with probability 0.025 at most and is
called inferior with probability 0.025 at most, over all verdicts together. Passing needs every
required verdict (an intersection-union test), so it needs no correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from quantize.evaluation import (
    DEFAULT_PERPLEXITY_RATIO,
    DEFAULT_RECOVERY,
    GateRules,
    Margins,
)
from quantize.records import TaskDelta, Verdict, VerdictName
from quantize.report.paired.intervals import ALPHA, POWER, Estimate

MOST_DOCUMENTS = 10_000_000
"""More than this is said as "no number of documents"."""


@dataclass(frozen=True)
class Rules:
    """The recipe's margins and gate, with the defaults filled in."""

    margins: Margins
    gate: GateRules
    bits: Literal[4, 8]

    @property
    def perplexity_ratio(self) -> float | None:
        """Highest allowed ratio; None for no margin."""
        given = self.margins.perplexity_ratio
        if isinstance(given, str):
            return None
        return DEFAULT_PERPLEXITY_RATIO[self.bits] if given is None else given

    def task_rule(self, name: str) -> tuple[Literal["recovery", "drop"], float] | None:
        """What the margin of a task is given as; None for no margin."""
        own = self.margins.tasks.get(name)
        if own is None:
            recovery, drop = self.margins.recovery, self.margins.task_drop
        else:
            recovery, drop = own.recovery, own.drop
        if drop is not None:
            return "drop", drop
        if isinstance(recovery, str):
            return None
        return "recovery", DEFAULT_RECOVERY[self.bits] if recovery is None else recovery

    def task_margin(self, task: TaskDelta) -> float | None:
        """Margin in the metric's unit, the baseline's score taken as given.

        Recovery r: (1 - r) · baseline, or (1/r - 1) · baseline where lower is better. None for no
        margin, and for a recovery of nothing: a baseline of 0 or below.
        """
        rule = self.task_rule(task["name"])
        if rule is None or rule[0] == "drop":
            return rule and rule[1]
        if task["baseline"] <= 0:
            return None
        share = 1 - rule[1] if task["higher_is_better"] else 1 / rule[1] - 1
        return share * task["baseline"]

    def counts(self, task: str) -> bool:
        """Whether the gate asks for this task."""
        return self.gate.tasks is None or task in self.gate.tasks


@dataclass(frozen=True)
class Question:
    """What a verdict is asked for; without an estimate it is not comparable, for this reason."""

    name: str
    rule: str
    counts: bool
    estimate: Estimate | None = None
    margin: float = 0.0
    documents: int = 0
    reason: str = ""


def judge(questions: Sequence[Question]) -> list[Verdict]:
    """One verdict a question, in their order; Holm's correction is over those that count."""
    counted = [q for q in questions if q.counts and q.estimate is not None]
    adjusted = holm([_p_inferior(q) for q in counted])
    p_values = {q.name: p for q, p in zip(counted, adjusted, strict=True)}
    return [_judge(question, p_values, len(counted)) for question in questions]


def _p_inferior(question: Question) -> float:
    assert question.estimate is not None
    return question.estimate.p_above(question.margin)


def _judge(question: Question, adjusted: dict[str, float], tests: int) -> Verdict:
    estimate, margin = question.estimate, question.margin
    verdict = Verdict(
        name=question.name,
        verdict="not comparable",
        rule=question.rule,
        counts=question.counts,
    )
    if question.reason:
        verdict["reason"] = question.reason
    if estimate is None:
        return verdict
    verdict["worse"], verdict["margin"] = estimate.value, margin
    verdict["low"], verdict["high"] = estimate.low, estimate.high
    p = adjusted.get(question.name, _p_inferior(question))
    if question.counts:
        verdict["adjusted_p"] = p
    verdict["verdict"] = _name(estimate, margin, p)
    if verdict["verdict"] == "inconclusive":
        more = more_documents(estimate, margin, question.documents, tests if question.counts else 1)
        if more is not None:
            verdict["more_documents"] = more
        elif "reason" not in verdict:
            verdict["reason"] = "the estimate is too near the margin for any number of documents"
    return verdict


def _name(estimate: Estimate, margin: float, adjusted_p: float) -> VerdictName:
    if estimate.high <= margin:
        return "non-inferior"
    if estimate.low > margin and adjusted_p < ALPHA:
        return "inferior"
    return "inconclusive"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def more_documents(estimate: Estimate, margin: float, documents: int, tests: int) -> int | None:
    """About how many more documents would decide, if the estimate holds; None for no number.

    Intervals narrow with 1/√n. Inside the margin: until the upper end reaches it,
    n · ((high - worse) / (margin - worse))² - n. Outside: until a true loss as large as the one
    seen is called inferior with 80% power among so many `tests`,
    n · ((z₁₋.₀₂₅/ₜₑₛₜₛ + z.₈) · error / (worse - margin))² - n.
    """
    room = margin - estimate.value
    if room == 0:
        return None
    if room > 0:
        needed = (estimate.high - estimate.value) / room
    else:
        quantiles = -special.ndtri(ALPHA / tests) + special.ndtri(POWER)
        needed = quantiles * estimate.error / -room
    more = math.ceil(documents * (needed**2 - 1))
    return max(more, 1) if more <= MOST_DOCUMENTS else None


def model_verdict(verdicts: Sequence[Verdict], every_task: bool) -> Verdict:
    """The model's verdict from those that count.

    Inferior if any is inferior, not comparable if any is. Non-inferior if perplexity (the suite's
    and the user's own text's) and the average of the tasks are, and every task where that is asked;
    what has no margin is not asked. Otherwise inconclusive.
    """
    counted = [verdict for verdict in verdicts if verdict["counts"]]
    required = [v for v in counted if every_task or not v["name"].startswith("task:")]
    model = Verdict(
        name="model",
        verdict="inconclusive",
        rule="non-inferior in " + (", ".join(v["name"] for v in required) or "nothing"),
        counts=bool(counted),
    )
    names: tuple[VerdictName, ...] = ("inferior", "not comparable", "inconclusive")
    for name in names:
        among = required if name == "inconclusive" else counted
        found = [verdict["name"] for verdict in among if verdict["verdict"] == name]
        if found:
            model["verdict"], model["reason"] = name, f"{name}: {', '.join(found)}"
            return model
    if required:
        model["verdict"] = "non-inferior"
    else:
        model["reason"] = "nothing was measured that has a margin"
    return model
