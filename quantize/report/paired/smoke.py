"""Greedy answers of both sides to the smoke prompts."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from quantize.records import Smoke, SmokeDelta


def smoke_deltas(before: Sequence[Smoke], after: Sequence[Smoke]) -> list[SmokeDelta]:
    """Answers of both sides to the same prompts, in the baseline's order."""
    candidates = {smoke["name"]: smoke for smoke in after}
    return [
        _delta(smoke, candidates[smoke["name"]]) for smoke in before if smoke["name"] in candidates
    ]


def _delta(before: Smoke, after: Smoke) -> SmokeDelta:
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


def failed_checks(after: Sequence[Smoke], deltas: Sequence[SmokeDelta]) -> list[str]:
    """Checks on the candidate's answers alone, then those against the baseline's answers."""
    failed = [
        f"{smoke['name']}: {check['name']}"
        for smoke in after
        for check in smoke["checks"]
        if not check["passed"]
    ]
    differing = [delta["name"] for delta in deltas if not delta.get("matches_baseline", True)]
    return failed + [f"{name}: similar to the baseline's answer" for name in differing]
