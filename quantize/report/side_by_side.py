"""Several results in one table: size, quality with intervals, verdicts, time and memory to make.

A cell is empty where a record does not have the figure: it was not measured, or nobody recorded it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.report.page.models import Model, models, remarks, task_names
from quantize.report.page.subject import Subject
from quantize.report.results import (
    bytes_text,
    nats,
    recovery_text,
    smoke_counts,
)


@dataclass(frozen=True)
class Line:
    """One property, and its value for each result in the order given."""

    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class SideBySide:
    """The table, and why a column should not be read against another."""

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """For `--json`: by result, property → text."""
        return {
            "results": [
                {"name": name}
                | {line.label: line.cells[at] for line in self.lines if line.cells[at]}
                for at, name in enumerate(self.names)
            ],
            "remarks": list(self.remarks),
        }


def side_by_side(subjects: Sequence[Subject]) -> SideBySide:
    """Properties that at least one result has; labels must tell the results apart."""
    rows = models(subjects)
    readers = [*PROPERTIES, *[(name, _task(name)) for name in task_names(rows)], *MADE]
    lines = [Line(label, tuple(read(row) for row in rows)) for label, read in readers]
    return SideBySide(
        tuple(row.label for row in rows),
        tuple(line for line in lines if any(line.cells)),
        tuple(remarks(rows)),
    )


def _engine(row: Model) -> str:
    engine: str = row.record["compress"].get("engine", "")
    versions = row.record["versions"].get("compress", {})
    version = next((versions[name] for name in (engine, "llmcompressor") if name in versions), "")
    return f"{engine} ({version})" if version and engine != "stream" else engine


def _format(row: Model) -> str:
    found: str = row.record["recipe"]["quantize"].get("format", "compressed-tensors")
    return found


def _size(row: Model) -> str:
    return bytes_text(row.record["size"]["candidate_bytes"])


def _bits(row: Model) -> str:
    size = row.record["size"]
    return f"{8 * size['candidate_bytes'] / size['parameters']:.2f}"


def _kl(row: Model) -> str:
    kl = row.compare.get("divergence")
    if kl is None:
        return ""
    return f"{nats(kl['mean'])} ({nats(kl['mean_low'])} to {nats(kl['mean_high'])})"


def _agreement(row: Model) -> str:
    kl = row.compare.get("divergence")
    return "" if kl is None else f"{100 * kl['top1_agreement']:.2f}%"


def _perplexity(row: Model) -> str:
    delta = row.compare.get("perplexity")
    if delta is None:
        return ""
    return f"×{delta['ratio']:.4f} ({delta['ratio_low']:.4f} to {delta['ratio_high']:.4f})"


def _recovery(row: Model) -> str:
    return recovery_text(row.compare) if row.compare else ""  # type: ignore[arg-type]


def _verdict(row: Model) -> str:
    return row.verdict["verdict"] if row.verdict else "not measured"


def _smoke(row: Model) -> str:
    passed, checks = smoke_counts(row.record.get("candidate"))
    return f"{passed} of {checks}" if checks else ""


def _task(name: str) -> Callable[[Model], str]:
    def read(row: Model) -> str:
        task = row.task(name)
        if task is None:
            return ""
        ends = f"{task['difference_low']:+.4f} to {task['difference_high']:+.4f}"
        return f"{task['candidate']:.4f}, {task['difference']:+.4f} ({ends})"

    return read


def _throughput(row: Model) -> str:
    found = row.serving.get("output_tokens_per_second")
    return "" if found is None else f"{found:.1f}"


def _seconds(row: Model) -> str:
    found = row.record["compress"].get("seconds")
    return "" if found is None else f"{found:.1f} s"


def _memory(row: Model) -> str:
    found = row.record["compress"].get("peak_memory_bytes")
    return "" if found is None else bytes_text(found)


def _server(row: Model) -> str:
    server = row.record.get("candidate", {}).get("server")
    if server is None:
        return ""
    unpacked = ", weights unpacked to BF16" if "unpacked" in row.record["candidate"] else ""
    return f"{server['name']} {server['version']} on {server['device']}{unpacked}"


Reader = tuple[str, Callable[[Model], str]]

PROPERTIES: tuple[Reader, ...] = (
    ("Method", lambda row: row.method),
    ("Engine", _engine),
    ("Format", _format),
    ("Weights", _size),
    ("Bits/parameter", _bits),
    ("Verdict", _verdict),
    ("KL divergence, mean (nats)", _kl),
    ("Top-1 agreement", _agreement),
    ("Perplexity", _perplexity),
    ("Tasks", _recovery),
)
MADE: tuple[Reader, ...] = (
    ("Smoke checks passed", _smoke),
    ("Output tokens/s", _throughput),
    ("Served by", _server),
    ("Time to quantize", _seconds),
    ("Peak memory of quantizing", _memory),
)
"""Label and what gives the cell; those of tasks stand between the two. Intervals are of 95%."""
