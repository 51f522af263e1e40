"""The frontier of a search as a picture: error against size, and who gets how many bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.report.frontier import shown_choices
from quantize.search import Assignment, Found
from quantize.sensitivity import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "svg.hashsalt": "quantize",  # the same ids in every file
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
}
# Okabe and Ito's colours, told apart by readers with colour blindness, too.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#f0e442")
BF16_COLOUR = "#9a9a9a"
MARKERS = "so^vDPX"
DPI = 150


def draw(found: Found, name: str, png: Path, svg: Path) -> None:
    """Write both files; the same search gives the same bytes with the same matplotlib."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # whatever the user's own settings are
        figure = Figure(figsize=(8, 6.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _errors(upper, found, name)
        _shares(lower, found)
        _save(figure, png, {"Software": None})
        _save(figure, svg, {"Date": None, "Creator": None})


def _save(figure: Figure, path: Path, metadata: dict[str, Any]) -> None:
    figure.savefig(path, format=path.suffix[1:], dpi=DPI, metadata=metadata)


def _colours(found: Found) -> dict[Choice, str]:
    """One colour a choice, in both panels; BF16 is grey."""
    choices = list(dict.fromkeys([*found.uniform, *shown_choices(found)]))
    coded = [choice for choice in choices if choice.scheme != "BF16"]
    colours = {choice: COLOURS[i % len(COLOURS)] for i, choice in enumerate(coded)}
    return colours | {choice: BF16_COLOUR for choice in choices if choice not in colours}


def _errors(axes: Axes, found: Found, name: str) -> None:
    """Summed error over bits, logarithmic; what has no error at all has no place on this axis."""
    points = [point for point in found.frontier if point.error > 0]
    axes.plot(
        [point.bits for point in points],
        [point.error for point in points],
        color="#333333",
        marker=".",
        linewidth=1.3,
        label="optimum at this size",
    )
    colours = _colours(found)
    for index, (choice, point) in enumerate(found.uniform.items()):
        if point.error > 0:
            axes.plot(
                [point.bits],
                [point.error],
                color=colours[choice],
                marker=MARKERS[index % len(MARKERS)],
                markersize=8,
                linestyle="none",
                label=f"all {choice.label}",
            )
    if found.chosen.error > 0:
        _mark_chosen(axes, found.chosen, found.budget.text)
    axes.set_yscale("log")
    axes.set_ylabel("summed relative squared\noutput error (dimensionless)")
    axes.set_title(f"{name}: {found.linears} linears", loc="left")
    axes.legend(frameon=False)
    top = axes.secondary_xaxis("top", functions=_sizes(found))
    top.set_xlabel(f"all weights ({_unit(found)[0]})")


def _mark_chosen(axes: Axes, chosen: Assignment, budget: str) -> None:
    axes.plot(
        [chosen.bits],
        [chosen.error],
        marker="*",
        markersize=17,
        color="#d00000",
        markeredgecolor="white",
        linestyle="none",
        label=f"chosen for {budget}: {chosen.bits:.2f} bits, {chosen.error:.3g}",
        zorder=5,
    )


def _shares(axes: Axes, found: Found) -> None:
    """Parameters by scheme, stacked, smallest scheme below; the chosen size is a line."""
    points = found.frontier
    colours = _colours(found)
    choices = _by_size(found)
    axes.stackplot(
        [point.bits for point in points],
        [[100 * point.shares.get(choice, 0.0) for point in points] for choice in choices],
        labels=[choice.label for choice in choices],
        colors=[colours[choice] for choice in choices],
        linewidth=0,
    )
    axes.axvline(found.chosen.bits, color="#d00000", linewidth=1.3)
    axes.set_ylim(0, 100)
    margin = 0.02 * (points[-1].bits - points[0].bits) or 0.1
    axes.set_xlim(points[0].bits - margin, points[-1].bits + margin)
    axes.set_ylabel("share of the\nparameters (%)")
    axes.set_xlabel("bits a quantizable parameter, scales and zero points included")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4, frameon=False)


def _by_size(found: Found) -> list[Choice]:
    """Shown choices by their bits a parameter."""
    bits: dict[Choice, float] = {}
    for unit in found.among:
        for option in unit.options:
            bits.setdefault(option.choice, option.bytes * 8 / unit.parameters)
    return sorted(shown_choices(found), key=lambda choice: (bits[choice], choice.label))


def _unit(found: Found) -> tuple[str, float]:
    total = found.frontier[-1].bytes + found.rest_bytes
    return ("GB", 1e9) if total >= 2e9 else ("MB", 1e6)


def _sizes(found: Found) -> tuple[Any, Any]:
    """Bits → size of all weights, and back."""
    scale = _unit(found)[1]
    parameters, rest = found.chosen.parameters, found.rest_bytes
    return (
        lambda bits: (bits * parameters / 8 + rest) / scale,
        lambda size: (size * scale - rest) * 8 / parameters,
    )
