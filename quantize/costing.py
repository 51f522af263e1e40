"""What `quantize plan` says a recipe needs and costs: the checkpoint that is here, the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantize.capacity.cards import find_card, known_names
from quantize.capacity.from_config import known_config, tensors_of
from quantize.capacity.planned import Money, Planned, planned
from quantize.checkpoint import Checkpoint, examine, model_folder
from quantize.errors import UsageError
from quantize.model_files import read_json_object
from quantize.plan import Plan, StageEntry
from quantize.planner import earlier_results
from quantize.remote_code import LET_IN
from quantize.stages.base import Resolved
from quantize.stages.fetch import downloads
from quantize.stages.measure import unpacks_because
from quantize.store import Store

ABSENT = (
    "the checkpoint is not here yet: figures come from its shapes, which are known after "
    "`quantize run RECIPE --until fetch`, or from --config config.json"
)
FROM_CONFIG = "the checkpoint is not here yet: shapes are those of its published config"
UNKNOWN_SHAPES = "no shapes are known of its architecture, or the config does not state them"


def money(prices: Sequence[str], throughputs: Sequence[str], resolved: Resolved | None) -> Money:
    """From the options, each `NUMBER` or `CARD=NUMBER`; the recipe's price where none is given."""
    found = _numbers("--price-per-hour", prices)
    recipe_price = resolved.recipe.machine.price_per_hour if resolved is not None else None
    if recipe_price is not None:
        found = {"": recipe_price} | found
    return Money(found, _numbers("--tokens-per-second", throughputs))


def _numbers(option: str, values: Sequence[str]) -> dict[str, float]:
    found = {}
    for value in values:
        name, _, text = value.rpartition("=")
        card = find_card(name) if name else None
        if name and card is None:
            raise UsageError(f"{option}: no card {name!r}", f"name one of {known_names()}")
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise UsageError(
                f"{option}: {text!r} is not a number above 0", f"{option} 2.50, or H100=2.50"
            )
        found[card.name.casefold() if card else ""] = number
    return found


def figures(
    resolved: Resolved, plan: Plan, store: Store, money: Money, config: Path | None = None
) -> Planned:
    """Every figure of the plan; without the checkpoint's shapes only what is missing.

    :param config: a config.json to take the shapes from, for a checkpoint that is not here
    """
    if config is not None:
        checkpoint, why = _from_config(read_json_object(config), config.parent), ""
        if checkpoint is None:
            raise UsageError(
                f"{config}: {UNKNOWN_SHAPES}",
                "name the config.json of an architecture that docs/preflight.md lists",
            )
    else:
        checkpoint, why = known_checkpoint(resolved, plan, store)
    if checkpoint is None:
        return Planned(missing=(why,))
    stages = [(entry.id, entry.kind) for entry in plan.stages]
    found = planned(
        checkpoint,
        resolved.recipe,
        resolved.accelerator,
        stages,
        money,
        {e.id: s for e in plan.stages if (s := _took(e, plan.recipe_name, store)) is not None},
        downloads=downloads(resolved),
        unpacks=unpacks_because(resolved) is not None,
    )
    return replace(found, missing=(*found.missing, *([why] if why else [])))


def known_checkpoint(resolved: Resolved, plan: Plan, store: Store) -> tuple[Checkpoint | None, str]:
    """The local checkpoint, or the one that was fetched, or a known config's; or None, and why."""
    folder = resolved.paths.get("model")
    if folder is None:
        entry = plan.stage("fetch")
        artifact = store.get(entry.kind, entry.key) if entry.key is not None else None
        if artifact is None:
            config = known_config(resolved.recipe.model.source)
            known = _from_config(config, Path()) if config is not None else None
            return known, ABSENT if known is None else FROM_CONFIG
        folder = model_folder(artifact)
    checkpoint, findings = examine(folder, code=LET_IN)
    return checkpoint, findings[0].message if findings else ""


def _from_config(config: dict[str, Any], folder: Path) -> Checkpoint | None:
    """A checkpoint's shapes without its files."""
    tensors = tensors_of(config)
    return None if tensors is None else Checkpoint(folder, config, tensors, ())


def _took(entry: StageEntry, recipe_name: str, store: Store) -> float | None:
    """Seconds of the stage that is done, or of this recipe's latest of the same kind and inputs."""
    artifact = store.get(entry.kind, entry.key) if entry.key is not None else None
    if artifact is not None:
        return float(artifact.manifest.seconds["total"])
    roles = set(entry.inputs)
    earlier = [
        manifest
        for manifest in earlier_results(entry, recipe_name, store)
        if set(manifest.key_inputs.get("inputs", {})) == roles
    ]
    latest = max(earlier, key=lambda manifest: manifest.created, default=None)
    return None if latest is None else float(latest.seconds["total"])
