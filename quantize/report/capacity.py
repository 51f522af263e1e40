"""What a recipe needs and costs, as tables of `quantize plan`; all computed, none measured."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from quantize.capacity.parts import Peak
from quantize.capacity.planned import Figures, OnCard, Planned
from quantize.report.tables import plain, size

UNKNOWN = "-"


def figures_table(planned: Planned) -> Table:
    """One row a stage: memory, GPU memory, disk, time, cost."""
    title = f"needs (computed), on {plain(planned.machine)}"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("stage", "memory", "GPU", "disk", "time", "cost"):
        right = column != "stage"
        table.add_column(column, no_wrap=True, justify="right" if right else "left")
    table.add_column("most memory at", ratio=1, overflow="fold")
    for one in planned.stages:
        needs = one.needs
        gpu = UNKNOWN
        if needs.device is not None:
            gpu = (f"{needs.gpus} × " if needs.gpus > 1 else "") + size(needs.device.bytes)
        table.add_row(
            needs.stage,
            size(needs.host.bytes),
            gpu,
            size(needs.disk_bytes) if needs.disk_bytes else UNKNOWN,
            _time(one),
            UNKNOWN if one.cost is None else f"{_bound(one)}{one.cost:.2f}",
            (needs.device or needs.host).when,
        )
    disk = sum(one.needs.disk_bytes for one in planned.stages)
    table.add_row("in all", "", "", size(disk))
    return table


def _bound(one: Figures) -> str:
    return "≥ " if one.at_least else ""


def _time(one: Figures) -> str:
    """`12 min`; with ≥ where it is a bound."""
    if one.seconds is None:
        return UNKNOWN
    for unit, length in (("h", 3600), ("min", 60)):
        if one.seconds >= 2 * length:
            return f"{_bound(one)}{one.seconds / length:.1f} {unit}"
    return f"{_bound(one)}{one.seconds:.0f} s"


def cards_table(planned: Planned) -> Table:
    """One row a card: what it can quantize, hold and serve."""
    counts = " ".join(map(str, planned.sizes))
    title = f"cards (computed): tokens in the KV cache beside the result on {counts} cards"
    table = Table(title=title, title_justify="left", box=None)
    headings = ["card", "memory", "quantizes", "BF16 on", *map(str, planned.sizes)]
    paid = any(one.per_million is not None for one in planned.cards)
    for number, heading in enumerate([*headings, *(["1M tokens"] if paid else [])]):
        right = number not in (0, 2, 3)
        table.add_column(heading, no_wrap=True, justify="right" if right else "left")
    for one in planned.cards:
        cells = [one.card.name, f"{one.card.gigabytes} GB", "yes" if one.quantizes else "no"]
        cells.append(UNKNOWN if one.baseline is None else str(one.baseline))
        cells += [_context(one, size, planned.request_tokens) for size in planned.sizes]
        if paid:
            cells.append(UNKNOWN if one.per_million is None else f"{one.per_million:.2f}")
        table.add_row(*cells)
    return table


def _context(card: OnCard, cards: int, request: int | None) -> str:
    """`41.2k`, rounded down; in brackets where it is less than one request; or a word of WORDS."""
    tokens = card.context[cards]
    if not card.serves:
        return "kernel"
    if tokens is None:
        return "uneven"
    if tokens == 0:
        return "no"
    return _short(tokens) if request is None or tokens >= request else f"({_short(tokens)})"


WORDS = {
    "no": "the weights do not fit",
    "uneven": "heads or groups do not split evenly",
    "kernel": "vLLM has none for the scheme from compute capability 10.0 on",
    "(": "less than that request: lower serve.max_model_len",
}
"""What stands in the table instead of a count, or before it."""


def _short(tokens: int) -> str:
    for unit, length in (("M", 10**6), ("k", 10**3)):
        if tokens >= length:
            shown = tokens / length
            digits = 2 if shown < 10 else 1 if shown < 100 else 0
            return f"{math.floor(shown * 10**digits) / 10**digits:.{digits}f}{unit}"
    return str(tokens)


def notes(planned: Planned) -> list[str]:
    """What the tables' figures rest on, and what is missing."""
    found = [f"needs: {why}" for why in planned.missing]
    if not planned.stages:
        return found
    if planned.machine == "a CPU":
        found.append("needs: of a machine with GPUs: --set machine.gpu=H100 --set machine.gpus=2")
    bases = {one.basis for one in planned.stages if one.basis}
    found += [f"time: {basis}" for basis in sorted(bases)]
    return found + _cards_notes(planned)


def _cards_notes(planned: Planned) -> list[str]:
    """How to read the table of cards."""
    tokens = planned.request_tokens
    request = "one request" if tokens is None else f"one request of {tokens:,} tokens"
    found = [
        "cards: quantizes: one such card is enough for compress; BF16 on: so many serve the "
        f"checkpoint as it is, with {request}"
    ]
    shown = [_context(one, size, tokens) for one in planned.cards for size in planned.sizes]
    legend = [
        f"{'in brackets' if word == '(' else word}: {why}"
        for word, why in WORDS.items()
        if any(cell.startswith(word) for cell in shown)
    ]
    if any(one.per_million is not None for one in planned.cards):
        legend.append("1M tokens: in the currency of the price")
    return found + ([f"cards: {'; '.join(legend)}"] if legend else [])


def planned_json(planned: Planned) -> dict[str, Any]:
    """All figures: bytes, seconds, tokens, currency."""
    return {
        "stages": [
            {
                "id": one.needs.stage,
                "host": _peak(one.needs.host),
                "gpu": None if one.needs.device is None else _peak(one.needs.device),
                "gpus": one.needs.gpus,
                "disk": [{"what": p.what, "bytes": p.bytes} for p in one.needs.disk],
                "seconds": one.seconds,
                "at_least": one.at_least,
                "basis": one.basis,
                "cost": one.cost,
            }
            for one in planned.stages
        ],
        "cards": [
            {
                "name": one.card.name,
                "bytes": one.card.bytes,
                "bandwidth_gb_per_second": one.card.bandwidth,
                "compute_capability": one.card.capability,
                "formats": one.card.formats,
                "quantizes": one.quantizes,
                "serves": one.serves,
                "baseline_gpus": one.baseline,
                "context_tokens": {str(key): value for key, value in one.context.items()},
                "per_million_tokens": one.per_million,
            }
            for one in planned.cards
        ],
        "machine": planned.machine,
        "request_tokens": planned.request_tokens,
        "weights": planned.weights,
        "missing": list(planned.missing),
    }


def _peak(peak: Peak) -> dict[str, Any]:
    return {
        "when": peak.when,
        "bytes": peak.bytes,
        "certain_bytes": peak.certain,
        "parts": [{"what": p.what, "bytes": p.bytes, "spare": p.spare} for p in peak.parts],
    }
