"""What the Hub reads of a card: the front matter with its `model-index`, and `.eval_results/`.

`model-index`: github.com/huggingface/hub-docs, `modelcard.md`. `.eval_results/*.yaml`: the same
place, `eval_results.yaml`, and https://huggingface.co/docs/hub/eval-results; only scores of data
sets that the Hub has registered as benchmarks, asked in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from quantize.records import PerplexityDelta, Task, TaskDelta
from quantize.report.markdown import one_line
from quantize.report.redact import redact
from quantize.report.results import HUB_ID, Record, method_text

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_ADDRESS = re.compile(r"https?://[^\s<>\"']+")

TAGS = ("vllm", "quantized")
"""Behind the format's own name."""
GGUF_TAGS = ("gguf", "llama.cpp", "ollama", "quantized")
TASK = {"type": "text-generation", "name": "Text Generation"}
DIGITS = 4
"""Of values in the front matter, as in the card's tables."""


@dataclass(frozen=True)
class Benchmark:
    """A data set on the Hub that keeps a leaderboard, and one of its tasks."""

    dataset: str
    task_id: str
    documents: int  # of the whole set: a part of it is another measurement
    metric: str  # of lm-eval
    scale: float  # the leaderboard's unit: 100 for percent


_GSM8K = Benchmark("openai/gsm8k", "gsm8k", 1319, "exact_match", 100)
_MMLU_PRO = Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12032, "exact_match", 100)

BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k": _GSM8K,
    "gsm8k_cot": _GSM8K,
    "gsm8k_cot_llama": _GSM8K,
    "gsm8k_cot_zeroshot": _GSM8K,
    "mmlu_pro": _MMLU_PRO,
}
"""lm-eval's task → benchmark. That these are registered, and their task ids and units:
huggingface.co/docs/hub/eval-results ("Registering a Benchmark") and results in published models."""


def front_matter_values(record: Record) -> dict[str, Any]:
    """What the Hub reads; a value that the Hub would refuse is left out (the text has it still)."""
    source = record["source"]
    values: dict[str, Any] = {}
    bases = [name for name in record["base_models"] if HUB_ID.fullmatch(name)]
    if bases:
        values["base_model"] = bases[0] if len(bases) == 1 else bases
        values["base_model_relation"] = "quantized"
    values |= _licence(source)
    languages = [name for name in source["languages"] if _LANGUAGE.fullmatch(name)]
    if languages:
        values["language"] = languages
    quantize = record["recipe"]["quantize"]
    is_gguf = "gguf" in record["audit"]
    form = quantize.get("format", "compressed-tensors")
    tags = GGUF_TAGS if is_gguf else (form, *TAGS)
    values |= {
        "library_name": "gguf" if is_gguf else "transformers",
        "pipeline_tag": TASK["type"],
        "tags": list(
            dict.fromkeys([*quantize["method"].split("+"), quantize["scheme"].lower(), *tags])
        ),
        "quantized_by": "quantize",
    }
    results = _results(record)
    if results:
        values["model-index"] = [{"name": one_line(record["recipe"]["name"]), "results": results}]
    return values


def _licence(source: Mapping[str, Any]) -> dict[str, Any]:
    """Licence and the terms one agrees to, as the source's card has them.

    A link to a file of the source is kept where that file is published with this model.
    """
    values: dict[str, Any] = {}
    if isinstance(source["license"], str) and _LICENSE.fullmatch(source["license"]):
        values["license"] = source["license"]
    terms = dict(source["licence_terms"])
    link = terms.pop("license_link", "")
    carried = {file["name"] for file in source["files"] if file["name"].startswith("LICENSE")}
    if link in carried or _ADDRESS.fullmatch(link):
        terms["license_link"] = link
    return values | terms


def _results(record: Record) -> list[dict[str, Any]]:
    """One entry of the `model-index` for each text's perplexity and each task."""
    compare = record.get("compare")
    if compare is None:
        return []
    found = []
    for name in ("perplexity", "own_perplexity"):
        if name in compare and name in record["candidate"]:
            found.append(_perplexity(compare[name], record["candidate"][name]))
    tasks = {task["name"]: task for task in record["candidate"]["tasks"]}
    both = [delta for delta in compare["tasks"] if delta["name"] in tasks]
    return found + [_task(delta, tasks[delta["name"]]) for delta in both]


def _perplexity(delta: PerplexityDelta, text: Mapping[str, Any]) -> dict[str, Any]:
    name = one_line(text["text"])
    dataset = _dataset(name, PurePosixPath(name).stem, text.get("dataset", {}))
    value = _value(delta["candidate"])
    metric = {
        "type": "perplexity",
        "value": value,
        "name": f"Perplexity (BF16: {_value(delta['baseline'])})",
    }
    return {"task": TASK, "dataset": dataset, "metrics": [metric]}


def _task(delta: TaskDelta, task: Task) -> dict[str, Any]:
    name = one_line(task["name"])
    dataset = _dataset(name, name, task.get("dataset", {}))
    dataset["args"] = {"num_few_shot": task["num_fewshot"]}
    metric = {
        "type": _metric(delta["metric"]),
        "value": _value(delta["candidate"]),
        "name": f"{one_line(delta['metric'])} (BF16: {_value(delta['baseline'])})",
    }
    return {"task": TASK, "dataset": dataset, "metrics": [metric]}


def _dataset(name: str, local: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """`type` is the data set's id on the Hub; for local files their own name."""
    origin = {key: one_line(value) for key, value in origin.items()}
    path = origin.get("path", "")
    on_hub = HUB_ID.fullmatch(path) is not None
    found: dict[str, Any] = {"name": name, "type": path if on_hub else local}
    if on_hub and "config" in origin:
        found["config"] = origin["config"]
    if "split" in origin:
        found["split"] = origin["split"]
    return found


def _metric(name: str) -> str:
    """The Hub's word for lm-eval's `acc`; other metrics keep their name."""
    return "accuracy" if name == "acc" else one_line(name)


def _value(number: float) -> float:
    return round(number, DIGITS)


def eval_results(record: Record) -> dict[str, str]:
    """Name → text of the files for `.eval_results/`: benchmarks that were asked in full."""
    record = redact(record)
    if "compare" not in record:
        return {}
    tasks = {task["name"]: task for task in record["candidate"]["tasks"]}
    found = {}
    for delta in record["compare"]["tasks"]:
        benchmark, task = BENCHMARKS.get(delta["name"]), tasks.get(delta["name"])
        if (
            benchmark is None
            or task is None
            or task.get("dataset", {}).get("path") != benchmark.dataset
            or delta["metric"] != benchmark.metric
            or delta["documents"] != benchmark.documents
        ):
            continue
        entry = _entry(benchmark, delta, task, record)
        text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=1000)
        found[f"{delta['name']}.yaml"] = text
    return found


def _entry(benchmark: Benchmark, delta: TaskDelta, task: Task, record: Record) -> dict[str, Any]:
    shots = f"{task['num_fewshot']}-shot" + (", chat template" if task["chat_template"] else "")
    before = f"{benchmark.scale * delta['baseline']:.2f}"
    return {
        "dataset": {"id": benchmark.dataset, "task_id": benchmark.task_id},
        "value": round(benchmark.scale * delta["candidate"], 2),
        "notes": f"lm-eval {task['name']}, {shots}; {method_text(record)}; BF16: {before}",
    }
