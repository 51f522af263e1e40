"""Everything that is measured through one running server, in the order it is measured."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checkpoint import model_folder
from quantize.errors import SourceError
from quantize.machine import device_name
from quantize.measure import perplexity, smoke
from quantize.measure.client import Client
from quantize.measure.parts import Parts
from quantize.model_files import read_json_object
from quantize.process import Process, hub_token
from quantize.recipe_file import load_prompts
from quantize.records import MeasureRecord, Server, Serving
from quantize.resolve import own_task_names
from quantize.servers import SERVERS
from quantize.servers.base import Launch
from quantize.stages.base import StageContext
from quantize.suite import PerplexityText, Suite, TaskRef

SERVED_NAME = "model"
PROMETHEUS = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)
"""Counters that say how the server was used, kept as they stood at the end."""


@dataclass
class Running:
    """A server that answers."""

    client: Client
    process: Process
    port: int
    launch: Launch
    start_seconds: float


def measure(context: StageContext, suite: Suite, record: MeasureRecord) -> None:
    """Fill in the record; a part that an earlier, killed run has finished is taken over."""
    for environment in context.entry.environments:  # before a server waits for an install
        context.runner.python(environment)
    parts = Parts(context.work)
    samples = context.files / "samples"
    with _server(context, suite) as running:
        concurrency = context.recipe.serve.max_num_seqs
        record["server"] = _describe(context, running)
        record["smoke"] = parts.get("smoke", lambda: _smoke(context, running))
        if suite.perplexity is not None:
            record["perplexity"] = parts.get(
                "perplexity", lambda: _perplexity(context, running, concurrency)
            )
            _take(context, "token_logprobs.npz", context.files)
        if suite.tasks:
            samples.mkdir()
        for task in suite.tasks:
            result = parts.get(
                f"task:{task.name}",
                lambda: _task(context, running, task, concurrency),  # noqa: B023
            )
            context.versions.update(result.pop("versions"))
            record["tasks"].append(result)
            _take(context, f"{task.name}.jsonl", samples)
        record["serving"] = parts.get("load", lambda: _load(context, running, suite))
        parts.seconds["server start"] = running.start_seconds
        context.versions[context.recipe.serve.engine] = record["server"]["version"]
    record["seconds"] = {name: round(value, 2) for name, value in parts.seconds.items()}
    record["versions"] = dict(context.versions)


@contextmanager
def _server(context: StageContext, suite: Suite) -> Iterator[Running]:
    backend = SERVERS[context.recipe.serve.engine]
    top_k = suite.perplexity.top_k if suite.perplexity else 1
    launch = Launch(
        python=context.runner.python(backend.ENVIRONMENT),
        model=model_folder(context.inputs["model"]),
        served_name=SERVED_NAME,
        port=_free_port(),
        accelerator=context.resolved.accelerator,
        serve=context.recipe.serve,
        max_logprobs=top_k,
    )
    label = f"{context.entry.id}-server"
    command, variables = backend.command(launch), backend.variables(launch)
    with context.runner.process(command, label, env=variables) as process:
        client = Client(f"http://127.0.0.1:{launch.port}", SERVED_NAME)
        seconds = context.runner.wait_until(
            process, client.healthy, "vLLM server", backend.START_SECONDS, backend.explain
        )
        runner = context.runner
        try:
            with runner.tool(label), runner.blaming(process, "vLLM server", backend.explain):
                yield Running(client, process, launch.port, launch, seconds)
        finally:
            client.close()


def _smoke(context: StageContext, running: Running) -> Any:
    prompts = load_prompts(context.resolved.paths["prompts"])
    special = _special_tokens(running.launch.model)
    step = context.runner.progress.step
    return smoke.measure(
        running.client, prompts, special, lambda done, of: step("smoke prompts", done, of)
    )


def _perplexity(context: StageContext, running: Running, concurrency: int) -> Any:
    suite = context.resolved.suite
    assert suite is not None
    text = suite.perplexity
    assert text is not None
    step = context.runner.progress.step
    path = _text_file(context, text)
    return perplexity.measure(
        running.client,
        text,
        path,
        context.work / "token_logprobs.npz",
        concurrency,
        lambda done, of: step("held-out text", done, of, "windows"),
    )


def _text_file(context: StageContext, text: PerplexityText) -> Path:
    """The suite's own file, or the Hub data set's column written to one."""
    if "text" in context.resolved.paths:
        return context.resolved.paths["text"]
    output = context.work / "held-out.jsonl"
    commit = context.resolved.commit("text")
    body = text.model_dump(mode="json") | {"output": str(output), "revision": commit}
    context.runner.worker(
        "lmeval", "texts", body, work=context.work, label="held-out-text", env=hub_token()
    )
    return output


def _task(
    context: StageContext, running: Running, task: TaskRef, concurrency: int
) -> dict[str, Any]:
    own_tasks = context.resolved.paths.get("tasks")
    label = f"{context.entry.id}-{task.name}"
    body = task.model_dump(mode="json", exclude={"name", "higher_is_better"}) | {
        "task": task.name,
        "base_url": f"{running.client.base_url}/v1/completions",
        "model": SERVED_NAME,
        "tokenizer": str(running.launch.model),
        "concurrency": concurrency,
        "max_length": running.client.max_model_len(),
        "tasks_folder": str(own_tasks) if own_tasks else None,
        "samples": str(context.work / f"{task.name}.jsonl"),
    }
    # Own tasks read local files: their cache is ours, and no hub is asked.
    local = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(context.work / "datasets")}
    own = own_tasks is not None and task.name in own_task_names(own_tasks)
    result = context.runner.worker(
        "lmeval",
        "evaluate",
        body,
        work=context.work,
        label=label,
        env=local if own else hub_token(),
    )
    return {
        "name": task.name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "num_fewshot": task.num_fewshot,
        "chat_template": task.apply_chat_template,
        **result,
    }


def _load(context: StageContext, running: Running, suite: Suite) -> Serving:
    load = suite.load
    values = context.runner.worker(
        "vllm",
        "load",
        load.model_dump(mode="json")
        | {
            "port": running.port,
            "model": SERVED_NAME,
            "tokenizer": str(running.launch.model),
            "seed": 0,
        },
        work=context.work,
        label=f"{context.entry.id}-load",
        env={"HF_HUB_OFFLINE": "1", **SERVERS["vllm"].variables(running.launch)},
    )
    metrics = running.client.metrics()
    serving: Serving = {
        **load.model_dump(mode="json"),  # type: ignore[typeddict-item]
        "time_to_first_token_ms_median": values["median_ttft_ms"],
        "time_to_first_token_ms_p99": values["p99_ttft_ms"],
        "time_per_output_token_ms_median": values["median_tpot_ms"],
        "output_tokens_per_second": values["output_throughput"],
        "requests_per_second": values["request_throughput"],
        "prometheus": {name: metrics[name] for name in PROMETHEUS if name in metrics},
    }
    backend = SERVERS[context.recipe.serve.engine]
    tokens = backend.kv_cache_tokens(metrics, running.process.output())
    if tokens is not None:
        serving["kv_cache_tokens"] = tokens
    return serving


def _describe(context: StageContext, running: Running) -> Server:
    """The server as it answered; paths and the port stand as placeholders."""
    hidden = {
        str(running.launch.python): "python",
        str(running.launch.model): "MODEL",
        str(running.port): "PORT",
    }
    return {
        "name": context.recipe.serve.engine,
        "version": running.client.version(),
        "command": [hidden.get(part, part) for part in running.process.command],
        "accelerator": context.resolved.accelerator,
        "device": device_name(context.resolved.accelerator),
        "start_seconds": round(running.start_seconds, 2),
    }


def _special_tokens(model: Path) -> list[str]:
    """Texts of the tokenizer's special tokens, from `tokenizer.json`."""
    path = model / "tokenizer.json"
    if not path.exists():
        return []
    added = read_json_object(path).get("added_tokens", [])
    return [str(token["content"]) for token in added if token.get("special")]


def _take(context: StageContext, name: str, folder: Path) -> None:
    """Copy a finished part's file into the artifact; it stays in `work` for a later resume."""
    source = context.work / name
    if not source.exists():
        raise SourceError(f"{source} is missing", "delete the folder and run the command again")
    shutil.copyfile(source, folder / name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
