"""What `quantize verify` found, for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from quantize.report.markdown import one_line
from quantize.report.tables import checks_table, render

if TYPE_CHECKING:
    from quantize.verify.verification import Verification

MARKS = {"passed": ("ok", "green"), "failed": ("DIFFERS", "bold red"), "skipped": ("-", "dim")}

SHOWN = 20
"""Problems of one check that are shown; `--json` has all."""


def verification_text(found: Verification) -> str:
    """One row a check, what it found below it, and the verdict as the last line."""
    table = checks_table()
    for check in found.checks:
        mark, style = MARKS[check.outcome]
        lines = [one_line(problem.text) for problem in check.problems[:SHOWN]]
        more = len(check.problems) - SHOWN
        lines += [f"and {more} more"] if more > 0 else []
        said = "\n".join(lines) or one_line(check.summary)
        table.add_row(check.name, Text(mark, style), Text(said))
    failed = [check.name for check in found.checks if check.outcome == "failed"]
    if failed:
        verdict = Text(f"does not verify: {', '.join(failed)}", "bold red")
    else:
        verdict = Text("verified", "bold green")
    return render(Group(Text(found.place, "bold"), table, verdict))
