"""What `quantize check` found, for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from quantize.report.markdown import one_line
from quantize.report.tables import checks_table, render

if TYPE_CHECKING:
    from quantize.checking import Report
    from quantize.checklist import Checked

MARKS = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("-", "dim"),
    "unchecked": ("?", "yellow"),
}


def checks_text(report: Report) -> str:
    """A tick or cross a check, its findings with their remedies, and the verdict at the end."""
    table = checks_table()
    for check in report.checks:
        mark, style = MARKS[check.outcome]
        table.add_row(Text(mark, style), check.name, _said(check))
    count = len(report.findings)
    noun = "thing" if count == 1 else "things"
    open_ones = sum(check.outcome == "unchecked" for check in report.checks)
    but = f"; {open_ones} checks could not be made" if open_ones else ""
    verdict = Text(f"a run can begin{but}", "bold green")
    if count:
        verdict = Text(f"{count} {noun} must be put right first", "bold red")
    notes = [Padding(Text(f"note: {one_line(note)}"), 0) for note in report.notes]
    return render(Group(Text(report.recipe, "bold"), table, *notes, verdict))


def _said(check: Checked) -> Text:
    lines = []
    for finding in check.told.findings:
        # A recipe's mistakes are a line each.
        lines += [one_line(line) for line in finding.message.splitlines()]
        lines += [f"→ {one_line(finding.hint)}"] if finding.hint else []
    lines += [f"note: {one_line(note)}" for note in check.told.notes]
    if check.told.unchecked and not lines:
        return Text(f"not checked: {one_line(check.told.unchecked)}", "yellow")
    if check.told.skipped:
        return Text(one_line(check.told.skipped), "dim")
    return Text("\n".join(lines))
