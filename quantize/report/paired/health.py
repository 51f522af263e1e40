"""Generation health of both sides, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from quantize.records import Answered, HealthDelta

ALARM_P = 0.05

Fault = Callable[[Answered], bool]


def health_deltas(
    baseline: Sequence[Answered], candidate: Sequence[Answered], ended_early: Fault
) -> list[HealthDelta]:
    """Each rate on both sides over the prompts that both answered, with an exact McNemar test.

    A rate is the share of prompts with that fault (`schema_valid`: without it, among the prompts
    that have a schema); `ended_early` is the measuring side's own rule. `mcnemar_p` is two-sided;
    no correction is made for the number of rates, because this only raises an alarm.
    """
    answers = {answer["name"]: answer for answer in candidate}
    pairs = [(first, answers[first["name"]]) for first in baseline if first["name"] in answers]

    faults: dict[str, Fault] = {
        "repeating": lambda answer: bool(answer["repeats"]),
        "ended_early": ended_early,
        "cut_off": lambda answer: answer["finish_reason"] == "length",
        "invalid_utf8": lambda answer: answer["replacement_characters"] > 0,
    }
    found = [_delta(name, fault, pairs) for name, fault in faults.items() if pairs]
    written = [pair for pair in pairs if all("echoed" in side for side in pair)]
    if written:
        found.append(_delta("template_echo", lambda answer: bool(answer["echoed"]), written))
    with_schema = [pair for pair in pairs if all("schema_error" in side for side in pair)]
    if with_schema:
        found.append(_delta("schema_valid", _breaks_schema, with_schema))
    return found


def _breaks_schema(answer: Answered) -> bool:
    return bool(answer["schema_error"])


def _delta(name: str, fault: Fault, pairs: Sequence[tuple[Answered, Answered]]) -> HealthDelta:
    sides = np.array([[fault(answer) for answer in pair] for pair in pairs])  # (prompts, 2)
    worse = int((~sides[:, 0] & sides[:, 1]).sum())
    better = int((sides[:, 0] & ~sides[:, 1]).sum())
    p = float(stats.binomtest(worse, worse + better).pvalue) if worse + better else 1.0
    rates = sides.mean(axis=0)
    before, after = 1 - rates if name == "schema_valid" else rates
    return HealthDelta(
        name=name,
        baseline=float(before),
        candidate=float(after),
        got_worse=worse,
        got_better=better,
        mcnemar_p=p,
        alarm=worse > better and p < ALARM_P,
    )
