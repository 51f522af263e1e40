"""One lm-eval task against a served model.

Runs in the lmeval environment. A task's `data_files` are relative to the folder of its YAML file.

Request body: `base_url` (of `/v1/completions`), `model` (served name), `tokenizer` (folder),
`task`, `metric`, `filter`, `num_fewshot`, `limit` (or null), `apply_chat_template`,
`concurrency`, `max_length`, `tasks_folder` (or null), `samples` (output file).
Result body: `score`, `standard_error`, `documents`, `version`, `prompts_sha256`, `versions`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Any

import tqdm

from quantize.protocol import Events, Request, WorkerError, worker_main, write_atomic


def run(request: Request, events: Events) -> dict[str, Any]:
    """Evaluate the task and write one line per document."""
    _report_progress(events, request.body["task"])
    import lm_eval
    from lm_eval.tasks import TaskManager

    body = request.body
    manager = TaskManager(include_path=body["tasks_folder"])
    if body["task"] not in manager.all_tasks:
        raise WorkerError(
            "SourceError",
            f"lm-eval {importlib.metadata.version('lm-eval')} knows no task {body['task']!r}",
            "correct the task's name in the suite, or put its YAML into the suite's tasks_folder",
        )
    if body["tasks_folder"]:  # datasets looks for local files from the working directory
        os.chdir(Path(manager.task_index[body["task"]].yaml_path).parent)
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": body["model"],
            "base_url": body["base_url"],
            "tokenizer": body["tokenizer"],
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "num_concurrent": body["concurrency"],
            "max_length": body["max_length"],
            "max_retries": 3,
        },
        tasks=[body["task"]],
        num_fewshot=body["num_fewshot"],
        limit=body["limit"],
        apply_chat_template=body["apply_chat_template"],
        log_samples=True,
        bootstrap_iters=0,
        task_manager=manager,
    )
    return _collect(body, results)


def _collect(body: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    rows, scores, prompts = [], [], hashlib.sha256()
    # A group task (MMLU) has subtasks, whose document ids begin anew.
    group = len(results["samples"]) > 1
    samples = [
        (f"{task}/" if group else "", sample)
        for task in sorted(results["samples"])
        for sample in results["samples"][task]
        if sample["filter"] == body["filter"]
    ]
    if not samples:
        known = sorted({s["filter"] for task in results["samples"].values() for s in task})
        raise WorkerError(
            "SourceError",
            f"task {body['task']} has no filter {body['filter']!r}",
            f"use one of {known} in the suite",
        )
    for prefix, sample in samples:
        prompt = json.dumps([_plain(request) for request in _arguments(sample)])
        prompts.update(prompt.encode())
        scores.append(_score(body, sample))
        rows.append(
            {
                "doc": prefix + str(sample["doc"].get("id", sample["doc_id"])),
                "group": str(sample["doc"].get("group", prefix)),
                "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
                "target": str(sample["target"]),
                "response": json.dumps(sample["filtered_resps"], ensure_ascii=False),
                "score": scores[-1],
            }
        )
    write_atomic(
        Path(body["samples"]), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    count = len(rows)
    mean = math.fsum(scores) / count
    variance = math.fsum((score - mean) ** 2 for score in scores) / max(count - 1, 1)
    return {
        "score": mean,
        "standard_error": math.sqrt(variance / count),
        "documents": count,
        "version": str(results["versions"].get(body["task"], "")),
        "prompts_sha256": prompts.hexdigest(),
        "versions": {"lm-eval": importlib.metadata.version("lm-eval")},
    }


def _score(body: dict[str, Any], sample: dict[str, Any]) -> float:
    try:
        score = float(sample[body["metric"]])
    except KeyError:
        raise WorkerError(
            "SourceError",
            f"task {body['task']} reports no metric {body['metric']!r} per document",
            f"use one of {sorted(sample.get('metrics', []))} in the suite",
        ) from None
    if not math.isfinite(score):
        raise WorkerError("ToolError", f"{body['task']}: score {score} at {sample['doc_id']}")
    return score


def _arguments(sample: dict[str, Any]) -> list[Any]:
    """lm-eval's rendered requests of one document: contexts and continuations."""
    arguments = sample["arguments"]
    return list(arguments.values()) if isinstance(arguments, dict) else list(arguments)


def _plain(value: Any) -> Any:
    """Only what JSON holds, so that a prompt's digest depends on its text alone."""
    if isinstance(value, dict):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _report_progress(events: Events, task: str) -> None:
    """Turn lm-eval's progress bars into events; they are looked up on the tqdm module."""

    def say(bar: Any) -> None:
        if bar.total and "request" in (bar.desc or "").lower():
            events.progress(f"task {task}", bar.n, bar.total, "requests")

    original = tqdm.tqdm.update

    def update(bar: Any, n: float | None = 1) -> bool | None:
        shown: bool | None = original(bar, n)
        say(bar)
        return shown

    tqdm.tqdm.update = update


if __name__ == "__main__":
    worker_main(run)
