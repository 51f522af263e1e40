"""The report as one HTML page that needs nothing else: no network, no script, no font.

A function of card records (:mod:`quantize.stages.card`) and of what lies beside them. Autoescape is
on: everything from a checkpoint, a data set or a model's answer is text. The page's own policy
forbids scripts and every request besides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2
import yaml

from quantize.records import CompareRecord, Details, Flip, Verdict
from quantize.report.markdown import clip
from quantize.report.page import figures, models, svg, svg_parts
from quantize.report.page.formats import FILTERS
from quantize.report.page.subject import Subject
from quantize.report.redact import redact
from quantize.report.results import LABELS, Record, method_text, model_verdict, smoke_counts
from quantize.report.templating import templates

GENERATOR = "quantize report"
"""The page says in its head what made it, so that no other file is overwritten."""

MEANS = {
    "non-inferior": "Everything that decides lost less than the recipe allows: each of these 95% "
    "intervals ends inside its margin.",
    "inferior": "At least one loss is larger than the recipe allows, and too large to be chance.",
    "inconclusive": "An interval reaches across its margin: this much data can neither rule out a "
    "loss larger than allowed nor show one.",
    "not comparable": "The two models were not asked the same questions, so nothing can be said "
    "about the difference.",
}

BRIEF = 32
"""Characters of an answer in a line of the list."""

_CHOICE = re.compile(r"([> ]) -?(?:\d+\.\d+|inf) (.*)")
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class FlipRow:
    """One document whose score changed, ready to be read."""

    doc: str
    lost: bool
    prompt: str
    target: str
    baseline: str
    candidate: str
    brief: tuple[str, str]  # both answers in a few words
    baseline_score: float
    candidate_score: float


@dataclass(frozen=True)
class FlipTask:
    """The flips of one task, worse ones first."""

    name: str
    rows: tuple[FlipRow, ...]
    lost: int  # of all documents, shown or not
    gained: int


@dataclass(frozen=True)
class TextPart:
    """What is known of one held-out text."""

    name: str
    title: str
    protocol: Mapping[str, Any]
    delta: Mapping[str, Any] | None
    divergence: Mapping[str, Any] | None
    pictures: Sequence[figures.Figure] = field(default_factory=tuple)


def render_report(subjects: Sequence[Subject]) -> str:
    """The page: one model's report, or the comparison of several."""
    if len(subjects) == 1:
        template, values = "report.html.j2", _single(subjects[0])
    else:
        template, values = "comparison.html.j2", models.values(subjects)
    page = environment().get_template(template).render(generator=GENERATOR, **values)
    return _UNSEEN.sub("\ufffd", page)


def environment() -> jinja2.Environment:
    """The page's templates; every string is escaped, and a name that is not there is an error."""
    found = templates(autoescape=True)
    found.filters |= {
        **FILTERS,
        "draw": svg.draw,
        "bars": svg.pair_bars,
        "state": svg_parts.state_class,
    }
    return found


def _single(subject: Subject) -> dict[str, Any]:
    record = redact(subject.record)
    compare: CompareRecord | None = record.get("compare")
    details = subject.details
    return {
        "title": f"{record['recipe']['name']}: quantization report",
        "record": record,
        "compare": compare,
        "method": method_text(record),
        "verdict": model_verdict(compare) if compare else None,
        "means": MEANS,
        "labels": LABELS,
        "verdict_figure": figures.verdicts_forest(compare) if compare else None,
        "task_figures": figures.task_forests(compare) if compare else [],
        "in_points": figures.in_points,
        "verdict_unit": verdict_unit,
        "share_tasks": _share_tasks(compare) if compare else set(),
        "retention_figure": figures.retention_forest(compare) if compare else None,
        "serving": figures.serving_pairs(record),
        "texts": _texts(record, details) if compare else [],
        "details": details,
        "no_details": subject.no_details,
        "flips": _flips(compare, details) if compare and details else [],
        "smoke": _smoke(record) if compare else [],
        "smoke_counts": smoke_counts,
        "recipe_yaml": yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True),
        "place": subject.place,
    }


def verdict_unit(compare: CompareRecord, verdict: Verdict) -> str:
    """How its figures are read: percent of perplexity, points of a share, or the metric's own."""
    name = verdict["name"]
    if name.endswith("perplexity"):
        return "percent"
    tasks = [task for task in compare["tasks"] if name in ("tasks", f"task:{task['name']}")]
    return "points" if tasks and all(map(figures.in_points, tasks)) else "own"


def _share_tasks(compare: CompareRecord) -> set[str]:
    """Tasks whose scores are shares, the base's included."""
    shares = {task["name"] for task in compare["tasks"] if figures.in_points(task)}
    return shares - {row["name"] for row in compare["retention"] if not 0 <= row["base"] <= 1}


def _texts(record: Record, details: Details | None) -> list[TextPart]:
    """The suite's text and the user's own, as far as they were measured."""
    compare = record["compare"]
    found = []
    for name, kl in (("perplexity", "divergence"), ("own_perplexity", "own_divergence")):
        if name not in compare and kl not in compare:
            continue
        pictures: list[figures.Figure] = []
        if details is not None and name in details["series"]:
            pictures += figures.text_lines(name, details["series"][name])
        if details is not None and name in details["delta_log_p"]:
            pictures.append(figures.text_bars(name, details["delta_log_p"][name]))
        found.append(
            TextPart(
                name=name,
                title="The suite’s text" if name == "perplexity" else "The user’s own text",
                protocol=record["baseline"][name],
                delta=compare.get(name),
                divergence=compare.get(kl),
                pictures=pictures,
            )
        )
    return found


def _flips(compare: CompareRecord, details: Details) -> list[FlipTask]:
    found = []
    for task in compare["tasks"]:
        sign = 1 if task["higher_is_better"] else -1
        rows = tuple(_flip(flip, sign) for flip in details["flips"].get(task["name"], []))
        found.append(FlipTask(task["name"], rows, task["lost"], task["gained"]))
    return found


def _flip(flip: Flip, sign: int) -> FlipRow:
    return FlipRow(
        doc=flip["doc"],
        lost=sign * (flip["candidate_score"] - flip["baseline_score"]) < 0,
        prompt=flip["prompt"],
        target=expected(flip["target"], flip["baseline"]),
        baseline=flip["baseline"],
        candidate=flip["candidate"],
        brief=(brief(flip["baseline"]), brief(flip["candidate"])),
        baseline_score=flip["baseline_score"],
        candidate_score=flip["candidate_score"],
    )


def brief(answer: str) -> str:
    """An answer in a few words, for a line of a list: the chosen one of several."""
    chosen = [choice.text for choice in choices(answer) if choice.chosen]
    words = " ".join((chosen[0] if chosen else answer).split())
    return f"“{clip(words, BRIEF)}”" if words else "nothing"


def expected(target: str, answer: str) -> str:
    """What was right; the number of a choice with its text, which the answer lists."""
    listed = choices(answer)
    if target.isdecimal() and len(target) < 4 and int(target) < len(listed):
        return f"{target}: {listed[int(target)].text}"
    return target


class Choice(NamedTuple):
    """One line of the answer to a multiple-choice question."""

    chosen: bool
    text: str


def choices(answer: str) -> list[Choice]:
    """The choices of a response that lists them with their log-probabilities, else none.

    A line each, as the measurement logs them: `> -1.594 onion pie`, with `>` at the chosen one.
    """
    found = [_CHOICE.fullmatch(line) for line in answer.split("\n")]
    listed = [Choice(match[1] == ">", match[2]) for match in found if match is not None]
    whole = len(listed) == len(found) > 1 and sum(choice.chosen for choice in listed) == 1
    return listed if whole else []


@dataclass(frozen=True)
class SmokeRow:
    """One smoke prompt, both answers."""

    name: str
    prompt: str
    baseline: str
    candidate: str
    failed: tuple[str, ...]  # checks that the candidate's answer fails
    similarity: float
    identical: bool
    answered: bool


def _smoke(record: Record) -> list[SmokeRow]:
    before = {smoke["name"]: smoke for smoke in record["baseline"]["smoke"]}
    after = {smoke["name"]: smoke for smoke in record["candidate"]["smoke"]}
    return [
        SmokeRow(
            name=delta["name"],
            prompt=before[delta["name"]]["prompt"],
            baseline=before[delta["name"]]["answer"],
            candidate=after[delta["name"]]["answer"],
            failed=tuple(c["name"] for c in after[delta["name"]]["checks"] if not c["passed"]),
            similarity=delta["similarity"],
            identical=delta["identical"],
            answered=delta["answered"],
        )
        for delta in record["compare"]["smoke"]
    ]
