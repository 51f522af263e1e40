"""compare: what quantization cost, from the two `measure` artifacts; the recipe's gates.

A gate that fails is recorded, not raised: the card is still written, and the executor ends the run
with exit code 7 when :func:`failed_gates` names any. The arithmetic needs scipy, which a plan must
not pay for: it is imported where it is used.
"""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from quantize.protocol import write_json
from quantize.recipe import Margins
from quantize.records import (
    COMPARE_SCHEMA,
    CompareRecord,
    Gate,
    MeasureRecord,
    Missing,
    Smoke,
    SmokeDelta,
    TaskDelta,
)

if TYPE_CHECKING:
    from quantize.stages.base import Resolved, StageContext
    from quantize.store import Artifact

VERSION = 1


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: this stage only calculates."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The recipe's margins; everything else comes with the inputs."""
    return {"margins": _margins(resolved).model_dump(mode="json")}


def run(context: StageContext) -> None:
    """Write `record.json` (:class:`quantize.records.CompareRecord`)."""
    record = compare(
        context.inputs["baseline"], context.inputs["candidate"], _margins(context.resolved)
    )
    write_json(context.files / "record.json", record)


def _margins(resolved: Resolved) -> Margins:
    evaluate = resolved.recipe.evaluate
    return evaluate.margins if evaluate else Margins()


def failed_gates(record: CompareRecord) -> list[str]:
    """One sentence for each gate that the candidate fails."""
    return [
        f"{gate['name']} is {gate['value']:.6g}, the limit is {gate['limit']:.6g}"
        for gate in record["gates"]
        if not gate["passed"]
    ]


def compare(baseline: Artifact, candidate: Artifact, margins: Margins) -> CompareRecord:
    """The comparison of two measure artifacts."""
    from quantize.report.deltas import gates

    before: MeasureRecord = baseline.json("record.json")
    after: MeasureRecord = candidate.json("record.json")
    smoke = _smoke(before["smoke"], after["smoke"])
    record = CompareRecord(
        schema=COMPARE_SCHEMA,
        baseline=before["subject"],
        candidate=after["subject"],
        size_ratio=after["subject"]["bytes"] / before["subject"]["bytes"],
        tasks=[],
        gates=[],
        smoke=smoke,
        smoke_failed=_smoke_failed(after["smoke"], smoke),
        not_measured=_carried_over(before, after),
    )
    _add_perplexity(record, baseline, candidate, before, after)
    _add_tasks(record, baseline, candidate, before, after)
    record["gates"] = [*gates(margins, record), *_answered(record["smoke"])]
    record["not_measured"] += _without_gate(margins, record)
    return record


def _add_perplexity(
    record: CompareRecord,
    baseline: Artifact,
    candidate: Artifact,
    before: MeasureRecord,
    after: MeasureRecord,
) -> None:
    """Perplexity and KL divergence, where both sides have them."""
    from quantize.report.deltas import MIN_UNITS, perplexity_delta
    from quantize.report.divergence import TokenLogprobs, divergence, same_text

    if "perplexity" not in before or "perplexity" not in after:
        _miss_one_side(record, "perplexity", "perplexity" in before, "perplexity" in after)
        return
    same_text(before["perplexity"], after["perplexity"])
    tokens = before["perplexity"]["scored_tokens"]
    if tokens < MIN_UNITS:
        why = f"{tokens} scored tokens are too few for an interval"
        record["not_measured"].append(Missing(what="change of perplexity", why=why))
        return
    sides = [TokenLogprobs.load(side.file("token_logprobs.npz")) for side in (baseline, candidate)]
    record["perplexity"] = perplexity_delta(*sides)
    record["divergence"] = divergence(*sides)


def _add_tasks(
    record: CompareRecord,
    baseline: Artifact,
    candidate: Artifact,
    before: MeasureRecord,
    after: MeasureRecord,
) -> None:
    """Every task that both sides answered."""
    from quantize.report.deltas import task_delta

    tasks_before = {task["name"]: task for task in before["tasks"]}
    tasks_after = {task["name"]: task for task in after["tasks"]}
    for name in {**tasks_before, **tasks_after}:
        if name not in tasks_before or name not in tasks_after:
            _miss_one_side(record, f"task {name}", name in tasks_before, name in tasks_after)
        elif tasks_before[name]["documents"] < 2:
            why = "one document has no interval"
            record["not_measured"].append(Missing(what=f"change of task {name}", why=why))
        else:
            samples = [_samples(side, name) for side in (baseline, candidate)]
            delta: TaskDelta = task_delta(tasks_before[name], *samples)
            record["tasks"].append(delta)


def _samples(side: Artifact, task: str) -> list[dict[str, Any]]:
    text = side.file(f"samples/{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _miss_one_side(record: CompareRecord, what: str, in_before: bool, in_after: bool) -> None:
    """Note a measurement that one side has alone; one that neither has was not asked for."""
    if in_before != in_after:
        side = "baseline" if in_before else "candidate"
        why = f"measured for the {side} only"
        record["not_measured"].append(Missing(what=f"change of {what}", why=why))


def _carried_over(before: MeasureRecord, after: MeasureRecord) -> list[Missing]:
    """What the two measurements miss; an entry names its side unless both say the same."""
    found: list[Missing] = []
    for side, mine, other in (("baseline", before, after), ("candidate", after, before)):
        for missing in mine["not_measured"]:
            if missing not in other["not_measured"]:
                found.append(Missing(what=f"{missing['what']} ({side})", why=missing["why"]))
            elif missing not in found:
                found.append(missing)
    return found


def _smoke(before: list[Smoke], after: list[Smoke]) -> list[SmokeDelta]:
    """Answers of both sides to the same prompts, in the baseline's order."""
    candidates = {smoke["name"]: smoke for smoke in after}
    return [
        _smoke_delta(smoke, candidates[smoke["name"]])
        for smoke in before
        if smoke["name"] in candidates
    ]


def _smoke_delta(before: Smoke, after: Smoke) -> SmokeDelta:
    first, second = before["answer"], after["answer"]
    matcher = SequenceMatcher(None, first.split(), second.split(), autojunk=False)
    delta = SmokeDelta(
        name=before["name"],
        similarity=matcher.ratio(),
        identical=first == second,
        answered=bool(second.strip()) or not first.strip(),
    )
    if "min_baseline_similarity" in before:
        delta["matches_baseline"] = delta["similarity"] >= before["min_baseline_similarity"]
    return delta


def _smoke_failed(after: list[Smoke], deltas: list[SmokeDelta]) -> list[str]:
    """Checks on the candidate's answers alone, then those against the baseline's answers."""
    failed = [
        f"{smoke['name']}: {check['name']}"
        for smoke in after
        for check in smoke["checks"]
        if not check["passed"]
    ]
    differing = [delta["name"] for delta in deltas if not delta.get("matches_baseline", True)]
    return failed + [f"{name}: similar to the baseline's answer" for name in differing]


def _answered(smoke: list[SmokeDelta]) -> list[Gate]:
    """A gate that is always there: no prompt that the baseline answers stays without answer."""
    if not smoke:
        return []
    silent = sum(not answer["answered"] for answer in smoke)
    return [Gate(name="smoke_unanswered", limit=0, value=silent, passed=silent == 0)]


def _without_gate(margins: Margins, record: CompareRecord) -> list[Missing]:
    """Margins of the recipe that nothing was measured for: the run passes, the card says so."""
    found = []
    if margins.perplexity_ratio is not None and "perplexity" not in record:
        why = "the change of perplexity was not measured"
        found.append(Missing(what="margin perplexity_ratio", why=why))
    if margins.task_drop is not None and not record["tasks"]:
        found.append(Missing(what="margin task_drop", why="no change of a task was measured"))
    return found
