"""Recipe + stages → plan. Pure: nothing is written, started or downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from quantize.keys import difference, digest
from quantize.plan import Plan, StageEntry
from quantize.resolve import measures_base, wants_base
from quantize.stages import (
    adapter,
    adopt,
    audit,
    calibrate,
    card,
    compare,
    compress,
    convert,
    fetch,
    gguf,
    measure,
    publish,
)
from quantize.stages.base import Resolved, Stage
from quantize.store import Artifact, Manifest, Store

STAGES: dict[str, Stage] = {
    kind: cast(Stage, module)
    for kind, module in (
        ("fetch", fetch),
        ("adapter", adapter),
        ("gguf", gguf),
        ("calibrate", calibrate),
        ("compress", compress),
        ("adopt", adopt),
        ("convert", convert),
        ("audit", audit),
        ("measure", measure),
        ("compare", compare),
        ("card", card),
        ("publish", publish),
    )
}


ROLES = {
    "measure-baseline": "baseline",
    "measure-candidate": "candidate",
    "measure-repeat": "repeat",
    "measure-base": "base",
}
"""What the comparison calls each measurement."""


def plan(resolved: Resolved, lock_digest: Callable[[str], str]) -> Plan:
    """Every stage with its key; `lock_digest` identifies an environment's contents."""
    entries: dict[str, StageEntry] = {}
    for stage_id, kind, inputs in _graph(resolved):
        entries[stage_id] = _entry(stage_id, kind, inputs, entries, resolved, lock_digest)
    notes = [*resolved.recipe.quantize.notices]
    if "measure-candidate" in entries and (reason := measure.unservable(resolved)):
        notes.append(f"measure-candidate: the result is not served here: {reason}")
    if "measure-candidate" in entries and (reason := measure.unpacks_because(resolved)):
        notes.append(
            f"measure-candidate: the weights are unpacked to BF16 for the measurement, without "
            f"latency and throughput: {reason}"
        )
    if "gguf" in entries and wants_base(resolved.recipe, resolved.suite):
        notes.append("the base is not measured: of a GGUF recipe only the source becomes GGUF")
    return Plan(resolved.recipe.name, resolved.accelerator, tuple(entries.values()), tuple(notes))


def with_status(plan: Plan, store: Store) -> Plan:
    """The same plan with what is in the store, and why the rest is not."""
    stages = []
    for entry in plan.stages:
        if entry.key is None:
            stages.append(replace(entry, status="pending"))
        elif store.get(entry.kind, entry.key) is not None:
            stages.append(replace(entry, status="done", reason="in the store"))
        else:
            status, reason = _why_missing(entry, plan.recipe_name, store)
            stages.append(replace(entry, status=status, reason=reason))  # type: ignore[arg-type]
    return replace(plan, stages=tuple(stages))


def with_stale(plan: Plan, store: Store, resolved: Resolved) -> Plan:
    """The same plan; finished stages that must be made again all the same are `changed`."""
    stages = []
    for entry in plan.stages:
        artifact = store.get(entry.kind, entry.key) if entry.key is not None else None
        why = None
        if artifact is not None and hasattr(STAGES[entry.kind], "stale"):
            damage = store.damage(artifact)  # a hook reads files that must be there
            found = f"damaged in the store: {damage[0]}" if damage else None
            why = found or stale(entry, resolved, artifact)
        stages.append(replace(entry, status="changed", reason=why) if why else entry)
    return replace(plan, stages=tuple(stages))


def stale(entry: StageEntry, resolved: Resolved, artifact: Artifact) -> str | None:
    """Why a finished artifact must be made again although its key is the same; see `Stage`."""
    hook = getattr(STAGES[entry.kind], "stale", None)
    return hook(resolved, entry.id, artifact) if hook is not None else None


def _graph(resolved: Resolved) -> list[tuple[str, str, dict[str, str]]]:
    """(id, kind, inputs by role) of every stage, in order."""
    recipe = resolved.recipe
    fetched = {"fetch": "fetch"}
    graph: list[tuple[str, str, dict[str, str]]] = [("fetch", "fetch", {})]
    apart = _apart(resolved)
    if apart:
        graph.append((adapter.FETCH_ADAPTER, "adapter", fetched))
    converted = _converted(resolved)
    if converted:
        graph.append(("gguf", "gguf", fetched))
    calibrated: dict[str, str] = {}
    if recipe.calibrates:
        graph.append(("calibrate", "calibrate", fetched | apart))
        calibrated = {"calibrate": "calibrate"}
    if recipe.quantize.artifact is not None:
        graph.append(("adopt", "adopt", fetched))
    else:
        graph.append(("compress", "compress", fetched | calibrated | converted))
    if recipe.quantize.repacks:
        graph.append(("convert", "convert", fetched | {"compress": "compress"}))
    result = result_stage(resolved)
    made = fetched | {"compress": result} | apart
    graph.append(("audit", "audit", made | converted))
    made = made | {"audit": "audit"}
    measured: dict[str, str] = {}
    if resolved.suite is not None:
        graph += _measurements(resolved)
        measured = {ROLES[name]: name for name, kind, _ in graph if kind == "measure"}
        graph.append(("compare", "compare", made | calibrated | measured))
        sides = ("baseline", "candidate")
        measured = {role: measured[role] for role in sides} | {"compare": "compare"}
    if recipe.quantize.repacks:  # the card tells of what the format was repacked from, too
        made = made | {"quantized": "compress"}
    graph.append(("card", "card", made | calibrated | measured))
    if recipe.publish.wanted:
        # It reads no comparison, but nothing is published whose gates cannot be asked.
        gates = {"compare": "compare"} if measured else {}
        published = {"compress": result, "card": "card"} | apart
        graph.append(("publish", "publish", published | gates))
    return graph


def result_stage(resolved: Resolved) -> str:
    """The stage whose artifact is what users get; others read it in the role `compress`."""
    quantize = resolved.recipe.quantize
    if quantize.artifact is not None:
        return "adopt"
    return "convert" if quantize.repacks else "compress"


def _apart(resolved: Resolved) -> dict[str, str]:
    """Role and stage of an adapter that is not merged; the quantized base does not depend on it."""
    keeps = resolved.recipe.model.keeps_adapter
    return {"adapter": adapter.FETCH_ADAPTER} if keeps else {}


def _converted(resolved: Resolved) -> dict[str, str]:
    """Role and stage of the source as GGUF, where llama.cpp quantizes."""
    return {"gguf": "gguf"} if resolved.recipe.quantize.effective_format == "gguf" else {}


def _measurements(resolved: Resolved) -> list[tuple[str, str, dict[str, str]]]:
    """Baseline and candidate; the baseline again for its noise; the base for retention."""
    evaluate = resolved.recipe.evaluate
    assert evaluate is not None, "a suite comes from an evaluate block"
    # llama.cpp serves GGUF alone: what it is held against is the source in that form.
    original = _converted(resolved).get("gguf", "fetch")
    served = {"fetch": "fetch", "model": original} | _apart(resolved)
    graph = [
        ("measure-baseline", "measure", served),
        ("measure-candidate", "measure", served | {"model": result_stage(resolved)}),
    ]
    if measure.unservable(resolved):
        return graph  # there is nothing to hold them against
    if evaluate.noise and not evaluate.quick:
        graph.append(("measure-repeat", "measure", served))
    if measures_base(resolved.recipe, resolved.suite) and measure.asks_base(resolved):
        graph.append((fetch.BASE, "fetch", {}))
        graph.append(("measure-base", "measure", served | {"model": fetch.BASE}))
    return graph


def _entry(
    stage_id: str,
    kind: str,
    inputs: dict[str, str],
    entries: dict[str, StageEntry],
    resolved: Resolved,
    lock_digest: Callable[[str], str],
) -> StageEntry:
    stage = STAGES[kind]
    environments = stage.environments(resolved, stage_id)
    entry = StageEntry(stage_id, kind, None, {}, inputs, environments)
    waiting = [name for name in inputs.values() if entries[name].key is None]
    if waiting:
        return replace(entry, reason=f"its key is known after {', '.join(sorted(set(waiting)))}")
    try:
        own = stage.key_inputs(resolved, stage_id)
    except KeyError as missing:
        return replace(entry, reason=f"its key is known when {missing.args[0]} is resolved")
    key_inputs = {
        "stage": kind,
        "code": stage.VERSION,
        "inputs": {role: entries[name].key for role, name in sorted(inputs.items())},
        "locks": {name: lock_digest(name) for name in environments},
        "with": own,
    }
    return replace(entry, key=digest(key_inputs), key_inputs=key_inputs)


def earlier_results(entry: StageEntry, recipe_name: str, store: Store) -> list[Manifest]:
    """What this recipe made in the stage before, under whatever key."""
    # Both measure stages are of one kind: the baseline's reads one artifact in two roles.
    return [
        manifest
        for manifest in store.manifests(entry.kind)
        if manifest.recipe == recipe_name
        and len(set(manifest.key_inputs.get("inputs", {}).values()))
        == len(set(entry.inputs.values()))
    ]


def _why_missing(entry: StageEntry, recipe_name: str, store: Store) -> tuple[str, str]:
    """`changed` with what differs from this recipe's nearest earlier result, or `missing`."""
    earlier = earlier_results(entry, recipe_name, store)
    if not earlier:
        return "missing", "not made yet"
    changes = min((_changes(manifest, entry) for manifest in earlier), key=len)
    shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    return "changed", shown


def _changes(manifest: Manifest, entry: StageEntry) -> list[str]:
    changes = difference(manifest.key_inputs, entry.key_inputs)
    return [change.removeprefix("with.") for change in changes]
