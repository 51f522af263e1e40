"""What stands beside the verdicts: noise, retention, generation health, calibration lint."""

from __future__ import annotations

import numpy as np

from quantize.errors import SourceError
from quantize.records import CompareRecord, Missing, Noise
from quantize.report.paired.divergence import same_text
from quantize.report.paired.health import health_deltas
from quantize.report.paired.noise import add_text_noise, task_level, task_noise, text_level
from quantize.report.paired.pairing import pair
from quantize.report.paired.retention import retention
from quantize.report.paired.sides import TEXTS, Side, TextName, read_lines
from quantize.store import Artifact


def add_noise(record: CompareRecord, before: Side, repeat: Side) -> None:
    """The baseline against itself, and which differences of the record are no larger."""
    noise = Noise(tasks=[])
    for text in TEXTS:
        first, second = before.text(text), repeat.text(text)
        if first is None or second is None:
            continue
        try:
            same_text(first, second)
            _add_text_noise(record, noise, text, before, repeat)
        except SourceError as error:
            _miss(record, f"noise of {text}", error.message)
    for name in before.tasks:
        if name not in repeat.tasks:
            _miss(record, f"noise of task {name}", "the repetition was not measured on it")
            continue
        try:
            paired = pair(name, baseline=before.samples(name), repeat=repeat.samples(name))
        except SourceError as error:
            _miss(record, f"noise of task {name}", error.message)
            continue
        noise["tasks"].append(task_noise(name, paired))
        for delta in record["tasks"]:
            if delta["name"] == name:
                delta["inside_noise"] = abs(delta["difference"]) <= task_level(paired)
    if noise["tasks"] or "kl_mean" in noise:
        record["noise"] = noise


def _add_text_noise(
    record: CompareRecord, noise: Noise, text: TextName, before: Side, repeat: Side
) -> None:
    sides = before.logprobs(text), repeat.logprobs(text)
    level = text_level(*sides)
    if text == "perplexity":
        add_text_noise(noise, *sides)
    delta = record.get(text)
    if delta is not None:
        delta["inside_noise"] = bool(abs(np.log(delta["ratio"])) <= level)


def add_retention(record: CompareRecord, base: Side, before: Side, after: Side) -> None:
    """What is left of the fine-tune's gain, for each task that all three answered."""
    for name, task in before.tasks.items():
        if name not in after.tasks:
            continue  # its change is already named as not measured
        if name not in base.tasks:
            _miss(record, f"retention of task {name}", "the base was not measured on it")
            continue
        try:
            paired = pair(
                name,
                base=base.samples(name),
                baseline=before.samples(name),
                candidate=after.samples(name),
            )
        except SourceError as error:
            _miss(record, f"retention of task {name}", error.message)
            continue
        record["retention"].append(retention(task, paired))


def add_health(record: CompareRecord, before: Side, after: Side) -> None:
    """Generation health, where both sides were asked the same prompts."""
    first, second = before.record.get("health"), after.record.get("health")
    if first is None or second is None:
        return
    if first["prompts_sha256"] != second["prompts_sha256"]:
        why = "the two sides were asked different prompts"
        _miss(record, "change of generation health", why)
        return
    # It brings the HTTP client, which no other comparison needs.
    from quantize.measure.health import ended_early

    record["health"] = health_deltas(before.answers(), after.answers(), ended_early)


def add_lint(record: CompareRecord, calibrate: Artifact, before: Side) -> None:
    """The calibration data held against the baseline's held-out texts and its tasks' prompts."""
    from quantize.report.paired.lint import lint

    rows = read_lines(calibrate, "rows.jsonl")
    documents = {
        name: [sample["prompt"] for sample in before.samples(name)] for name in before.tasks
    }
    names: dict[TextName, str] = {"perplexity": "held-out text", "own_perplexity": "own text"}
    documents |= {
        label: before.documents(name)
        for name, label in names.items()
        if before.text(name) is not None
    }
    templated = any(task["chat_template"] for task in before.record["tasks"])
    record["lint"] = lint(rows, calibrate.json("calibrate.json"), documents, templated)


def _miss(record: CompareRecord, what: str, why: str) -> None:
    record["not_measured"].append(Missing(what=what, why=why))
