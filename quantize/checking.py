"""`quantize check`: what a run would find before weights load, check by check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checklist import CHECKS, Checked, survey
from quantize.errors import UsageError
from quantize.findings import Faults, Finding, Told, error_of
from quantize.session import Inputs, whole_situation

INPUTS = "inputs"
"""The row of files, folders and repositories that the recipe names (:mod:`quantize.resolve`)."""


@dataclass(frozen=True)
class Report:
    """Every check in order, and what the plan says of this machine."""

    recipe: str
    checks: tuple[Checked, ...]
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> list[Finding]:
        """What must be put right."""
        return [finding for check in self.checks for finding in check.told.findings]

    @property
    def exit_code(self) -> int:
        """That of the run that these findings would end; 0 without any."""
        error = error_of(self.findings)
        return 0 if error is None else error.exit_code

    def json(self) -> dict[str, Any]:
        """For other programs."""
        return {
            "recipe": self.recipe,
            "exit_code": self.exit_code,
            "checks": [
                {
                    "name": check.name,
                    "outcome": check.outcome,
                    "findings": [
                        {
                            "message": finding.message,
                            "hint": finding.hint,
                            "kind": finding.error.__name__,
                            "exit_code": finding.error.exit_code,
                        }
                        for finding in check.told.findings
                    ],
                    "notes": check.told.notes,
                    "not_checked_because": check.told.unchecked or check.told.skipped,
                }
                for check in self.checks
            ],
            "notes": list(self.notes),
        }


def check_recipe(
    recipe: str, overrides: Sequence[str], store_folder: Path | None, *, online: bool
) -> Report:
    """Everything that can be known of a recipe without loading weights; writes no artifact."""
    faults = Faults()
    try:
        inputs = Inputs.read(recipe, overrides, store_folder, online=online, faults=faults)
    except UsageError as error:
        unread = Told(unchecked="the recipe cannot be read")
        rest = [Checked(name, unread) for name in (INPUTS, *(check.name for check in CHECKS))]
        return Report(recipe, (Checked("recipe", Told([Finding.of(error)])), *rest))
    now, made = whole_situation(inputs, faults, online=online)
    found = [Checked("recipe", Told()), Checked(INPUTS, Told(faults.findings))]
    return Report(inputs.resolved.recipe.name, (*found, *survey(now)), made.notes)
