"""What the report draws, as data: pure functions of records; drawn by `svg` and by `plots`.

Every picture reads the same way: to the left is worse, to the right is better, zero is the
baseline. A value that was not measured has no mark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.records import CompareRecord, Details, Histogram, Series, TaskDelta, Verdict
from quantize.report.results import LABELS, SERVING, Record

CLIP = 3.0
"""Margins that the picture of the verdicts shows to each side; longer intervals get an arrow."""


@dataclass(frozen=True)
class Mark:
    """One interval: a row of a forest. Positive is better."""

    label: str
    value: float
    low: float | None = None  # 95%
    high: float | None = None
    margin: float | None = None  # the value at which the loss is as large as allowed
    state: str = ""  # a verdict, for its colour
    average: bool = False  # over the other rows: drawn as a diamond
    detectable: float | None = None  # smallest true loss found with 80% power


@dataclass(frozen=True)
class Forest:
    """Intervals on one axis."""

    name: str  # of the file
    title: str
    axis: str
    marks: tuple[Mark, ...]
    low: float  # ends of the axis
    high: float
    stops: tuple[tuple[float, str], ...] = ()  # of the axis; round numbers if there are none


@dataclass(frozen=True)
class Line:
    """One side's values by bin."""

    label: str
    role: str  # baseline or candidate
    values: tuple[float, ...]


@dataclass(frozen=True)
class Lines:
    """Means over positions in the window; a step a bin, all bins equally wide."""

    name: str
    title: str
    axis: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    lines: tuple[Line, ...]
    from_zero: bool = False
    logarithmic: bool = False
    reference: float | None = None  # a line across


@dataclass(frozen=True)
class Bars:
    """Counts on a logarithmic axis: one more than edges, the first and the last bin are open."""

    name: str
    title: str
    axis: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One figure of both servers."""

    label: str
    baseline: float
    candidate: float
    form: str
    higher_is_better: bool


@dataclass(frozen=True)
class Pairs:
    """What both servers showed, each row on its own scale."""

    name: str
    title: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Point:
    """One model of a Pareto picture."""

    label: str
    x: float
    y: float
    low: float | None
    high: float | None
    state: str
    best: bool  # no other model is at least as good on both axes


@dataclass(frozen=True)
class Scatter:
    """Quality (up is better) against size or throughput."""

    name: str
    title: str
    x_axis: str
    y_axis: str
    points: tuple[Point, ...]
    smaller_is_better: bool  # of x


Figure = Forest | Lines | Bars | Pairs | Scatter


def in_points(task: TaskDelta) -> bool:
    """Whether a score is a share, shown in percent and its differences in points."""
    return task["higher_is_better"] and 0 <= task["baseline"] <= 1 and 0 <= task["candidate"] <= 1


def verdicts_forest(compare: CompareRecord) -> Forest | None:
    """Every verdict with an interval and a margin, in shares of its own margin."""
    marks = []
    for verdict in compare["verdicts"]:
        if verdict["name"] == "model" or not {"worse", "low", "high", "margin"} <= verdict.keys():
            continue
        margin = verdict["margin"]
        if margin <= 0:
            continue
        marks.append(
            Mark(
                verdict_label(verdict),
                -verdict["worse"] / margin,
                -verdict["high"] / margin,  # turned round: the end on the worse side
                -verdict["low"] / margin,
                margin=-1.0,
                state=verdict["verdict"],
                average=verdict["name"] == "tasks",
            )
        )
    if not marks:
        return None
    low, high = axis_ends(marks, [-1.35, 0.4])
    return Forest(
        name="verdicts",
        title="Losses against their margins",
        axis="share of the margin",
        marks=tuple(marks),
        low=max(-CLIP, low),
        high=min(CLIP, high),
        stops=((-1.0, "margin"), (0.0, "as BF16")),
    )


def verdict_label(verdict: Verdict) -> str:
    """What the verdict is about."""
    return LABELS.get(verdict["name"], verdict["name"].removeprefix("task:"))


def task_forests(compare: CompareRecord) -> list[Forest]:
    """Differences with margins: one picture of all scores that are shares, one for each other."""
    margins = {v["name"]: v for v in compare["verdicts"]}
    shares = [task for task in compare["tasks"] if in_points(task)]
    found = []
    if shares:
        marks = [_task_mark(task, margins.get(f"task:{task['name']}"), 100) for task in shares]
        if "aggregate" in compare and len(shares) == len(compare["tasks"]):
            marks.append(_average_mark(compare, margins.get("tasks")))
        found.append(_task_forest("tasks", "Scores against BF16", "percentage points", marks))
    for task in compare["tasks"]:
        if not in_points(task):
            mark = _task_mark(task, margins.get(f"task:{task['name']}"), 1)
            title = f"{task['name']} against BF16"
            found.append(_task_forest(f"task-{len(found)}", title, task["metric"], [mark]))
    return found


def _task_forest(name: str, title: str, axis: str, marks: Sequence[Mark]) -> Forest:
    low, high = axis_ends(marks, [0.0])
    return Forest(name, title, axis, tuple(marks), low, high)


def _task_mark(task: TaskDelta, verdict: Verdict | None, scale: float) -> Mark:
    """In the direction of better; a task where lower is better is turned round."""
    sign = scale if task["higher_is_better"] else -scale
    low, high = sorted((sign * task["difference_low"], sign * task["difference_high"]))
    turned = "" if task["higher_is_better"] else " (lower is better: turned round)"
    return Mark(
        task["name"] + turned,
        sign * task["difference"],
        low,
        high,
        margin=-scale * verdict["margin"] if verdict and "margin" in verdict else None,
        state=verdict["verdict"] if verdict else "",
        detectable=scale * task["detectable"],
    )


def _average_mark(compare: CompareRecord, verdict: Verdict | None) -> Mark:
    together = compare["aggregate"]
    return Mark(
        LABELS["tasks"],
        -100 * together["worse"],
        -100 * together["high"],
        -100 * together["low"],
        margin=-100 * verdict["margin"] if verdict and "margin" in verdict else None,
        state=verdict["verdict"] if verdict else "",
        average=True,
    )


def retention_forest(compare: CompareRecord) -> Forest | None:
    """What is left of each gain: 0 is all of it, -1 is none."""
    marks = tuple(
        Mark(
            row["name"],
            row["retained"] - 1,
            row["retained_low"] - 1 if "retained_low" in row else None,
            row["retained_high"] - 1 if "retained_high" in row else None,
        )
        for row in compare["retention"]
        if "retained" in row
    )
    if not marks:
        return None
    low, high = axis_ends(marks, [-1.0, 0.0])
    return Forest(
        "retention",
        "What is left of the fine-tune’s gain",
        "share of the gain",
        marks,
        max(-CLIP, low),
        min(CLIP, high),
        stops=((-1.0, "none"), (-0.5, "half"), (0.0, "all")),
    )


def axis_ends(marks: Sequence[Mark], also: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds every mark with some room."""
    values = [*also]
    for mark in marks:
        found = (mark.value, mark.low, mark.high, mark.margin)
        values += [value for value in found if value is not None]
        values += [] if mark.detectable is None else [-mark.detectable]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


TEXTS = {"perplexity": "held-out text", "own_perplexity": "own text"}


def text_lines(text: str, series: Series) -> list[Lines]:
    """Perplexity of both sides, their ratio and KL divergence, by position in the window."""
    before, after = series["baseline_nats"], series["candidate_nats"]
    starts, ends = tuple(series["starts"]), tuple(series["ends"])
    ratios = tuple(math.exp(c - b) for b, c in zip(before, after, strict=True))
    both = (
        Line("BF16", "baseline", tuple(map(math.exp, before))),
        Line("this model", "candidate", tuple(map(math.exp, after))),
    )
    change = (Line("this model", "candidate", ratios),)
    kl = (Line("this model", "candidate", tuple(series["kl"])),)
    where = TEXTS[text]
    name = f"{text}-by-position"
    return [
        Lines(
            name,
            f"Perplexity, {where}",
            "perplexity, logarithmic axis",
            starts,
            ends,
            both,
            logarithmic=True,
        ),
        Lines(
            f"{text}-ratio-by-position",
            f"Perplexity ratio, {where}",
            "this model / BF16",
            starts,
            ends,
            change,
            reference=1.0,
        ),
        Lines(
            f"{text}-kl-by-position",
            f"KL divergence, {where}",
            "nats",
            starts,
            ends,
            kl,
            from_zero=True,
        ),
    ]


def text_bars(text: str, histogram: Histogram) -> Bars:
    """Δ log p of the text's own tokens."""
    return Bars(
        f"{text}-delta-log-p",
        f"Change of log p per token, {TEXTS[text]}",
        "nats, this model - BF16",
        tuple(histogram["edges"]),
        tuple(histogram["counts"]),
    )


HIGHER_IS_BETTER = {"output_tokens_per_second", "requests_per_second", "kv_cache_tokens"}


def serving_pairs(record: Record) -> Pairs | None:
    """Latency and throughput that both servers reported."""
    sides = [record.get(side, {}).get("serving", {}) for side in ("baseline", "candidate")]
    pairs = [
        Pair(label, sides[0][field], sides[1][field], form, field in HIGHER_IS_BETTER)
        for label, field, form in SERVING
        if all(field in side for side in sides)
    ]
    return Pairs("serving", "Latency and throughput", tuple(pairs)) if pairs else None


def record_figures(record: Record, details: Details | None) -> list[Figure]:
    """All pictures of one record."""
    found: list[Figure] = []
    if "compare" in record:
        verdicts = verdicts_forest(record["compare"])
        found += [verdicts] if verdicts else []
        found += task_forests(record["compare"])
        retention = retention_forest(record["compare"])
        found += [retention] if retention else []
    for text in TEXTS:
        if details is not None and text in details["series"]:
            found += text_lines(text, details["series"][text])
        if details is not None and text in details["delta_log_p"]:
            found.append(text_bars(text, details["delta_log_p"][text]))
    serving = serving_pairs(record)
    return [*found, serving] if serving else found


def pareto(values: Sequence[tuple[float, float]], smaller_is_better: bool) -> list[bool]:
    """For each (x, quality): whether no other is at least as good on both and better on one."""
    turned = [(-x if smaller_is_better else x, y) for x, y in values]
    return [not any(o[0] >= p[0] and o[1] >= p[1] and o != p for o in turned) for p in turned]
