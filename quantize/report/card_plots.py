"""The card's pictures: which of the report's figures, and what each says in words.

The figures' data are those of `quantize report` (:mod:`quantize.report.page.figures`). The words
are from the record alone, so that the card stays a function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.records import CompareRecord, Details
from quantize.report.results import Record, nats

if TYPE_CHECKING:
    from quantize.report.page.figures import Figure

TEXT = "perplexity"
SHOWN_TASKS = 8
"""Tasks whose figures the picture's description gives; the table has all."""


def card_figures(record: Record, details: Details | None) -> list[Figure]:
    """Scores (verdicts, where none is a share), KL by position, change of log p: at most three."""
    from quantize.report.page import figures

    found = {figure.name: figure for figure in figures.record_figures(record, details)}
    scores = "tasks" if "tasks" in found else "verdicts"
    names = (scores, f"{TEXT}-kl-by-position", f"{TEXT}-delta-log-p")
    return [found[name] for name in names if name in found]


def draw(figures: list[Figure], folder: Path) -> None:
    """Write a PNG of each; matplotlib is imported here."""
    from quantize.report.page.plots import save_png

    folder.mkdir()
    for figure in figures:
        save_png(figure, folder)


def alt_text(name: str, compare: CompareRecord) -> str:
    """What the picture `name` shows, with its figures; a KeyError for one that no card has."""
    return _ALT[name](compare)


def _tasks(compare: CompareRecord) -> str:
    margins = {v["name"]: v["margin"] for v in compare["verdicts"] if "margin" in v}
    parts = []
    for task in compare["tasks"][:SHOWN_TASKS]:
        ends = (task["difference_low"], task["difference_high"])
        interval = " to ".join(f"{100 * end:+.2f}" for end in ends)
        margin = margins.get(f"task:{task['name']}")
        allowed = f", {100 * margin:.2f} may be lost" if margin is not None else ""
        parts.append(f"{task['name']} {100 * task['difference']:+.2f} ({interval}{allowed})")
    what = "Scores against BF16 with 95% intervals and margins, in percentage points"
    return f"{what}: {'; '.join(parts)}"


def _verdicts(compare: CompareRecord) -> str:
    parts = [
        f"{verdict['name'].removeprefix('task:')} {verdict['verdict']}"
        for verdict in compare["verdicts"]
        if "margin" in verdict and verdict["name"] != "model"
    ]
    return "Losses against their margins with 95% intervals: " + "; ".join(parts[:SHOWN_TASKS])


def _divergence(compare: CompareRecord) -> str:
    kl = compare["divergence"]
    return (
        "KL divergence from BF16 by position in the window: mean "
        f"{nats(kl['mean'])} nats, p99 {nats(kl['p99'])} nats, over {kl['tokens']:,} tokens"
    )


def _log_p(compare: CompareRecord) -> str:
    kl = compare["divergence"]
    return (
        "Histogram of how much the log-probability of each token of the text changed; its "
        f"probability changed by {100 * kl['delta_p_rms']:.2f} percentage points (root mean square)"
    )


_ALT: Mapping[str, Callable[[CompareRecord], str]] = {
    "tasks": _tasks,
    "verdicts": _verdicts,
    f"{TEXT}-kl-by-position": _divergence,
    f"{TEXT}-delta-log-p": _log_p,
}
