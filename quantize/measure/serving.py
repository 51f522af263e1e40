"""A running server: started, described, ended; and how many requests keep it full."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from quantize import records
from quantize.adapter import adapter_folder, tokenizer_folder
from quantize.checkpoint import model_folder, read_checkpoint
from quantize.errors import ResourceError
from quantize.machine import device_name
from quantize.measure.client import MAX_CONNECTIONS, Client, Limits
from quantize.measure.port import held_port
from quantize.measure.scope import Scope
from quantize.measure.watching import ServerWatch
from quantize.model_files import read_json_object
from quantize.process import Process
from quantize.remote_code import LET_IN
from quantize.servers import SERVERS, url
from quantize.servers.base import Launch, ServedAdapter, Server, explain, kv_cache_tokens
from quantize.servers.support import LABELS
from quantize.serving import Endpoint
from quantize.stages.base import StageContext

SERVED_NAME = "model"
BASE_NAME = "base"
"""What the server calls a base whose adapter has the served name; nobody asks it."""

TASK_TOKENS = 2048
"""A long task request: 25 worked examples, or a question and its chain of thought."""


@dataclass
class Running:
    """A server that answers; `process` and `launch` are absent where somebody else started it."""

    backend: Server
    client: Client
    limits: Limits
    process: Process | None
    port: int
    launch: Launch | None
    tokenizer: Path  # the folder of the tokenizer and chat template that prompts are made with
    start_seconds: float
    concurrency: int  # requests under way at once
    kv_cache_tokens: int | None


@contextmanager
def serve(context: StageContext, scope: Scope, model: Path) -> Iterator[Running]:
    """Serve `model` until the block is left; failures inside blame a dead server."""
    endpoints = context.recipe.serve.endpoints
    if endpoints is not None:
        candidate = context.entry.id == "measure-candidate"
        with _asked(context, endpoints.candidate if candidate else endpoints.baseline) as running:
            yield running
        return
    with held_port() as port, _serve(context, scope, model, port) as running:
        yield running


@contextmanager
def _asked(context: StageContext, endpoint: Endpoint) -> Iterator[Running]:
    """An endpoint that is up; whose process it is, nobody here knows."""
    serve = context.recipe.serve
    client = url.connect(endpoint, serve.max_model_len)
    backend, tokenizer = SERVERS[url.NAME], model_folder(context.inputs["fetch"])
    try:
        limits = client.limits()
        many = serve.max_num_seqs
        yield Running(backend, client, limits, None, 0, None, tokenizer, 0.0, many, None)
    finally:
        client.close()


@contextmanager
def _serve(context: StageContext, scope: Scope, model: Path, port: int) -> Iterator[Running]:
    backend = SERVERS[context.recipe.serve.engine]
    launch = _launch(context, scope, backend, model, port)
    label, what = f"{context.entry.id}-server", f"{LABELS[backend.NAME]} server"
    command, variables = backend.command(launch), backend.variables(launch)
    variables["HF_MODULES_CACHE"] = str(context.work / "code")
    with context.runner.process(command, label, env=variables) as process:
        client = backend.client(f"http://127.0.0.1:{launch.port}", SERVED_NAME)
        seconds = context.runner.wait_until(
            process,
            client.healthy,
            what,
            replace(context.runner.patience, silent_seconds=backend.START_SECONDS),
            partial(explain, backend),
        )
        runner = context.runner
        try:
            with (
                runner.tool(label),
                runner.blaming(process, what, partial(explain, backend)),
                ServerWatch(process, client, what, runner.patience),
            ):
                client.prepare(model, launch.context_tokens)
                tokens = kv_cache_tokens(backend, process.output())
                longest = longest_request(scope, client.max_model_len())
                many = concurrency(context.recipe.serve.max_num_seqs, tokens, longest)
                limits, tokenizer = client.limits(), launch.tokenizer or launch.model
                yield Running(
                    *(backend, client, limits, process, launch.port, launch, tokenizer),
                    *(seconds, many, tokens),
                )
        finally:
            client.close()


def _launch(context: StageContext, scope: Scope, backend: Server, model: Path, port: int) -> Launch:
    adapter = _adapter(context, scope)
    texts = [text for text in (scope.perplexity, scope.own_text) if text is not None]
    return Launch(
        program=program(backend, context.runner.python),
        model=model,
        served_name=BASE_NAME if adapter is not None else SERVED_NAME,
        port=port,
        accelerator=context.resolved.accelerator,
        serve=context.recipe.serve,
        max_logprobs=max((text.top_k for text in texts), default=1),
        tokenizer=_tokenizer(context, scope, backend),
        adapter=adapter,
        trust_remote_code=context.recipe.model.trust_remote_code is not None,
        context_tokens=context.recipe.serve.max_model_len or _trained(context, backend),
        scratch=context.work,
    )


def program(backend: Server, python: Callable[[str], Path]) -> Path:
    """What is started: an environment's interpreter, or an executable of the user's PATH."""
    if backend.ENVIRONMENT is not None:
        return python(backend.ENVIRONMENT)
    found = shutil.which(backend.PROGRAM or "")
    if found is None:
        raise ResourceError(
            f"there is no {backend.PROGRAM} here, which is {LABELS[backend.NAME]}", backend.INSTALL
        )
    return Path(found)


def _trained(context: StageContext, backend: Server) -> int | None:
    """Positions that the checkpoint was trained for; GGUF servers are told, the others read it."""
    if backend.READS != "gguf":
        return None
    checkpoint = read_checkpoint(model_folder(context.inputs["fetch"]), code=LET_IN)
    return checkpoint.dimension("max_position_embeddings")


def _adapter(context: StageContext, scope: Scope) -> ServedAdapter | None:
    """An adapter that is kept apart, for every measurement but that of the model it began from."""
    artifact = context.inputs.get("adapter")
    if artifact is None or scope.foreign_tokenizer:
        return None
    said = artifact.json("adapter.json")
    folder, targets = adapter_folder(artifact), tuple(said["targets"])
    return ServedAdapter(SERVED_NAME, folder, int(said["rank"]), targets)


def _tokenizer(context: StageContext, scope: Scope, backend: Server) -> Path | None:
    """The fine-tune's tokenizer, where the served folder has another, or none that tools read."""
    artifact = context.inputs.get("adapter")
    brought = tokenizer_folder(artifact) if artifact is not None else None
    if brought is None and (scope.foreign_tokenizer or backend.READS == "gguf"):
        return model_folder(context.inputs["fetch"])
    return brought


def longest_request(scope: Scope, max_model_len: int) -> int:
    """Tokens of prompt and answer of the longest requests, as far as they are known beforehand."""
    lengths = [text.window + 1 for text in (scope.perplexity, scope.own_text) if text is not None]
    lengths += [TASK_TOKENS] if scope.suite.tasks else []
    return min(max(lengths, default=TASK_TOKENS), max_model_len)


def concurrency(max_num_seqs: int, kv_cache_tokens: int | None, longest: int) -> int:
    """Requests under way at once so that the server never waits for us.

    It runs at most `max_num_seqs` together, and not more of the longest ones than its KV cache
    holds. Twice as many keep its waiting queue filled while answers are on their way back. Never
    fewer than `max_num_seqs`: short requests need less of the cache, and what does not fit waits
    in the server. A server that does not say what its cache holds gets that many.
    """
    fits = 0 if kv_cache_tokens is None else kv_cache_tokens // longest
    return min(max(2 * min(max_num_seqs, fits), max_num_seqs), MAX_CONNECTIONS)


def describe(context: StageContext, running: Running) -> records.Server:
    """The server as it answered; paths and the port stand as placeholders."""
    accelerator = context.resolved.accelerator
    found: records.Server = {
        "name": running.backend.NAME,
        "version": running.client.version(),
        "command": _command(running),
        "accelerator": accelerator if running.launch else "not said",
        "device": device_name(accelerator) if running.launch else "not said",
        "start_seconds": round(running.start_seconds, 2),
    }
    return found


def _command(running: Running) -> list[str]:
    """The command line; of an endpoint that is up, none: its address is nobody else's affair."""
    launch, process = running.launch, running.process
    if launch is None or process is None:
        return []
    adapter = launch.adapter
    hidden = {
        str(launch.tokenizer): "TOKENIZER",
        f"{SERVED_NAME}={adapter and adapter.folder}": f"{SERVED_NAME}=ADAPTER",
        str(launch.program): "python" if running.backend.ENVIRONMENT else launch.program.name,
        str(launch.model): "MODEL",
        str(running.port): "PORT",
    }
    said = [hidden.get(part, part) for part in process.command]
    # A file of the model's folder, or a program of the environment: their names are enough.
    return [Path(part).name if part.startswith("/") else part for part in said]


def special_tokens(model: Path) -> list[str]:
    """Texts of the tokenizer's special tokens, from `tokenizer.json`."""
    path = model / "tokenizer.json"
    if not path.exists():
        return []
    added = read_json_object(path).get("added_tokens", [])
    return [str(token["content"]) for token in added if token.get("special")]
