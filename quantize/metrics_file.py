"""A run's status for Prometheus, as a file for node_exporter's textfile collector.

The collector reads every `*.prom` of a folder; the file is renamed into place, so it never reads
half of one. Names follow Prometheus' conventions: base units, `_total` on what only grows. What is
not known has no sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

STATES = ("running", "done", "failed", "interrupted")

GAUGES = (
    ("quantize_run_start_timestamp_seconds", "When the run began.", "started"),
    ("quantize_run_elapsed_seconds", "Since the run began.", "elapsed_seconds"),
    ("quantize_last_update_timestamp_seconds", "When this was written.", "time"),
    ("quantize_last_progress_timestamp_seconds", "When work was last reported.", "progressed"),
    (
        "quantize_step_eta_seconds",
        "Of the step in the stage: time left by its rate.",
        "eta_seconds",
    ),
    ("quantize_exit_code", "Of the run, once it has ended.", "exit_code"),
)
"""(name, help, key of the status)"""


def check_name(path: Path) -> None:
    """UsageError for a name that the collector would not read."""
    if path.suffix != ".prom":
        raise UsageError(
            f"--metrics {path}: the collector reads files named *.prom alone",
            f"name it {path.with_suffix('.prom')}",
        )


def write_metrics(path: Path, status: Mapping[str, Any]) -> None:
    """Write a status, as `status.json` has it (and `result.json` at the end), to `path`."""
    from prometheus_client import CollectorRegistry, write_to_textfile

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(status))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), registry)


class _Collected:
    """What prometheus_client calls a collector."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return metrics(self._status)


def metrics(status: Mapping[str, Any]) -> Iterator[Metric]:
    """The samples of one run; every one has the recipe's name."""
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    recipe = str(status["recipe"])

    def gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["recipe", *labels])
        family.add_metric([recipe, *labels.values()], float(value))
        return family

    run = {name: str(status[name]) for name in ("run", "host", "quantize")}
    run["stage"] = str(status.get("stage", ""))
    yield gauge("quantize_run_info", "The run, and the stage that it is in.", run, 1)
    states = GaugeMetricFamily("quantize_run_state", "1 for the state.", labels=["recipe", "state"])
    for state in STATES:
        states.add_metric([recipe, state], float(state == status["state"]))
    yield states
    for name, text, key in GAUGES:
        if key in status:
            yield gauge(name, text, {}, status[key])
    if "position" in status:
        at, _, of = str(status["position"]).partition("/")
        yield gauge("quantize_run_stage_index", "Of the stage, from 1.", {}, int(at))
        yield gauge("quantize_run_stages", "Stages of the run.", {}, int(of))
    if status.get("total"):
        ratio = status["done"] / status["total"]
        yield gauge(
            "quantize_stage_progress_ratio", "Of the step in the stage: done of all.", {}, ratio
        )
    peak = GaugeMetricFamily(
        "quantize_peak_memory_bytes", "Most memory held at once.", labels=["recipe", "kind"]
    )
    for key, value in status["memory"].items():
        if key.endswith("_peak_bytes"):
            peak.add_metric([recipe, key.removesuffix("_peak_bytes")], float(value))
    yield peak
    if "cost" in status:
        cost = CounterMetricFamily(
            "quantize_cost", "Price an hour x hours, in the price's currency.", labels=["recipe"]
        )
        cost.add_metric([recipe], float(status["cost"]))
        yield cost
    yield from _of_result(recipe, status.get("result", {}))


def _of_result(recipe: str, result: Mapping[str, Any]) -> Iterator[Metric]:
    """What only the end knows: seconds of the stages, and quality."""
    from prometheus_client.metrics_core import GaugeMetricFamily

    seconds = GaugeMetricFamily(
        "quantize_stage_seconds", "Wall time of a stage that ran.", labels=["recipe", "stage"]
    )
    for stage in result.get("stages", ()):
        if stage["state"] == "ran":
            seconds.add_metric([recipe, stage["id"]], float(stage["seconds"]))
    yield seconds
    for name, text, value in _quality(result.get("summary", {})):
        family = GaugeMetricFamily(name, text, labels=["recipe"])
        family.add_metric([recipe], float(value))
        yield family


def _quality(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(name, help, value) of what was measured."""
    if "size" in summary:
        yield "quantize_size_ratio", "Bytes of the candidate / baseline.", summary["size"]["ratio"]
    if "perplexity" in summary:
        ratio = summary["perplexity"]["ratio"]
        yield "quantize_perplexity_ratio", "Perplexity of the candidate / baseline.", ratio
