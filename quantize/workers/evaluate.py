"""lm-eval tasks against a served model, all in one process: its imports take seconds.

Runs in the lmeval environment. A task's `data_files` are relative to the folder of its YAML file.

Request body: `base_url` (of `/v1/completions`), `model` (served name), `tokenizer` (folder),
`concurrency`, `max_length`, `tasks_folder` (or null), `no_choices` (why the server scores no
choices, or null), and `tasks`, each with `task`, `metric`,
`filter`, `num_fewshot`, `limit` (or null), `apply_chat_template`, `repeats`, `temperature` (or
null), `cluster` (or null), `samples` and `result` (output files).
A task's result is written when it is finished, whatever becomes of the next: `seconds`, and `value`
with `score`, `standard_error`, `documents`, `repeats`, `clusters` (where there are any), `version`,
`prompts_sha256`, `versions`, `dataset`; or `cannot`, the reason, for a task that scores choices
where the server does not. The result body is empty.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tqdm

from quantize.protocol import Events, Request, WorkerError, worker_main, write_json
from quantize.workers.samples import collect

SEED = 1234
"""Of the first time that a sampled task is asked; the next one's is one more."""
TIMEOUT_SECONDS = 3600
"""Of a request: on a full server most of it is waiting for the ones before."""
AGAIN = "run the same command again; finished parts are not repeated"


def run(request: Request, events: Events) -> dict[str, Any]:
    """Evaluate the tasks in order; each writes one line per document, and its result."""
    shared = {key: value for key, value in request.body.items() if key != "tasks"}
    versions = {"lm-eval": importlib.metadata.version("lm-eval")}
    progress = _Progress(events)
    manager = _manager(shared["tasks_folder"])
    for task in request.body["tasks"]:
        started = time.monotonic()
        progress.task = task["task"]
        value = _evaluate(shared | task, manager) | {"versions": versions}
        seconds = time.monotonic() - started
        write_json(Path(task["result"]), {"value": value, "seconds": seconds})
    return {}


def _manager(folder: str | None) -> Any:
    """lm-eval's index of its own tasks and those of the suite's folder."""
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=folder)
    except OSError as error:
        raise WorkerError("SourceError", f"{folder}: {error}") from error


def _evaluate(body: dict[str, Any], manager: Any) -> dict[str, Any]:
    """One task: its result, and its samples in a file."""
    if body["task"] not in manager.all_tasks:
        raise WorkerError(
            "SourceError",
            f"lm-eval {importlib.metadata.version('lm-eval')} knows no task {body['task']!r}",
            "correct the task's name in the suite, or put its YAML into the suite's tasks_folder",
        )
    if body["tasks_folder"]:  # datasets looks for local files from the working directory
        os.chdir(Path(manager.task_index[body["task"]].yaml_path).parent)
    with _explained(body["task"]):
        loaded = manager.load([body["task"]])
        if (why := cannot(body, loaded["tasks"])) is not None:
            return {"cannot": why}
        check_documents(body, loaded["tasks"])
        group = loaded.get("groups", {}).get(body["task"])
        tasks = [group] if group is not None else list(loaded["tasks"].values())
        answers = [_ask(body, tasks, manager, SEED + number) for number in range(body["repeats"])]
    return collect(body, answers) | {"dataset": dataset(loaded["tasks"])}


def cannot(body: dict[str, Any], tasks: dict[str, Any]) -> str | None:
    """Why the server cannot be asked these tasks, or None: those that generate text it can."""
    scoring = [name for name, task in tasks.items() if task.OUTPUT_TYPE != "generate_until"]
    if not scoring or body["no_choices"] is None:
        return None
    return f"{', '.join(scoring)} scores given answers: {body['no_choices']}"


def dataset(tasks: dict[str, Any]) -> dict[str, str]:
    """What a task's documents come from, as far as all its subtasks share it.

    `path` (a data set on the Hub, or the name of a file format for local files), `config`, `split`.
    """
    found = []
    for task in tasks.values():
        config = task.config
        split = config.test_split if task.has_test_docs() else config.validation_split
        values = {"path": config.dataset_path, "config": config.dataset_name, "split": split}
        found.append(values)
    return {
        key: str(value)
        for key, value in found[0].items()
        if value and all(other[key] == value for other in found)
    }


def _ask(body: dict[str, Any], tasks: list[Any], manager: Any, seed: int) -> dict[str, Any]:
    """lm-eval's results of the task, every document asked once."""
    import lm_eval

    temperature = body["temperature"]
    sampled = None if temperature is None else {"do_sample": True, "temperature": temperature}
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": body["model"],
            "base_url": body["base_url"],
            "tokenizer": body["tokenizer"],
            "tokenizer_backend": "huggingface",
            "trust_remote_code": body.get("trust_remote_code", False),
            "tokenized_requests": True,
            "num_concurrent": body["concurrency"],
            "max_length": body["max_length"],
            "max_retries": 3,
            "timeout": TIMEOUT_SECONDS,
            "seed": seed,
        },
        tasks=tasks,
        num_fewshot=body["num_fewshot"],
        limit=body["limit"],
        apply_chat_template=body["apply_chat_template"],
        gen_kwargs=sampled,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=manager,
    )
    return results


def check_documents(body: dict[str, Any], tasks: dict[str, Any]) -> None:
    """Render every document before the first is asked: a missing field or answer is an error.

    lm-eval scores a document whose answer is null, or not among its choices, as wrong.
    """
    for name, task in tasks.items():
        if body["temperature"] is not None and task.OUTPUT_TYPE != "generate_until":
            raise WorkerError(
                "SourceError",
                f"task {name} does not generate text: it cannot be sampled",
                "remove temperature and repeats from the task in the suite",
            )
        documents = task.doc_iterator(rank=0, limit=body["limit"], world_size=1)
        for number, document in documents:
            problem = _problem(task, document)
            if problem:
                known = document.get("id", number) if isinstance(document, dict) else number
                raise WorkerError(
                    "SourceError",
                    f"task {name}, document {known}: {problem}",
                    "correct the document, or the fields that the task's YAML file names",
                )


def _problem(task: Any, document: Any) -> str:
    """What is wrong with a document as the task reads it, or ""."""
    from jinja2 import UndefinedError

    try:
        text, target = task.doc_to_text(document), task.doc_to_target(document)
        choices = None
        if task.OUTPUT_TYPE == "multiple_choice" and getattr(task.config, "doc_to_choice", None):
            choices = task.doc_to_choice(document)
    except (UndefinedError, KeyError, IndexError, TypeError, ValueError) as error:
        return f"it has not what the task asks for: {type(error).__name__}: {error}"
    if _is_missing(task, document, target):
        return "it has no answer"
    if choices is not None:
        gold = text if getattr(task, "multiple_input", 0) else target
        right = gold if isinstance(gold, list) else [gold]
        known = range(len(choices))
        if not all(one in known if isinstance(one, int) else one in choices for one in right):
            return f"its answer {gold!r} is none of its {len(choices)} choices"
    return ""


def _is_missing(task: Any, document: Any, target: Any) -> bool:
    """Whether the answer is null; a template writes that as the word None."""
    if target is None:
        return True
    from jinja2 import Environment, meta

    template = task.config.doc_to_target
    if not isinstance(template, str) or not isinstance(document, dict):
        return False
    fields = meta.find_undeclared_variables(Environment().parse(template)) or {template}
    null = any(name in document and document[name] is None for name in fields)
    return null and "None" in str(target)


@contextmanager
def _explained(task: str) -> Iterator[None]:
    """What lm-eval raises, as an error that names the task and what to do."""
    import aiohttp
    import requests
    from jinja2 import UndefinedError

    said = _LastRefusal()
    logger = logging.getLogger("lm_eval.models.api_models")
    logger.addHandler(said)
    try:
        yield
    except (aiohttp.ClientResponseError, requests.HTTPError) as error:
        raise _refused(task, said.text or str(error)) from error
    except (aiohttp.ClientError, TimeoutError, requests.ConnectionError, ConnectionError) as error:
        raise WorkerError(
            "TransientError",
            f"task {task}: no connection: {type(error).__name__}: {error}",
            AGAIN,
        ) from error
    except FileNotFoundError as error:
        raise WorkerError(
            "SourceError",
            f"task {task}: its data are not there: {error}",
            "correct data_files in the task's YAML file; paths start at its folder",
        ) from error
    except (UndefinedError, KeyError) as error:
        raise WorkerError(
            "SourceError",
            f"task {task}: a document has not what the task asks for: "
            f"{type(error).__name__}: {error}",
            "correct the documents, or the fields that the task's YAML file names",
        ) from error
    finally:
        logger.removeHandler(said)


class _LastRefusal(logging.Handler):
    """Keeps the text of the server's last refusal, which lm-eval logs and does not raise."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Remember it."""
        message = record.getMessage()
        if "API request failed" in message:
            self.text = message.removesuffix(". Retrying...")[:1000]


def _refused(task: str, reason: str) -> WorkerError:
    if "not JSON compliant" in reason:  # how vLLM answers when a log-probability is NaN
        return WorkerError(
            "ToolError",
            f"task {task}: the server computes log-probabilities that are not numbers",
            "the checkpoint's activations overflow or are NaN: look for damaged weights",
        )
    kind = "SourceError" if "Status code: 400" in reason or "400 Client" in reason else "ToolError"
    return WorkerError(kind, f"task {task}: the server refuses a request: {reason}")


class _Progress:
    """Turns lm-eval's progress bars into events of the task at hand."""

    def __init__(self, events: Events) -> None:
        self.task = ""
        original = tqdm.tqdm.update  # looked up on the module by everyone who shows a bar

        def update(bar: Any, n: float | None = 1) -> bool | None:
            shown: bool | None = original(bar, n)
            what = getattr(bar, "desc", None) or ""  # a bar that is not shown has none
            if bar.total and "request" in what.lower():
                events.progress(f"task {self.task}", bar.n, bar.total, "requests")
            return shown

        tqdm.tqdm.update = update


if __name__ == "__main__":
    worker_main(run)
