"""A running server: started, described, ended; and how many requests keep it full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.adapter import adapter_folder, tokenizer_folder
from quantize.checkpoint import model_folder
from quantize.machine import device_name
from quantize.measure.client import MAX_CONNECTIONS, Client
from quantize.measure.port import held_port
from quantize.measure.scope import Scope
from quantize.measure.watching import ServerWatch
from quantize.model_files import read_json_object
from quantize.process import Process
from quantize.records import Server
from quantize.servers import SERVERS
from quantize.servers.base import Launch, ServedAdapter
from quantize.stages.base import StageContext

SERVED_NAME = "model"
BASE_NAME = "base"
"""What the server calls a base whose adapter has the served name; nobody asks it."""

TASK_TOKENS = 2048
"""A long task request: 25 worked examples, or a question and its chain of thought."""


@dataclass
class Running:
    """A server that answers."""

    client: Client
    process: Process
    port: int
    launch: Launch
    start_seconds: float
    concurrency: int  # requests under way at once
    kv_cache_tokens: int | None

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer and chat template that prompts are made with."""
        return self.launch.tokenizer or self.launch.model


@contextmanager
def serve(context: StageContext, scope: Scope, model: Path) -> Iterator[Running]:
    """Serve `model` until the block is left; failures inside blame a dead server."""
    with held_port() as port, _serve(context, scope, model, port) as running:
        yield running


@contextmanager
def _serve(context: StageContext, scope: Scope, model: Path, port: int) -> Iterator[Running]:
    backend = SERVERS[context.recipe.serve.engine]
    adapter = _adapter(context, scope)
    texts = [text for text in (scope.perplexity, scope.own_text) if text is not None]
    launch = Launch(
        python=context.runner.python(backend.ENVIRONMENT),
        model=model,
        served_name=BASE_NAME if adapter is not None else SERVED_NAME,
        port=port,
        accelerator=context.resolved.accelerator,
        serve=context.recipe.serve,
        max_logprobs=max((text.top_k for text in texts), default=1),
        tokenizer=_tokenizer(context, scope),
        adapter=adapter,
        trust_remote_code=context.recipe.model.trust_remote_code is not None,
    )
    label = f"{context.entry.id}-server"
    command, variables = backend.command(launch), backend.variables(launch)
    variables["HF_MODULES_CACHE"] = str(context.work / "code")
    with context.runner.process(command, label, env=variables) as process:
        client = Client(f"http://127.0.0.1:{launch.port}", SERVED_NAME)
        seconds = context.runner.wait_until(
            process,
            client.healthy,
            "vLLM server",
            replace(context.runner.patience, silent_seconds=backend.START_SECONDS),
            backend.explain,
        )
        runner = context.runner
        try:
            with (
                runner.tool(label),
                runner.blaming(process, "vLLM server", backend.explain),
                ServerWatch(process, client, "vLLM server", runner.patience),
            ):
                tokens = backend.kv_cache_tokens(client.metrics(), process.output())
                longest = longest_request(scope, client.max_model_len())
                many = concurrency(context.recipe.serve.max_num_seqs, tokens, longest)
                yield Running(client, process, launch.port, launch, seconds, many, tokens)
        finally:
            client.close()


def _adapter(context: StageContext, scope: Scope) -> ServedAdapter | None:
    """An adapter that is kept apart, for every measurement but that of the model it began from."""
    artifact = context.inputs.get("adapter")
    if artifact is None or scope.foreign_tokenizer:
        return None
    said = artifact.json("adapter.json")
    folder, targets = adapter_folder(artifact), tuple(said["targets"])
    return ServedAdapter(SERVED_NAME, folder, int(said["rank"]), targets)


def _tokenizer(context: StageContext, scope: Scope) -> Path | None:
    """The fine-tune's tokenizer, where the served folder's own is another."""
    artifact = context.inputs.get("adapter")
    brought = tokenizer_folder(artifact) if artifact is not None else None
    if brought is None and scope.foreign_tokenizer:
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


def describe(context: StageContext, running: Running) -> Server:
    """The server as it answered; paths and the port stand as placeholders."""
    adapter = running.launch.adapter
    hidden = {
        str(running.launch.tokenizer): "TOKENIZER",
        f"{SERVED_NAME}={adapter and adapter.folder}": f"{SERVED_NAME}=ADAPTER",
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


def special_tokens(model: Path) -> list[str]:
    """Texts of the tokenizer's special tokens, from `tokenizer.json`."""
    path = model / "tokenizer.json"
    if not path.exists():
        return []
    added = read_json_object(path).get("added_tokens", [])
    return [str(token["content"]) for token in added if token.get("special")]
