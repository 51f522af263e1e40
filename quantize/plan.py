"""The plan: what will run, in what order, under which key, and why. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["done", "missing", "changed", "pending"]


@dataclass(frozen=True)
class StageEntry:
    """One stage of one run.

    `key` is None while it depends on something that is not known yet (an unresolved Hub branch).
    `key_inputs` is everything that the key is the hash of, kept in the manifest so that a later
    plan can say what changed. `inputs` maps the role an upstream stage plays to its id.
    """

    id: str  # unique in the plan: fetch, measure-baseline, ...
    kind: str  # folder in the store and entry in STAGES: fetch, measure, ...
    key: str | None
    key_inputs: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    environments: tuple[str, ...] = ()
    status: Status = "missing"
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Every stage of a recipe, in an order in which each comes after its inputs."""

    recipe_name: str
    accelerator: str  # cpu or cuda
    stages: tuple[StageEntry, ...]
    notes: tuple[str, ...] = ()  # what this machine cannot do, said before it is tried

    def stage(self, stage_id: str) -> StageEntry:
        """The entry with this id; a KeyError is a bug of the caller."""
        for entry in self.stages:
            if entry.id == stage_id:
                return entry
        raise KeyError(stage_id)
