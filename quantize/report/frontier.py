"""What a search found, for a person and for a program."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from quantize.report.tables import size
from quantize.search import Assignment, Found
from quantize.sensitivity import Choice

VERSION = 1


def shown_choices(found: Found) -> list[Choice]:
    """Choices that some optimum takes, in the order in which they appear on the frontier."""
    taken = [choice for point in (*found.frontier, found.chosen) for choice in point.shares]
    return list(dict.fromkeys(taken))


def frontier_table(found: Found) -> Table:
    """One row an optimum, the chosen one marked; below, one scheme for all linears."""
    choices = shown_choices(found)
    title = Text("Smallest summed error at each size", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("bits/\nweight", "all\nweights", "summed\nerror"):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice in choices:
        heading = choice.label.replace("_", "_\n").replace(" ", "\n")  # 80 columns hold five
        table.add_column(heading, justify="right", no_wrap=True)
    for point in _rows(found):
        chosen = point.options == found.chosen.options
        cells = [_percent(point.shares[c]) if c in point.shares else "" for c in choices]
        table.add_row(
            found.budget.text if chosen else "",
            *_numbers(point, found.rest_bytes),
            *cells,
            style="bold green" if chosen else "",
        )
    table.add_section()
    table.add_row("one for all", style="dim")
    for choice, point in found.uniform.items():
        table.add_row(f"  {choice.label}", *_numbers(point, found.rest_bytes), style="dim")
    return table


def _rows(found: Found) -> list[Assignment]:
    """The frontier with the chosen point in its place, once."""
    others = [point for point in found.frontier if point.options != found.chosen.options]
    return sorted([*others, found.chosen], key=lambda point: (point.bytes, -point.error))


def _percent(share: float) -> str:
    """Whole percents; what is there at all is not shown as 0%."""
    return "<1%" if share < 0.005 else f"{share:.0%}"


def _numbers(point: Assignment, rest_bytes: int) -> tuple[str, str, str]:
    return f"{point.bits:.3f}", size(point.bytes + rest_bytes), f"{point.error:.3g}"


def frontier_json(found: Found) -> dict[str, Any]:
    """The same with every unit's choice; bytes are of all weights, shares of the parameters."""
    return {
        "version": VERSION,
        "budget": found.budget.text,
        "calibration_tokens": found.tokens,
        "linears": found.linears,
        "parameters": found.chosen.parameters,
        "bytes_of_other_tensors": found.rest_bytes,
        "chosen": _point_json(found.chosen, found.rest_bytes)
        | {
            "units": {
                name: _choice_json(option.choice) | {"error": option.error}
                for name, option in found.chosen.options.items()
            }
        },
        "frontier": [_point_json(point, found.rest_bytes) for point in found.frontier],
        "uniform": [
            _choice_json(choice) | _point_json(point, found.rest_bytes)
            for choice, point in found.uniform.items()
        ],
    }


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {"scheme": choice.scheme, "group_size": choice.group_size}


def _point_json(point: Assignment, rest_bytes: int) -> dict[str, Any]:
    return {
        "bits": point.bits,
        "bytes": point.bytes + rest_bytes,
        "error": point.error,
        "shares": {choice.label: share for choice, share in point.shares.items()},
    }
