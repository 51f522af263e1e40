"""Tables of the command line: plan, environments, store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from quantize.environments import ENVIRONMENTS
from quantize.plan import Plan
from quantize.printable import printable
from quantize.store import Artifact

if TYPE_CHECKING:
    from quantize.environments import Environments
    from quantize.report.side_by_side import SideBySide

KEY_LETTERS = 12
STYLES = {"done": "green", "changed": "yellow", "missing": "", "pending": "cyan"}


def render(table: RenderableType) -> str:
    """Text of a table, as wide as the terminal and at least 80 columns, in colour where shown."""
    width = max(80, shutil.get_terminal_size((100, 24)).columns)
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def plain(text: str) -> str:
    """Text that others wrote, for a table: neither rich's markup nor a terminal's commands."""
    return escape(printable(text))


def checks_table() -> Table:
    """For a row a check: name and mark in either order, and what there is to say, folded."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    return table


def plan_table(plan: Plan) -> Table:
    """One row a stage: environment, key, what is in the store, and why the rest is not."""
    table = Table(
        title=f"{plain(plan.recipe_name)} on {plan.accelerator}", title_justify="left", box=None
    )
    for column in ("stage", "environment", "key", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", ratio=1, overflow="fold")
    for entry in plan.stages:
        style = STYLES.get(entry.status, "")
        table.add_row(
            entry.id,
            ", ".join(entry.environments) or "-",
            entry.key[:KEY_LETTERS] if entry.key else "-",
            f"[{style}]{entry.status}[/]" if style else entry.status,
            plain(entry.reason),
        )
    return table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan with whole keys."""
    stages = [
        {
            "id": entry.id,
            "kind": entry.kind,
            "key": entry.key,
            "status": entry.status,
            "reason": entry.reason,
            "environments": list(entry.environments),
            "inputs": dict(entry.inputs),
        }
        for entry in plan.stages
    ]
    return {
        "recipe": plan.recipe_name,
        "accelerator": plan.accelerator,
        "stages": stages,
        "notes": list(plan.notes),
    }


def comparison_table(found: SideBySide) -> Table:
    """One column a result, one row a property."""
    table = Table(box=None)
    table.add_column("", no_wrap=True)
    for name in found.names:
        table.add_column(plain(name), overflow="fold")
    for line in found.lines:
        table.add_row(line.label, *map(plain, line.cells))
    return table


def environments_table(environments: Environments) -> Table:
    """Two lines an environment: state and purpose, lock and folder."""
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, environment in sorted(ENVIRONMENTS.items()):
        installed = environments.installed(name)
        table.add_row(f"[bold]{name}[/]", environment.purpose)
        table.add_row("", f"lock: {environment.locks[environments.accelerator]}")
        state = "[green]installed[/]: " if installed else "not installed: "
        table.add_row("", state + plain(str(environments.folder(name))))
    return table


def artifacts_table(artifacts: Sequence[Artifact]) -> Table:
    """One row an artifact."""
    table = Table(box=None)
    for column in ("stage", "key", "recipe", "size", "made", "seconds"):
        right = column in ("size", "seconds")
        table.add_column(column, no_wrap=True, justify="right" if right else "left")
    for artifact in artifacts:
        manifest = artifact.manifest
        table.add_row(
            manifest.kind,
            manifest.key[:KEY_LETTERS],
            plain(manifest.recipe),
            size(manifest.total_bytes),
            manifest.created,
            f"{manifest.seconds['total']:.1f}",
        )
    return table


def artifacts_json(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "stage": artifact.manifest.kind,
            "key": artifact.manifest.key,
            "recipe": artifact.manifest.recipe,
            "bytes": artifact.manifest.total_bytes,
            "created": artifact.manifest.created,
            "path": str(artifact.path),
        }
        for artifact in artifacts
    ]


def size(count: float) -> str:
    """Bytes in powers of 1000, as disks and the Hub count: 39.8 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
