"""Plans of a shipped recipe, whose stages and keys tests look at."""

from __future__ import annotations

from collections.abc import Callable

from quantize.plan import Plan
from quantize.resources import shipped_root
from quantize.stages.base import Resolved

TINY = shipped_root() / "recipes" / "tiny-llama-awq.yaml"
ALL = (
    "fetch", "calibrate", "compress", "audit", "measure-baseline", "measure-candidate",
    "measure-repeat", "fetch-base", "measure-base", "compare", "card", "publish",
)  # fmt: skip
BASE = {"fetch-base", "measure-base"}

Tiny = Callable[..., Resolved]


def locks(name: str) -> str:
    return f"lock of {name}"


def keys(made: Plan) -> dict[str, str | None]:
    return {entry.id: entry.key for entry in made.stages}


def changed(before: Plan, after: Plan) -> set[str]:
    old, new = keys(before), keys(after)
    assert list(old) == list(new)
    return {name for name in old if old[name] != new[name]}


def ids(made: Plan) -> tuple[str, ...]:
    return tuple(entry.id for entry in made.stages)
