"""A card record's numbers as rows of a table: the same rows on the card and on the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.records import (
    CompareRecord,
    Divergence,
    MeasureRecord,
    PerplexityDelta,
    Retention,
    TaskDelta,
    Verdict,
)

Record = Mapping[str, Any]
"""`record.json` of a card artifact, see :mod:`quantize.stages.card`."""


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""owner/name"""


@dataclass(frozen=True)
class Row:
    """One line of a table; an empty string where a side has no such number."""

    label: str
    baseline: str
    candidate: str
    change: str = ""
    interval: str = ""  # 95%
    flips: str = ""  # tasks: documents whose score changed
    population: str = ""  # what it was measured on


def size_rows(record: Record) -> list[Row]:
    """Bytes of the safetensors files, and bits per parameter of the original model."""
    size = record["size"]
    before, after = size["baseline_bytes"], size["candidate_bytes"]
    bits = [f"{8 * count / size['parameters']:.2f}" for count in (before, after)]
    return [
        Row("Weights", bytes_text(before), bytes_text(after), f"×{after / before:.3f}"),
        Row("Bits/parameter", *bits),
    ]


def quality_rows(compare: CompareRecord) -> list[Row]:
    """Perplexity, KL divergence and top-1 agreement of each text, and every task."""
    rows = []
    if "perplexity" in compare:
        rows.append(_perplexity_row("Perplexity", compare["perplexity"]))
    if "divergence" in compare:
        rows += _divergence_rows("", compare["divergence"])
    if "own_perplexity" in compare:
        rows.append(_perplexity_row("Perplexity, own text", compare["own_perplexity"]))
    if "own_divergence" in compare:
        rows += _divergence_rows(", own text", compare["own_divergence"])
    return rows + [_task_row(task) for task in compare["tasks"]]


def _divergence_rows(text: str, kl: Divergence) -> list[Row]:
    tokens = f"{kl['tokens']:,} tokens"
    population = f"{tokens}, top {kl['top_k']}"
    mean = Row(
        f"KL divergence, mean (nats){text}",
        "",
        nats(kl["mean"]),
        interval=f"{nats(kl['mean_low'])} to {nats(kl['mean_high'])}",
        population=population,
    )
    agreement = f"{100 * kl['top1_agreement']:.2f}%"
    return [
        mean,
        Row(f"KL divergence, p99 (nats){text}", "", nats(kl["p99"]), population=population),
        Row(f"Top-1 agreement{text}", "", agreement, population=tokens),
    ]


def _perplexity_row(label: str, delta: PerplexityDelta) -> Row:
    return Row(
        label,
        f"{delta['baseline']:.4f}",
        f"{delta['candidate']:.4f}",
        f"×{delta['ratio']:.4f}",
        f"{delta['ratio_low']:.4f} to {delta['ratio_high']:.4f}",
        population=f"{delta['scored_tokens']:,} tokens, {delta['documents']:,} documents",
    )


@dataclass(frozen=True)
class VerdictRow:
    """One interval held against its margin."""

    label: str
    worse: str
    interval: str  # 95%
    margin: str
    rule: str
    verdict: str
    remark: str


LABELS = {
    "perplexity": "Perplexity",
    "own_perplexity": "Perplexity, own text",
    "tasks": "Tasks, average",
}


def verdict_rows(compare: CompareRecord) -> list[VerdictRow]:
    """Every verdict but the model's; figures are how much worse, so negative is better."""
    return [_verdict_row(verdict) for verdict in compare["verdicts"] if verdict["name"] != "model"]


def _verdict_row(verdict: Verdict) -> VerdictRow:
    name = verdict["name"]
    remarks = [] if verdict["counts"] else ["does not count for the gate"]
    if "more_documents" in verdict:
        remarks.append(f"needs about {verdict['more_documents']:,} more documents")
    if "reason" in verdict:
        remarks.append(verdict["reason"])
    known = "worse" in verdict
    return VerdictRow(
        label=LABELS.get(name, name.removeprefix("task:")),
        worse=f"{verdict['worse']:+.4f}" if known else "",
        interval=f"{verdict['low']:+.4f} to {verdict['high']:+.4f}" if "low" in verdict else "",
        margin=f"{verdict['margin']:.4f}" if "margin" in verdict else "",
        rule=verdict["rule"],
        verdict=verdict["verdict"],
        remark="; ".join(remarks),
    )


def model_verdict(compare: CompareRecord) -> Verdict | None:
    """The verdict on the model; None where nothing had a margin."""
    return next((v for v in compare["verdicts"] if v["name"] == "model"), None)


@dataclass(frozen=True)
class RetentionRow:
    """How much of what the fine-tune gained on one task is left."""

    label: str
    base: str
    fine_tuned: str
    candidate: str
    retained: str
    interval: str  # 95%
    remark: str


def retention_rows(compare: CompareRecord) -> list[RetentionRow]:
    """One row a task, where the base was measured."""
    return [_retention_row(retention) for retention in compare["retention"]]


def _retention_row(retention: Retention) -> RetentionRow:
    retained, interval = "", ""
    if "retained" in retention:
        retained = f"{100 * retention['retained']:.1f}%"
    if "retained_low" in retention and "retained_high" in retention:
        ends = (retention["retained_low"], retention["retained_high"])
        interval = " to ".join(f"{100 * end:.1f}%" for end in ends)
    return RetentionRow(
        label=f"{retention['name']}, {retention['metric']}",
        base=f"{retention['base']:.4f}",
        fine_tuned=f"{retention['fine_tuned']:.4f}",
        candidate=f"{retention['candidate']:.4f}",
        retained=retained,
        interval=interval,
        remark=retention.get("reason", ""),
    )


def recovery_text(compare: CompareRecord) -> str:
    """What is left of BF16's scores on average, with its 95% interval; empty without tasks."""
    together = compare.get("aggregate")
    if together is None or "recovery" not in together:
        return ""
    share = f"{100 * together['recovery']:.1f}% of BF16's score kept"
    tasks = f" on average over {together['tasks']} tasks" if together["tasks"] > 1 else ""
    if "recovery_low" not in together or "recovery_high" not in together:
        return share + tasks
    ends = (together["recovery_low"], together["recovery_high"])
    low, high = (f"{100 * end:.1f}%" for end in ends)
    return f"{share}{tasks} (95% interval {low} to {high})"


HEALTH = {
    "repeating": "Repeats itself",
    "ended_early": "Ends early",
    "cut_off": "Cut off at the longest answer",
    "invalid_utf8": "Broken text (UTF-8)",
    "template_echo": "Echoes the chat template",
    "schema_valid": "Holds to the JSON schema",
}
"""What each rate of :class:`quantize.records.Health` says of an answer."""


def health_rows(compare: CompareRecord) -> list[Row]:
    """Share of the prompts of generation health with each property, on both sides."""
    return [
        Row(
            HEALTH[rate["name"]],
            f"{100 * rate['baseline']:.1f}%",
            f"{100 * rate['candidate']:.1f}%",
            flips=f"{rate['got_worse']:,} got worse, {rate['got_better']:,} better",
        )
        for rate in compare["health"]
    ]


def noise_text(compare: CompareRecord) -> str:
    """What the baseline measured twice showed, in a sentence; empty where it was not."""
    if "noise" not in compare:
        return ""
    noise = compare["noise"]
    parts = []
    if "perplexity_ratio" in noise:
        parts.append(f"perplexity ×{noise['perplexity_ratio']:.6f}")
    if "kl_mean" in noise:
        parts.append(f"KL divergence {nats(noise['kl_mean'])} nats")
    parts += [
        f"{task['name']} {task['difference']:+.4f} ({task['flips']} of {task['documents']} flipped)"
        for task in noise["tasks"]
    ]
    return ", ".join(parts)


def _task_row(task: TaskDelta) -> Row:
    direction = "" if task["higher_is_better"] else " (lower is better)"
    noise = " (noise)" if task.get("inside_noise") and task["difference"] else ""
    return Row(
        f"{task['name']}, {task['metric']}{direction}",
        f"{task['baseline']:.4f}",
        f"{task['candidate']:.4f}",
        f"{task['difference']:+.4f}",
        f"{task['difference_low']:+.4f} to {task['difference_high']:+.4f}",
        flips=f"{task['lost']:,} worse, {task['gained']:,} better of {task['documents']:,}{noise}",
        population=f"{task['documents']:,} documents",
    )


SERVING = (
    ("First token, median", "time_to_first_token_ms_median", "{:.1f} ms"),
    ("First token, p99", "time_to_first_token_ms_p99", "{:.1f} ms"),
    ("Per output token, median", "time_per_output_token_ms_median", "{:.1f} ms"),
    ("Output tokens/s", "output_tokens_per_second", "{:.1f}"),
    ("Requests/s", "requests_per_second", "{:.2f}"),
    ("KV cache, tokens", "kv_cache_tokens", "{:,}"),
)
"""Label, field of :class:`quantize.records.Serving`, format."""


def serving_rows(record: Record) -> list[Row]:
    """What both servers showed under the suite's load, side by side."""
    before, after = (record.get(side, {}).get("serving", {}) for side in ("baseline", "candidate"))
    rows = []
    for label, field, form in SERVING:
        cells = [form.format(side[field]) if field in side else "" for side in (before, after)]
        if any(cells):
            rows.append(Row(label, cells[0], cells[1]))
    return rows


def smoke_row(record: Record) -> Row | None:
    """Smoke checks that passed, of how many; None when no side was asked."""
    cells = []
    for side in ("baseline", "candidate"):
        passed, checks = smoke_counts(record.get(side))
        cells.append(f"{passed} of {checks}" if checks else "")
    return Row("Smoke checks passed", cells[0], cells[1]) if any(cells) else None


def smoke_counts(measured: MeasureRecord | None) -> tuple[int, int]:
    """Checks passed and checks made, over all smoke prompts of one side."""
    checks = [check for smoke in measured["smoke"] for check in smoke["checks"]] if measured else []
    return sum(check["passed"] for check in checks), len(checks)


def bytes_text(count: int) -> str:
    """Decimal units, three significant digits or more: 12.3 MB, 141 GB."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    if unit == "bytes":
        return f"{count} bytes"
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def nats(value: float) -> str:
    """Five decimals, or two significant ones below 0.0001; zero is 0."""
    if value == 0:
        return "0"
    return f"{value:.5f}" if value >= 1e-4 else f"{value:.1e}"


def method_text(record: Record) -> str:
    """What was done, in one phrase: `AWQ, W4A16_ASYM, group size 128, some modules W8A16`."""
    quantize = record["recipe"]["quantize"]
    parts = [quantize["method"].upper(), quantize["scheme"]]
    if quantize.get("group_size") == "channel":
        parts.append("a scale for each output channel")
    elif "group_size" in quantize:
        parts.append(f"group size {quantize['group_size']}")
    others = dict.fromkeys(override["scheme"] for override in quantize.get("overrides", ()))
    if others:
        parts.append(f"some modules {' or '.join(others)}")
    if "kv_cache" in quantize:
        parts.append("scales for an FP8 KV cache")
    return ", ".join(parts)
