"""Key → hit, or run → commit; stage by stage, each complete or absent."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantize.errors import GateError, UsageError
from quantize.plan import Plan, StageEntry
from quantize.planner import STAGES, stale
from quantize.refusals import refusals
from quantize.room import room_needed
from quantize.runner import Runner
from quantize.stages.base import Resolved, StageContext
from quantize.store import Artifact, Store


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage: `hit` or `ran`, and its wall seconds in this run."""

    id: str
    key: str
    state: str
    reason: str
    seconds: float
    own_seconds: float  # of these, not spent in tools


@dataclass
class Outcome:
    """What a run has made so far; filled in as it goes, so that a failure leaves it readable."""

    stages: list[StageOutcome] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    @property
    def ran(self) -> list[str]:
        """Ids of the stages that did something."""
        return [stage.id for stage in self.stages if stage.state == "ran"]


def select(plan: Plan, only: str | None, first: str | None, last: str | None) -> tuple[str, ...]:
    """Ids of the stages that `--only`, `--from` and `--until` leave; a UsageError for no such."""
    ids = [entry.id for entry in plan.stages]
    for option, name in (("--only", only), ("--from", first), ("--until", last)):
        if name is not None and name not in ids:
            raise UsageError(
                f"{option} {name}: this recipe has no such stage", f"choose from {', '.join(ids)}"
            )
    if only is not None:
        if first is not None or last is not None:
            raise UsageError("--only excludes --from and --until", "leave one of them out")
        return (only,)
    begin = ids.index(first) if first is not None else 0
    end = ids.index(last) + 1 if last is not None else len(ids)
    if begin >= end:
        raise UsageError(f"--from {first} comes after --until {last}", "exchange them")
    return tuple(ids[begin:end])


def execute(
    plan: Plan,
    resolved: Resolved,
    store: Store,
    runner: Runner,
    selected: Sequence[str],
    outcome: Outcome,
) -> None:
    """Run what is missing among the selected stages; others must be in the store already.

    A failed margin stops the run before anything is published, or ends it where it publishes
    nothing; the card is made first, so that there is something to read.
    """
    for index, entry in enumerate(plan.stages, 1):
        if entry.id == "publish" and "publish" in selected:
            gate(outcome.artifacts)
        with refusals(f"stage {entry.id}", store.root):
            artifact, reason = find(entry, resolved, store)
        if artifact is not None:
            outcome.artifacts[entry.id] = artifact
            store.drop_scratch(artifact.manifest.kind, artifact.manifest.key)
            if entry.id in selected:
                assert entry.key is not None
                outcome.stages.append(StageOutcome(entry.id, entry.key, "hit", "", 0.0, 0.0))
            continue
        if entry.id not in selected:
            if any(entry.id in e.inputs.values() for e in plan.stages if e.id in selected):
                raise UsageError(
                    f"stage {entry.id} is needed and not in the store ({reason})",
                    "run it first, or leave out --only and --from",
                )
            continue
        with runner.progress.stage(entry.id, index, len(plan.stages)):
            if reason and entry.status != "missing":
                runner.progress.note(reason)
            needed = functools.partial(room_needed, entry, resolved, store, outcome.artifacts)
            with refusals(f"stage {entry.id}", store.root, needed):
                stage, artifact = _run_stage(
                    entry, plan, resolved, store, runner, outcome.artifacts
                )
        outcome.artifacts[entry.id] = artifact
        outcome.stages.append(replace(stage, reason=reason))
    if "compare" in selected:
        gate(outcome.artifacts)


def find(entry: StageEntry, resolved: Resolved, store: Store) -> tuple[Artifact | None, str]:
    """The stage's artifact if it can be used, otherwise why not."""
    assert entry.key is not None, "keys are known before a run"
    artifact = store.get(entry.kind, entry.key)
    if artifact is None:
        return None, entry.reason
    if damage := store.damage(artifact):
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        return None, f"damaged in the store: {damage[0]}{more}"
    if why := stale(entry, resolved, artifact):
        return None, why
    return artifact, ""


def gate(artifacts: Mapping[str, Artifact]) -> None:
    """Raise a GateError when the comparison does not pass the recipe's gate."""
    from quantize.stages.compare import failed_gates

    if "compare" not in artifacts:
        return
    failed = failed_gates(artifacts["compare"].json("record.json"))
    if failed:
        raise GateError(
            "the candidate does not pass the recipe's gate; nothing was published:\n  "
            + "\n  ".join(failed),
            "look at the card and at `quantize report`; then another method or scheme, a larger "
            "suite where it is inconclusive, or other evaluate.margins and evaluate.gate",
        )


def _run_stage(
    entry: StageEntry,
    plan: Plan,
    resolved: Resolved,
    store: Store,
    runner: Runner,
    artifacts: Mapping[str, Artifact],
) -> tuple[StageOutcome, Artifact]:
    assert entry.key is not None
    started = time.monotonic()
    spent_before = sum(runner.tool_seconds.values())
    state = "hit"

    def on_wait() -> None:
        runner.progress.note("another run is making this; waiting for it")

    with store.staging(entry.kind, entry.key, on_wait=on_wait) as staging:
        # Another run may have finished it while we waited for the lock.
        artifact, _ = find(entry, resolved, store)
        if artifact is None:
            state = "ran"
            context = StageContext(
                entry=entry,
                resolved=resolved,
                inputs={role: artifacts[name] for role, name in entry.inputs.items()},
                files=staging.files,
                work=staging.work,
                runner=runner,
                store=store,
            )
            STAGES[entry.kind].run(context)
            total = time.monotonic() - started
            tools = sum(runner.tool_seconds.values()) - spent_before
            artifact = store.commit(
                staging,
                key_inputs=entry.key_inputs,
                recipe=plan.recipe_name,
                seconds={"total": round(total, 3), "tools": round(tools, 3)},
                versions=context.versions,
                notes=tuple(context.notes),
            )
    seconds = time.monotonic() - started
    own = seconds - (sum(runner.tool_seconds.values()) - spent_before)
    outcome = StageOutcome(entry.id, entry.key, state, "", round(seconds, 3), round(own, 3))
    return outcome, artifact


def places(outcome: Outcome, run_folder: Path) -> dict[str, str]:
    """Where a person finds what: published folder or repository, artifact, card, record, logs."""
    found: dict[str, str] = {}
    if "publish" in outcome.artifacts:
        for target in outcome.artifacts["publish"].json("receipt.json")["targets"]:
            where = target["path"] if target["kind"] == "folder" else target["url"]
            found[f"published ({target['kind']})"] = str(where)
    for stage in ("compress", "convert", "adopt"):  # the later one is what users get
        if stage in outcome.artifacts:
            found["artifact"] = str(outcome.artifacts[stage].path / "model")
    if "card" in outcome.artifacts:
        found["card"] = str(outcome.artifacts["card"].file("README.md"))
        found["record"] = str(outcome.artifacts["card"].file("record.json"))
    found["logs"] = str(run_folder / "logs")
    return found
