"""Everything that is measured through one running server, in the order it is measured."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from quantize.errors import SourceError
from quantize.measure import health, perplexity, smoke
from quantize.measure.library import LibraryScorer
from quantize.measure.parts import Parts
from quantize.measure.scope import Scope
from quantize.measure.serving import SERVED_NAME, Running, describe, serve, special_tokens
from quantize.process import hub_token
from quantize.recipe_file import load_prompts
from quantize.records import MeasureRecord, Missing, Serving
from quantize.resolve import own_task_names
from quantize.servers import url
from quantize.stages.base import StageContext
from quantize.suite import PerplexityText, Suite, TaskRef


def measure(context: StageContext, scope: Scope, record: MeasureRecord, model: Path) -> None:
    """Serve `model` and fill in the record; parts of an earlier, killed run are taken over."""
    for environment in context.entry.environments:  # before a server waits for an install
        context.runner.python(environment)
    parts = Parts(context.work)
    with serve(context, scope, model) as running:
        record["server"] = describe(context, running)
        record["concurrency"] = running.concurrency
        if scope.everything:
            record["smoke"] = parts.get("smoke", lambda: _smoke(context, running))
            record["not_measured"] += _unasked(context, running)
        _texts(context, scope, running, parts, record)
        _tasks(context, scope.suite.tasks, running, parts, record)
        if scope.everything:
            _health(context, scope, running, parts, record)
            if running.limits.load is not None:
                missing = Missing(what="latency and throughput", why=running.limits.load)
                record["not_measured"].append(missing)
            elif "unpacked" not in record:
                load = functools.partial(_load, context, running, scope.suite)
                record["serving"] = parts.get("load", load)
        parts.seconds["server start"] = running.start_seconds
        context.versions[context.recipe.serve.engine] = record["server"]["version"]
    record["seconds"] = {name: round(value, 2) for name, value in parts.seconds.items()}
    record["versions"] = dict(context.versions)


def _texts(
    context: StageContext, scope: Scope, running: Running, parts: Parts, record: MeasureRecord
) -> None:
    """The suite's held-out text and the user's own, each with its tokens and its documents."""
    texts: tuple[tuple[Literal["", "own_"], PerplexityText | None], ...]
    texts = (("", scope.perplexity), ("own_", scope.own_text))
    for prefix, text in texts:
        if text is None:
            continue
        if (why := _unscored(running)) is not None:
            what = f"{prefix.replace('_', ' ')}perplexity and KL divergence"
            record["not_measured"].append(Missing(what=what, why=why))
            continue
        file = f"{prefix}token_logprobs"
        part = functools.partial(
            _perplexity, context, running, f"{prefix}text", text, f"{file}.npz"
        )
        record[f"{prefix}perplexity"] = parts.get(f"{prefix}perplexity", part)  # type: ignore[literal-required]
        for suffix in (".npz", ".jsonl"):
            _take(context, file + suffix, context.files)


def _unscored(running: Running) -> str | None:
    """Why nobody scores held-out text here, or None: the server does, or its library."""
    if running.limits.tokens is not None:
        return running.limits.tokens
    return running.limits.scores if running.backend.SCORER is None else None


def _tasks(
    context: StageContext,
    tasks: Sequence[TaskRef],
    running: Running,
    parts: Parts,
    record: MeasureRecord,
) -> None:
    """All tasks that are not finished yet, own ones and lm-eval's in a process each."""
    if not tasks:
        return
    if (why := running.limits.tasks) is not None:
        record["not_measured"].append(Missing(what="tasks", why=why))
        return
    _keep_finished(context, tasks, parts)
    folder = context.resolved.paths.get("tasks")
    own = own_task_names(folder) if folder is not None else set()
    for is_own in (True, False):
        waiting = [
            task
            for task in tasks
            if (task.name in own) == is_own and not parts.has(f"task:{task.name}")
        ]
        if waiting:
            try:
                _evaluate(context, running, waiting, is_own)
            finally:
                _keep_finished(context, waiting, parts)
    samples = context.files / "samples"
    samples.mkdir()
    for task in tasks:
        measured: Any = parts.value(f"task:{task.name}")
        if "cannot" in measured:
            record["not_measured"].append(Missing(what=f"task {task.name}", why=measured["cannot"]))
            continue
        context.versions.update(measured.pop("versions"))
        measured |= {
            "name": task.name,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "num_fewshot": task.num_fewshot,
            "chat_template": task.apply_chat_template,
        }
        record["tasks"].append(measured)
        _take(context, f"{task.name}.jsonl", samples)


def _keep_finished(context: StageContext, tasks: Sequence[TaskRef], parts: Parts) -> None:
    """What the worker has written of its tasks, also one that failed or was killed later."""
    for task in tasks:
        path = _result_file(context, task)
        if path.exists():
            parts.put(f"task:{task.name}", **json.loads(path.read_text(encoding="utf-8")))
            path.unlink()


def _result_file(context: StageContext, task: TaskRef) -> Path:
    return context.work / f"{task.name}.result.json"


def _health(
    context: StageContext, scope: Scope, running: Running, parts: Parts, record: MeasureRecord
) -> None:
    if scope.suite.health is None:
        return
    found = parts.get("health", lambda: _answers(context, scope, running))
    record["not_measured"] += found["not_measured"]
    if (why := running.limits.special) is not None:
        record["not_measured"].append(Missing(what="special tokens in answers", why=why))
    if "health" in found:
        record["health"] = found["health"]
        _take(context, "health.jsonl", context.files)


def _answers(context: StageContext, scope: Scope, running: Running) -> dict[str, Any]:
    """Generation health as a part: its rates, and what was refused."""
    assert scope.suite.health is not None
    step = context.runner.progress.step
    rates, refused = health.measure(
        running.client,
        health.read_prompts(context.resolved.paths["health"], scope.health_prompts),
        scope.suite.health.max_tokens,
        special_tokens(running.tokenizer) if running.limits.special is None else None,
        context.work / "health.jsonl",
        running.concurrency,
        lambda done, of: step("generation health", done, of, "prompts"),
    )
    return {"not_measured": refused} | ({"health": rates} if rates is not None else {})


def _smoke(context: StageContext, running: Running) -> Any:
    prompts = load_prompts(context.resolved.paths["prompts"])
    if running.limits.tokens is not None:  # nobody can tell how long a filler must be
        short = tuple(prompt for prompt in prompts.prompts if prompt.filler is None)
        prompts = prompts.model_copy(update={"prompts": short})
    special = special_tokens(running.tokenizer)
    step = context.runner.progress.step
    return smoke.measure(
        running.client, prompts, special, lambda done, of: step("smoke prompts", done, of)
    )


def _unasked(context: StageContext, running: Running) -> list[Missing]:
    """Smoke prompts of a given length in tokens, where the server does not count those."""
    why = running.limits.tokens
    if why is None:
        return []
    prompts = load_prompts(context.resolved.paths["prompts"]).prompts
    long = [prompt.name for prompt in prompts if prompt.filler is not None]
    return [Missing(what=f"smoke prompt {name}", why=why) for name in long]


def _perplexity(
    context: StageContext, running: Running, name: str, text: PerplexityText, output: str
) -> Any:
    """Score the text that the resolved inputs call `name`."""
    path = _text_file(context, name, text)
    step = context.runner.progress.step
    what = "held-out text" if name == "text" else "own text"
    library = None
    score = perplexity.through(running.client, running.concurrency)
    if running.limits.scores is not None:
        score = library = LibraryScorer(context, running, name.replace("_", "-"))
    found = perplexity.measure(
        running.client,
        text,
        path,
        context.work / output,
        score,
        lambda done, of: step(what, done, of, "windows"),
    )
    if library is not None and library.agreement is not None:
        found["scored_by"] = library.agreement
    return found


def _text_file(context: StageContext, name: str, text: PerplexityText) -> Path:
    """A local file, or the Hub data set's column written to one."""
    if name in context.resolved.paths:
        return context.resolved.paths[name]
    output = context.work / f"{name}.jsonl"
    keys = {"text": "perplexity.field in the suite", "own_text": "evaluate.text.field"}
    body = text.model_dump(mode="json") | {
        "output": str(output),
        "revision": context.resolved.commit(name),
        "key": keys[name],
    }
    label = f"{context.entry.id}-{name.replace('_', '-')}"
    context.runner.worker("lmeval", "texts", body, work=context.work, label=label, env=hub_token())
    return output


def _evaluate(context: StageContext, running: Running, tasks: Sequence[TaskRef], own: bool) -> None:
    """One worker for these tasks; each leaves its result in a file."""
    folder = context.resolved.paths.get("tasks")
    body = {
        "base_url": f"{running.client.base_url}/v1/completions",
        "model": running.client.model,
        "tokenizer": str(running.tokenizer),
        "concurrency": running.concurrency,
        "max_length": running.client.max_model_len(),
        "tasks_folder": str(folder) if folder else None,
        "trust_remote_code": context.recipe.model.trust_remote_code is not None,
        "no_choices": running.limits.choices,
        "tasks": [
            task.model_dump(mode="json", exclude={"name", "higher_is_better"})
            | {
                "task": task.name,
                "samples": str(context.work / f"{task.name}.jsonl"),
                "result": str(_result_file(context, task)),
            }
            for task in tasks
        ],
    }
    # Own tasks read local files: their cache is ours, and no hub is asked.
    local = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(context.work / "datasets")}
    label = f"{context.entry.id}-{'own-tasks' if own else 'tasks'}"
    env = (local if own else hub_token()) | endpoint_key(context)
    context.runner.worker(
        "lmeval",
        "evaluate",
        body,
        work=context.work,
        label=label,
        env=env,
        server=running.process,
    )


def endpoint_key(context: StageContext) -> dict[str, str]:
    """The key of the endpoint that is asked, under the name that lm-eval reads."""
    endpoints = context.recipe.serve.endpoints
    if endpoints is None:
        return {}
    candidate = context.entry.id == "measure-candidate"
    key = url.api_key(endpoints.candidate if candidate else endpoints.baseline)
    return {"OPENAI_API_KEY": key} if key is not None else {}


def _load(context: StageContext, running: Running, suite: Suite) -> Serving:
    load, launch = suite.load, running.launch
    assert launch is not None, "the load is for a server of ours"
    values = context.runner.worker(
        "vllm",
        "load",
        load.model_dump(mode="json")
        | {
            "port": running.port,
            "model": SERVED_NAME,
            "tokenizer": str(running.tokenizer),
            "seed": 0,
            "trust_remote_code": context.recipe.model.trust_remote_code is not None,
        },
        work=context.work,
        label=f"{context.entry.id}-load",
        server=running.process,
        env={"HF_HUB_OFFLINE": "1", **running.backend.variables(launch)},
    )
    metrics = running.client.metrics()
    serving: Serving = {
        **load.model_dump(mode="json"),  # type: ignore[typeddict-item]
        "time_to_first_token_ms_median": values["median_ttft_ms"],
        "time_to_first_token_ms_p99": values["p99_ttft_ms"],
        "time_per_output_token_ms_median": values["median_tpot_ms"],
        "output_tokens_per_second": values["output_throughput"],
        "requests_per_second": values["request_throughput"],
        "prometheus": {name: metrics[name] for name in running.backend.COUNTERS if name in metrics},
    }
    if running.kv_cache_tokens is not None:
        serving["kv_cache_tokens"] = running.kv_cache_tokens
    return serving


def _take(context: StageContext, name: str, folder: Path) -> None:
    """Copy a finished part's file into the artifact; it stays in `work` for a later resume."""
    source = context.work / name
    if not source.exists():
        raise SourceError(f"{source} is missing", "delete the folder and run the command again")
    shutil.copyfile(source, folder / name)
