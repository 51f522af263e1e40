"""Several models side by side: one row each, intervals on common axes, and Pareto pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.records import TaskDelta, Verdict
from quantize.report.page.figures import (
    Figure,
    Forest,
    Mark,
    Point,
    Scatter,
    axis_ends,
    in_points,
    pareto,
)
from quantize.report.page.subject import Subject
from quantize.report.redact import redact
from quantize.report.results import LABELS, Record, method_text, model_verdict


@dataclass(frozen=True)
class Model:
    """One row of the comparison."""

    label: str
    record: Record
    method: str
    verdict: Verdict | None

    @property
    def compare(self) -> dict[str, Any]:
        """The comparison with its baseline; empty where nothing was measured."""
        found: dict[str, Any] = self.record.get("compare", {})
        return found

    @property
    def state(self) -> str:
        """The model's verdict, for its colour."""
        return self.verdict["verdict"] if self.verdict else ""

    @property
    def serving(self) -> dict[str, Any]:
        """What the candidate's server showed under load, or nothing."""
        found: dict[str, Any] = self.record.get("candidate", {}).get("serving", {})
        return found

    @property
    def shares(self) -> bool:
        """Whether every task's score is a share, shown in percent."""
        return all(map(in_points, self.compare["tasks"]))

    def task(self, name: str) -> TaskDelta | None:
        """The delta of one task."""
        tasks: list[TaskDelta] = self.compare.get("tasks", [])
        return next((task for task in tasks if task["name"] == name), None)

    def retained(self, task: str) -> float | None:
        """The share that is left of what the fine-tune gained in one task, where that is known."""
        rows = self.compare.get("retention", [])
        return next((r["retained"] for r in rows if r["name"] == task and "retained" in r), None)

    def margin(self, name: str) -> float | None:
        """The margin of one verdict."""
        verdicts: list[Verdict] = self.compare.get("verdicts", [])
        return next((v["margin"] for v in verdicts if v["name"] == name and "margin" in v), None)

    def state_of(self, name: str) -> str:
        """The verdict of that name."""
        verdicts: list[Verdict] = self.compare.get("verdicts", [])
        return next((v["verdict"] for v in verdicts if v["name"] == name), "")


def models(subjects: Sequence[Subject]) -> list[Model]:
    """Rows in the order given."""
    found = []
    for subject in subjects:
        record = redact(subject.record)
        verdict = model_verdict(record["compare"]) if "compare" in record else None
        found.append(Model(subject.label, record, method_text(record), verdict))
    return found


def values(subjects: Sequence[Subject]) -> dict[str, Any]:
    """What the template of the comparison prints."""
    rows = models(subjects)
    return {
        "title": f"{len(rows)} models compared: quantization report",
        "models": rows,
        "tasks": task_names(rows),
        "in_points": in_points,
        "labels": LABELS,
        "remarks": remarks(rows),
        "pareto": pareto_figures(rows),
        "forests": forests(rows),
        "quantize": rows[0].record["quantize"],
    }


def task_names(rows: Sequence[Model]) -> list[str]:
    """Every task that any model was compared on."""
    names = [task["name"] for row in rows for task in row.compare.get("tasks", [])]
    return list(dict.fromkeys(names))


def remarks(rows: Sequence[Model]) -> list[str]:
    """Reasons not to read one row against another."""
    found = []
    measured = [row for row in rows if row.compare]
    for row in rows:
        if not row.compare:
            found.append(f"{row.label}: its quality was not measured.")
        elif row.compare["quick"]:
            found.append(f"{row.label}: a quick run, which measured a subset.")
    checks: list[tuple[str, Callable[[Model], Any]]] = [
        ("were not made from the same original", lambda row: row.compare["baseline"]["key"]),
        (
            "scored different held-out tokens, so their perplexities cannot be compared",
            lambda row: row.record["candidate"].get("perplexity", {}).get("tokens_sha256"),
        ),
        (
            "were served on different devices, so their speeds cannot be compared",
            lambda row: row.record["candidate"].get("server", {}).get("device"),
        ),
    ]
    for sentence, read in checks:
        if len({read(row) for row in measured} - {None}) > 1:
            found.append(f"These models {sentence}.")
    found += [
        f"These models were asked different prompts in {name}, so its scores cannot be compared."
        for name in task_names(measured)
        if len(_prompts(measured, name)) > 1
    ]
    return found


def _prompts(rows: Sequence[Model], task: str) -> set[str]:
    return {
        item["prompts_sha256"]
        for row in rows
        for item in row.record["candidate"]["tasks"]
        if item["name"] == task
    }


# --- pictures


def figures(subjects: Sequence[Subject]) -> list[Figure]:
    """All pictures of the comparison."""
    rows = models(subjects)
    return [*pareto_figures(rows), *forests(rows)]


Quality = tuple[float, float, float]
"""Value and 95% interval, positive is better."""


def _perplexity(model: Model) -> Quality | None:
    """Change of perplexity in percent, turned round."""
    delta = model.compare.get("perplexity")
    if delta is None:
        return None
    ends = [-100 * (delta[name] - 1) for name in ("ratio", "ratio_high", "ratio_low")]
    return ends[0], ends[1], ends[2]


def _tasks(model: Model) -> Quality | None:
    """Average change of the tasks' scores in percentage points; None if one is no share."""
    together = model.compare.get("aggregate")
    if together is None or not model.shares:
        return None
    return -100 * together["worse"], -100 * together["high"], -100 * together["low"]


def _megabytes(model: Model) -> float | None:
    size: int = model.record["size"]["candidate_bytes"]
    return size / 1e6


def _gigabytes(model: Model) -> float | None:
    size: int = model.record["size"]["candidate_bytes"]
    return size / 1e9


def _throughput(model: Model) -> float | None:
    return model.serving.get("output_tokens_per_second")


QUALITIES: tuple[tuple[str, str, Callable[[Model], Quality | None]], ...] = (
    ("tasks", "tasks, average change (percentage points)", _tasks),
    ("perplexity", "perplexity change (%), turned round: up is better", _perplexity),
)


def pareto_figures(rows: Sequence[Model]) -> list[Scatter]:
    """Quality against size and against throughput, as far as two models have both."""
    large = any(row.record["size"]["candidate_bytes"] >= 2e9 for row in rows)
    costs: tuple[tuple[str, str, Callable[[Model], float | None], bool], ...] = (
        (
            "size",
            f"weights ({'GB' if large else 'MB'}), left is better",
            _gigabytes if large else _megabytes,
            True,
        ),
        ("throughput", "output tokens/s under load, right is better", _throughput, False),
    )
    found = []
    for quality, y_axis, y_of in QUALITIES:
        for cost, x_axis, x_of, smaller in costs:
            points = _points(rows, x_of, y_of, smaller)
            if len(points) > 1:
                title = f"{'Scores' if quality == 'tasks' else 'Perplexity'} against {cost}"
                name = f"pareto-{cost}-{quality}"
                found.append(Scatter(name, title, x_axis, y_axis, points, smaller))
    return found


def _points(
    rows: Sequence[Model],
    x_of: Callable[[Model], float | None],
    y_of: Callable[[Model], Quality | None],
    smaller: bool,
) -> tuple[Point, ...]:
    known = [(row, x_of(row), y_of(row)) for row in rows]
    placed = [(row, x, y) for row, x, y in known if x is not None and y is not None]
    best = pareto([(x, y[0]) for _, x, y in placed], smaller)
    return tuple(
        Point(row.label, x, y[0], y[1], y[2], row.state, on_front)
        for (row, x, y), on_front in zip(placed, best, strict=True)
    )


def forests(rows: Sequence[Model]) -> list[Forest]:
    """Every model's interval, one picture for perplexity, the average and each task."""
    found = []
    together = [_mark(row, _perplexity(row), "perplexity", 100) for row in rows]
    found.append(_forest("perplexity", "Perplexity, turned round", "change in %", together))
    average = [_mark(row, _tasks(row), "tasks", 100) for row in rows]
    found.append(_forest("tasks", "Tasks, average", "percentage points", average))
    for index, name in enumerate(task_names(rows), 1):
        marks = [_task_mark(row, name) for row in rows]
        deltas = [task for row in rows if (task := row.task(name)) is not None]
        unit = "percentage points" if all(map(in_points, deltas)) else deltas[0]["metric"]
        found.append(_forest(f"task-{index}", name, unit, marks))
    return [forest for forest in found if forest is not None]


def _forest(name: str, title: str, axis: str, marks: Sequence[Mark | None]) -> Forest | None:
    known = [mark for mark in marks if mark is not None]
    if not known:
        return None
    low, high = axis_ends(known, [0.0])
    return Forest(f"compared-{name}", title, axis, tuple(known), low, high)


def _mark(row: Model, quality: Quality | None, verdict: str, scale: float) -> Mark | None:
    if quality is None:
        return None
    margin = row.margin(verdict)
    return Mark(
        row.label,
        *quality,
        margin=None if margin is None else -scale * margin,
        state=row.state_of(verdict),
    )


def _task_mark(row: Model, name: str) -> Mark | None:
    task = row.task(name)
    if task is None:
        return None
    scale = 100.0 if in_points(task) else 1.0
    sign = scale if task["higher_is_better"] else -scale
    low, high = sorted((sign * task["difference_low"], sign * task["difference_high"]))
    return _mark(row, (sign * task["difference"], low, high), f"task:{name}", scale)
