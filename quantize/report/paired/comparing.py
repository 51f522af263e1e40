"""The comparison of measurements: every difference, verdict and gate, in one record.

What differs in its questions on the two sides (token ids, documents, prompts) gets the verdict "not
comparable" with its reason, and everything else is still compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quantize.errors import SourceError
from quantize.records import (
    COMPARE_SCHEMA,
    CompareRecord,
    Details,
    Missing,
    TaskDelta,
)
from quantize.report.paired.aggregate import aggregate, average
from quantize.report.paired.alarms import alarms
from quantize.report.paired.companions import add_health, add_lint, add_noise, add_retention
from quantize.report.paired.deltas import perplexity_delta, task_delta
from quantize.report.paired.divergence import divergence, position_divergence, same_text
from quantize.report.paired.gates import gates
from quantize.report.paired.intervals import MIN_UNITS, Student
from quantize.report.paired.pairing import pair
from quantize.report.paired.positions import flips, histogram, series
from quantize.report.paired.sides import TEXTS, Side, TextName
from quantize.report.paired.smoke import failed_checks, smoke_deltas
from quantize.report.paired.verdicts import Question, Rules, judge, model_verdict
from quantize.store import Artifact


def compare(
    baseline: Artifact,
    candidate: Artifact,
    rules: Rules,
    *,
    repeat: Artifact | None = None,
    base: Artifact | None = None,
    calibrate: Artifact | None = None,
) -> tuple[CompareRecord, Details]:
    """The comparison of two measure artifacts, and what the report shows beside it.

    `repeat` is the baseline measured a second time, `base` the measurement of the model that was
    fine-tuned, `calibrate` the calibration data. Raises SourceError for a measurement that cannot
    be read, or whose log-probabilities are not finite numbers.
    """
    before, after = Side(baseline), Side(candidate)
    found = _Comparison(before, after, rules, _empty(before, after))
    for text in TEXTS:
        found.add_text(text)
    for name in {**before.tasks, **after.tasks}:
        found.add_task(name)
    found.add_average()
    record = found.record
    if repeat is not None:
        add_noise(record, before, Side(repeat))
    if base is not None:
        add_retention(record, Side(base), before, after)
    add_health(record, before, after)
    if calibrate is not None:
        add_lint(record, calibrate, before)
    verdicts = judge(found.questions)
    record["verdicts"] = [*verdicts, model_verdict(verdicts, rules.gate.every_task)]
    record["gates"] = gates(record["verdicts"], rules.gate, record["smoke"])
    record["alarms"] = alarms(record)
    record["not_measured"] += _without_verdict(rules, found)
    return record, found.details


def _empty(before: Side, after: Side) -> CompareRecord:
    smoke = smoke_deltas(before.record["smoke"], after.record["smoke"])
    subjects = before.record["subject"], after.record["subject"]
    return CompareRecord(
        schema=COMPARE_SCHEMA,
        baseline=subjects[0],
        candidate=subjects[1],
        size_ratio=subjects[1]["bytes"] / subjects[0]["bytes"],
        tasks=[],
        retention=[],
        health=[],
        verdicts=[],
        gates=[],
        alarms=[],
        quick=before.record["quick"] or after.record["quick"],
        smoke=smoke,
        smoke_failed=failed_checks(after.record["smoke"], smoke),
        not_measured=_carried_over(before, after),
    )


@dataclass
class _Comparison:
    """The record as it grows, and the questions that its verdicts answer."""

    before: Side
    after: Side
    rules: Rules
    record: CompareRecord
    details: Details = field(
        default_factory=lambda: Details(series={}, delta_log_p={}, flips={}),
    )
    questions: list[Question] = field(default_factory=list)
    tasks: list[tuple[TaskDelta, Student]] = field(default_factory=list)

    def add_text(self, name: TextName) -> None:
        """Perplexity and KL divergence of one text, where both sides have it."""
        before, after = self.before.text(name), self.after.text(name)
        if before is None or after is None:
            self._miss_one_side(name, before is not None, after is not None)
            return
        if before["scored_tokens"] < MIN_UNITS:
            self._miss(name, f"{before['scored_tokens']} scored tokens are too few for an interval")
            return
        ratio = self.rules.perplexity_ratio
        rule = f"ratio {ratio:g}" if ratio is not None else ""
        sides = self.before.logprobs(name), self.after.logprobs(name)
        try:
            same_text(before, after)
            delta, worse = perplexity_delta(*sides)
        except SourceError as error:
            self._miss(name, error.message)
            if ratio is not None:
                self.questions.append(Question(name, rule, True, reason=error.message))
            return
        nats = position_divergence(*sides)
        if name == "perplexity":
            self.record["perplexity"], self.record["divergence"] = delta, divergence(*sides, nats)
        else:
            self.record["own_perplexity"] = delta
            self.record["own_divergence"] = divergence(*sides, nats)
        self.details["series"][name] = series(*sides, nats)
        self.details["delta_log_p"][name] = histogram(*sides)
        if ratio is not None:
            documents, margin = delta["documents"], round(ratio - 1, 12)
            self.questions.append(Question(name, rule, True, worse, margin, documents))

    def add_task(self, name: str) -> None:
        """The difference of one task that both sides answered."""
        task = self.before.tasks.get(name)
        if task is None or name not in self.after.tasks:
            self._miss_one_side(f"task {name}", task is not None, name in self.after.tasks)
            return
        given, counts = self.rules.task_rule(name), self.rules.counts(name)
        rule = f"{given[0]} {given[1]:g}" if given is not None else ""
        try:
            samples = {"baseline": self.before.samples(name), "candidate": self.after.samples(name)}
            paired = pair(name, **samples)
        except SourceError as error:
            self._miss(f"task {name}", error.message)
            if given is not None:
                self.questions.append(Question(f"task:{name}", rule, counts, reason=error.message))
            return
        delta, worse = task_delta(task, paired)
        self.record["tasks"].append(delta)
        self.details["flips"][name] = flips(paired, higher_is_better=task["higher_is_better"])
        if counts:
            self.tasks.append((delta, worse))
        margin = self.rules.task_margin(delta)
        if margin is not None:
            if rule.startswith("recovery"):
                rule += f" of {delta['baseline']:.4g}"
            documents = delta["documents"]
            self.questions.append(Question(f"task:{name}", rule, counts, worse, margin, documents))
        elif given is not None:
            why = f"the baseline scores {delta['baseline']:g}: there is nothing to recover"
            self.record["not_measured"].append(Missing(what=f"verdict on task {name}", why=why))

    def add_average(self) -> None:
        """All tasks that count, together; the verdict is on those that have a margin."""
        if not self.tasks:
            return
        self.record["aggregate"] = aggregate(*map(list, zip(*self.tasks, strict=True)))
        judged = [
            (worse, margin, delta["documents"])
            for delta, worse in self.tasks
            if (margin := self.rules.task_margin(delta)) is not None
        ]
        if judged:
            estimates, margins, documents = zip(*judged, strict=True)
            count = len(judged)
            rule = f"mean of the margins of {count} task{'' if count == 1 else 's'}"
            mean = average(estimates)
            question = Question("tasks", rule, True, mean, sum(margins) / count, sum(documents))
            self.questions.append(question)

    def _miss(self, what: str, why: str) -> None:
        self.record["not_measured"].append(Missing(what=f"change of {what}", why=why))

    def _miss_one_side(self, what: str, in_before: bool, in_after: bool) -> None:
        """Note what one side has alone; what neither has was not asked for."""
        if in_before != in_after:
            self._miss(what, f"measured for the {'baseline' if in_before else 'candidate'} only")


def _carried_over(before: Side, after: Side) -> list[Missing]:
    """What the two measurements miss; an entry names its side unless both say the same."""
    found: list[Missing] = []
    sides = [("baseline", before, after), ("candidate", after, before)]
    for name, mine, other in sides:
        for missing in mine.record["not_measured"]:
            if missing not in other.record["not_measured"]:
                found.append(Missing(what=f"{missing['what']} ({name})", why=missing["why"]))
            elif missing not in found:
                found.append(missing)
    return found


def _without_verdict(rules: Rules, found: _Comparison) -> list[Missing]:
    """Margins that the recipe itself gives and nothing was measured for: the card says so."""
    asked = {question.name for question in found.questions}
    missing, margins = [], rules.margins
    if isinstance(margins.perplexity_ratio, float) and "perplexity" not in asked:
        why = "the change of perplexity was not measured"
        missing.append(Missing(what="margin perplexity_ratio", why=why))
    given = {"recovery": margins.recovery, "task_drop": margins.task_drop}
    for name, value in given.items():
        if isinstance(value, float) and not any(q.startswith("task:") for q in asked):
            missing.append(Missing(what=f"margin {name}", why="no change of a task was measured"))
    for name in margins.tasks:
        if rules.task_rule(name) is not None and f"task:{name}" not in asked:
            why = "the change of this task was not measured"
            missing.append(Missing(what=f"margin of task {name}", why=why))
    return missing
