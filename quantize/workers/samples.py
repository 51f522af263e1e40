"""lm-eval's logged samples as one line a document: what was asked, answered and scored.

Standard library only; :mod:`quantize.workers.evaluate` runs it in the lmeval environment.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.protocol import WorkerError, write_atomic


def collect(body: dict[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the lines and return the figures; `answers` are lm-eval's results, one a repeat.

    A document's score is the mean over the repeats; prompt and response are those of the first.
    """
    repeats = [_rows(body, results) for results in answers]
    rows = repeats[0]
    for position, row in enumerate(rows):
        again = [repeat[position] for repeat in repeats]
        if {other["doc"] for other in again} != {row["doc"]}:
            raise WorkerError("ToolError", f"task {body['task']}: the repeats differ in documents")
        row["scores"] = [other["score"] for other in again]
        row["score"] = math.fsum(row["scores"]) / len(again)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(Path(body["samples"]), "".join(lines))
    prompts = hashlib.sha256("".join(row["prompt_sha256"] for row in rows).encode())
    clusters = {row["cluster"] for row in rows} - {""}
    scores = [row["score"] for row in rows]
    figures = {
        "score": math.fsum(scores) / len(scores),
        "standard_error": standard_error(scores, [row["cluster"] for row in rows]),
        "documents": len(rows),
        "repeats": len(repeats),
        "version": str(answers[0]["versions"].get(body["task"], "")),
        "prompts_sha256": prompts.hexdigest(),
    }
    return figures | ({"clusters": len(clusters)} if clusters else {})


def standard_error(scores: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of the mean; documents of one cluster are not independent of each other.

    √(G/(G-1) Σ_g (Σ_{i in g} (s_i - mean))²) / n over the G clusters, which without clusters ("")
    is the usual s/√n. Miller, "Adding Error Bars to Evals", arXiv:2411.00640, section 2.2.
    """
    mean = math.fsum(scores) / len(scores)
    sums: dict[str | int, float] = defaultdict(float)
    for position, (score, cluster) in enumerate(zip(scores, clusters, strict=True)):
        sums[cluster or position] += score - mean
    few = max(len(sums) - 1, 1)
    return math.sqrt(len(sums) / few * math.fsum(value**2 for value in sums.values())) / len(scores)


def _rows(body: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    # A group task (MMLU) has subtasks, whose document ids begin anew.
    group = len(results["samples"]) > 1
    samples = [
        (task if group else "", sample)
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
    return [_row(body, subtask, sample) for subtask, sample in samples]


def _row(body: dict[str, Any], subtask: str, sample: dict[str, Any]) -> dict[str, Any]:
    document = sample["doc"] if isinstance(sample["doc"], dict) else {}
    prefix = f"{subtask}/" if subtask else ""
    name = prefix + str(document.get("id", sample["doc_id"]))
    requests = _requests(sample)
    rendered = json.dumps([_plain(request) for request in requests])
    return {
        "doc": name,
        "group": str(document.get("group", subtask)),
        "cluster": _cluster(body, subtask, document, name),
        "prompt": "\n\n".join(dict.fromkeys(str(request[0]) for request in requests)),
        "prompt_sha256": hashlib.sha256(rendered.encode()).hexdigest(),
        "target": str(sample["target"]),
        "response": _response(body, sample, requests, name),
        "score": _score(body, sample, name),
    }


def _cluster(body: dict[str, Any], subtask: str, document: dict[str, Any], name: str) -> str:
    field = body["cluster"]
    if field is None:
        return subtask
    if document.get(field) is None:
        raise WorkerError(
            "SourceError",
            f"task {body['task']}, document {name}: it has no field {field!r}, the task's cluster",
            f"use one of {sorted(document)} in the suite",
        )
    return f"{subtask}/{document[field]}" if subtask else str(document[field])


def _response(
    body: dict[str, Any], sample: dict[str, Any], requests: list[list[Any]], name: str
) -> str:
    """What came back, for people: the text, or each choice with its log-probability in nats.

    Where lm-eval's filter took something out of a text, that stands in a line of its own.
    """
    answers: list[Any] = [given[0] if given else None for given in sample["resps"]]
    filtered = sample["filtered_resps"]
    if not answers or any(answer is None for answer in answers) or len(filtered) != len(answers):
        raise WorkerError(
            "ToolError",
            f"task {body['task']}, document {name}: the server gave no answer",
            "run the same command again; finished parts are not repeated",
        )
    if isinstance(answers[0], str):
        taken = "" if filtered[0] == answers[0].strip() else f"\n\n[{body['filter']}] {filtered[0]}"
        return answers[0] + taken
    if isinstance(answers[0], list | tuple) and all(len(request) > 1 for request in requests):
        best = max(range(len(answers)), key=lambda choice: answers[choice][0])
        return "\n".join(
            f"{'>' if number == best else ' '} {answer[0]:.3f} {request[1]}"
            for number, (answer, request) in enumerate(zip(answers, requests, strict=True))
        )
    return json.dumps(_plain(filtered), ensure_ascii=False)


def _score(body: dict[str, Any], sample: dict[str, Any], name: str) -> float:
    where = f"task {body['task']}, document {name}"
    try:
        score = float(sample[body["metric"]])
    except KeyError:
        raise WorkerError(
            "SourceError",
            f"task {body['task']} reports no metric {body['metric']!r} per document",
            f"use one of {sorted(sample.get('metrics', []))} in the suite",
        ) from None
    except (TypeError, ValueError):
        raise WorkerError(
            "SourceError",
            f"{where}: {body['metric']} is {sample[body['metric']]!r}, not one number",
            "choose a metric of the task that is a number for each document",
        ) from None
    if not math.isfinite(score):
        raise WorkerError(
            "ToolError",
            f"{where}: {body['metric']} is {score}",
            "the server's log-probabilities are not numbers: look for damaged weights",
        )
    return score


def _requests(sample: dict[str, Any]) -> list[list[Any]]:
    """lm-eval's rendered requests of one document, each a context and what goes with it."""
    return [list(request) for request in sample["arguments"]]


def _plain(value: Any) -> Any:
    """Only what JSON holds, so that a prompt's digest depends on its text alone."""
    if isinstance(value, dict):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
