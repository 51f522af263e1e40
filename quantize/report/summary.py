"""The end of a run, for a person and for a program: the same numbers as on the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantize.report.results import (
    Record,
    Row,
    method_text,
    model_verdict,
    noise_text,
    quality_rows,
    retention_rows,
    serving_rows,
    size_rows,
    smoke_counts,
    smoke_row,
    verdict_rows,
)


def summary_table(record: Record) -> RenderableType:
    """What a card record says; fits 80 columns. Nothing from outside is read as rich's markup."""
    parts: list[RenderableType] = [Text(), _numbers(record)]
    if "compare" in record:
        parts += [*_retention(record), *_verdicts(record)]
    remarks = _remarks(record)
    if remarks:
        parts += [Text(), *remarks]
    return Group(*parts)


def _numbers(record: Record) -> Table:
    title = Text(f"{record['recipe']['name']}: {method_text(record)}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("BF16", "this model", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    quality = quality_rows(record["compare"]) if "compare" in record else []
    smoke = smoke_row(record)
    groups = [size_rows(record), quality, [*([smoke] if smoke else []), *serving_rows(record)]]
    for group in groups:
        for row in group:
            table.add_row(*_cells(row))
        if group:
            table.add_section()
    return table


def _cells(row: Row) -> list[Text]:
    label = Text(row.label)
    if row.flips:
        label.append(f"\n  {row.flips}", style="dim")
    return [
        label,
        *(Text(cell) for cell in (row.baseline, row.candidate, row.change, row.interval)),
    ]


STYLES = {
    "non-inferior": "bold green",
    "inferior": "bold red",
    "not comparable": "bold red",
    "inconclusive": "bold yellow",
}


def _retention(record: Record) -> list[RenderableType]:
    rows = retention_rows(record["compare"])
    if not rows:
        return []
    table = Table(title=Text("What is left of the fine-tune's gain"), title_justify="left")
    table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    table.add_column("")
    for name in ("base", "fine-tune", "this model", "left", "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        label = Text(row.label)
        if row.remark:
            label.append(f"\n  {row.remark}", style="dim")
        cells = (row.base, row.fine_tuned, row.candidate, row.retained, row.interval)
        table.add_row(label, *(Text(cell) for cell in cells))
    return [table]


def _verdicts(record: Record) -> list[RenderableType]:
    """The verdicts with what they come from; the model's in words below."""
    compare = record["compare"]
    model = model_verdict(compare)
    if model is None:
        return []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("verdicts")
    for name in ("worse by", "95% interval", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in verdict_rows(compare):
        label = Text(row.label)
        if row.remark:
            label.append(f"\n  {row.remark}", style="dim")
        verdict = Text(row.verdict, style=STYLES[row.verdict])
        table.add_row(label, *map(Text, (row.worse, row.interval, row.margin)), verdict)
    said = Text("verdict: ").append(model["verdict"], style=STYLES[model["verdict"]])
    if "reason" in model:
        said.append(f" ({model['reason']})")
    return [table, said]


def _remarks(record: Record) -> list[RenderableType]:
    """Failed margins and checks, and what was not measured; nothing when all is well."""
    if "compare" not in record:
        return [Text("quality was not measured: the recipe asks for no evaluation", style="yellow")]
    compare = record["compare"]
    remarks: list[RenderableType] = [
        Text(f"gate {gate['name']}: {gate['says']}", style="bold red")
        for gate in compare["gates"]
        if not gate["passed"]
    ]
    remarks += [
        Text(f"smoke check failed: {name}", style="red") for name in compare["smoke_failed"]
    ]
    remarks += [Text(f"look at this: {alarm}", style="yellow") for alarm in compare["alarms"]]
    if "lint" in compare:
        findings = compare["lint"]["findings"]
        remarks += [Text(f"calibration data: {f['message']}", style="yellow") for f in findings]
    if noise := noise_text(compare):
        remarks.append(Text(f"the baseline measured twice differs by: {noise}", style="dim"))
    remarks += [
        Text(f"not measured: {missing['what']}: {missing['why']}", style="yellow")
        for missing in compare["not_measured"]
    ]
    return remarks


def places_text(places: Mapping[str, str]) -> str:
    """Where things lie, a line each and never wrapped: a broken path cannot be copied.

    `places` maps what a person looks for (artifact, card, record, logs) to its path or address.
    """
    width = max(map(len, places), default=0)
    return "\n".join(f"{name:<{width}}  {place}" for name, place in places.items())


def summary_json(record: Record, places: Mapping[str, str]) -> dict[str, Any]:
    """The same content as :func:`summary_table` for `--json`; what was not measured is absent."""
    found: dict[str, Any] = {
        "recipe": record["recipe"]["name"],
        "method": record["recipe"]["quantize"]["method"],
        "scheme": record["recipe"]["quantize"]["scheme"],
        "size": {
            **record["size"],
            "ratio": record["size"]["candidate_bytes"] / record["size"]["baseline_bytes"],
        },
        "places": dict(places),
    }
    if "compare" not in record:
        return found
    names = (
        "quick",
        "perplexity",
        "divergence",
        "own_perplexity",
        "own_divergence",
        "tasks",
        "aggregate",
        "retention",
        "noise",
        "lint",
        "health",
        "verdicts",
        "gates",
        "alarms",
        "smoke_failed",
        "not_measured",
    )
    found |= {name: record["compare"][name] for name in names if name in record["compare"]}
    sides = {side: record[side] for side in ("baseline", "candidate")}
    found["serving"] = {name: side["serving"] for name, side in sides.items() if "serving" in side}
    found["smoke"] = {
        name: dict(zip(("passed", "checks"), smoke_counts(side), strict=True))
        for name, side in sides.items()
        if side["smoke"]
    }
    return found
