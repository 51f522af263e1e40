"""Serve a checkpoint and measure it through the server: smoke, perplexity, tasks, load.

The same code for the baseline and the candidate, the baseline a second time (measure-repeat) and
the model that was fine-tuned (measure-base). Each part is kept as soon as it is finished, so a
killed measurement goes on with the next part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.adapter import tokenizer_folder
from quantize.checkpoint import EMBEDDING, model_folder, read_checkpoint
from quantize.keys import digest
from quantize.measure.scope import Scope, scope
from quantize.model_files import is_weights, read_json_object
from quantize.protocol import write_json
from quantize.records import MEASURE_SCHEMA, MeasureRecord, Missing
from quantize.remote_code import LET_IN
from quantize.servers import SERVERS, cannot_serve
from quantize.servers.support import BF16, SAFETENSORS
from quantize.stages.base import Resolved, StageContext
from quantize.unpacked import is_weight_only, write_unpacked

VERSION = 5

NOT_OF_UNPACKED = "latency, throughput and the kernels for packed weights"
"""What weights that were unpacked for the measurement say nothing of."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """The server's environment, if it has one, and lm-eval's for tasks and text from the Hub."""
    environment = SERVERS[resolved.recipe.serve.engine].ENVIRONMENT
    server = () if environment is None else (environment,)
    if resolved.suite is None:
        return server
    asked = scope(resolved, entry_id)
    from_hub = any(name not in resolved.paths for name in _texts(asked))
    return (*server, "lmeval") if asked.suite.tasks or from_hub else server


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The suite with everything of it that this stage asks, how it is served, and on what."""
    asked = scope(resolved, entry_id)
    names = ["suite", *_texts(asked)]
    names += ["prompts"] if asked.everything else []
    names += ["health"] if asked.everything and asked.suite.health else []
    names += ["tasks"] if asked.suite.tasks_folder else []
    inputs: dict[str, Any] = {name: resolved.digests[name] for name in names}
    if asked.own_text is not None:  # the digest of a Hub data set does not say which part of it
        inputs["own_text_from"] = asked.own_text.model_dump(
            mode="json", include={"config", "split", "field"}
        )
    again = {"again": 1} if asked.again else {}
    unpacks = entry_id == "measure-candidate" and unpacks_because(resolved) is not None
    scoped = {"quick": asked.quick} | again | ({"unpacked": True} if unpacks else {})
    return {
        **inputs,
        **scoped,
        "serve": _served(resolved, entry_id),
        "accelerator": resolved.accelerator,
    }


def _served(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The `serve` block; of endpoints that are up the one that is asked, without its key's name."""
    serve = resolved.recipe.serve
    values = serve.model_dump(mode="json", exclude={"tensor_parallel_sizes", "endpoints"})
    if serve.endpoints is None:
        return values
    candidate = entry_id == "measure-candidate"
    endpoint = serve.endpoints.candidate if candidate else serve.endpoints.baseline
    # its address's digest: what a key is made of is published with the card
    return values | {"endpoint": {"url": digest(endpoint.base_url), "model": endpoint.model}}


def _texts(asked: Scope) -> list[str]:
    """The held-out texts that are asked for, by the names that the resolved inputs give them."""
    texts = {"text": asked.perplexity, "own_text": asked.own_text}
    return [name for name, text in texts.items() if text is not None]


def unservable(resolved: Resolved) -> str | None:
    """Why the candidate cannot be measured on this machine, or None."""
    return None if _unpacks(resolved) else _no_kernel(resolved)


def unpacks_because(resolved: Resolved) -> str | None:
    """Why the candidate is served with its weights unpacked to BF16, or None: as it is, or not."""
    return _no_kernel(resolved) if _unpacks(resolved) else None


def _unpacks(resolved: Resolved) -> bool:
    """Whether the weights unpacked to BF16 are the same function, and the server reads them."""
    recipe = resolved.recipe
    if recipe.quantize.effective_format == "gguf":
        return False
    unpacked = cannot_serve(recipe.serve.engine, SAFETENSORS, BF16, resolved.accelerator) is None
    return unpacked and is_weight_only(recipe.quantize)


def _no_kernel(resolved: Resolved) -> str | None:
    """Why the server of this machine does not take the checkpoint as it is, or None."""
    server, quantize = resolved.recipe.serve.engine, resolved.recipe.quantize
    schemes = [quantize.effective_scheme, *(override.scheme for override in quantize.overrides)]
    form, here = quantize.effective_format, resolved.accelerator
    reasons = (cannot_serve(server, form, scheme, here) for scheme in schemes)
    return next((reason for reason in reasons if reason is not None), None)


def asks_base(resolved: Resolved) -> bool:
    """Whether the model that was fine-tuned can be served, too: from its own files, that is."""
    server = SERVERS[resolved.recipe.serve.engine]
    return server.NAME != "url" and server.READS == SAFETENSORS


def run(context: StageContext) -> None:
    """Write `record.json` and beside it the values per token, document and prompt."""
    asked = scope(context.resolved, context.entry.id)
    record: MeasureRecord = {
        "schema": MEASURE_SCHEMA,
        "subject": _subject(context),
        "suite": asked.suite.name,
        "smoke": [],
        "tasks": [],
        "quick": asked.quick,
        "not_measured": [],
        "versions": {},
        "seconds": {},
    }
    missing = _cannot(context)
    if missing is not None:
        record["not_measured"].append(missing)
    else:
        # Its HTTP client would cost every `plan` a quarter of a second.
        from quantize.measure.through_server import measure

        why = unpacks_because(context.resolved)
        if context.entry.id == "measure-candidate" and why is not None:
            record["unpacked"] = why
            record["not_measured"].append(Missing(what=NOT_OF_UNPACKED, why=why))
            measure(context, asked, record, _unpack(context))
        else:
            measure(context, asked, record, model_folder(context.inputs["model"]))
    write_json(context.files / "record.json", record)


def _unpack(context: StageContext) -> Path:
    """The candidate's weights in BF16, in the scratch folder."""
    step = context.runner.progress.step
    target = context.work / "unpacked"
    write_unpacked(
        model_folder(context.inputs["model"]),
        model_folder(context.inputs["fetch"]),
        context.recipe.quantize,
        target,
        lambda done, total: step("unpacking the weights", done / 1e9, total / 1e9, "GB"),
    )
    return target


def _cannot(context: StageContext) -> Missing | None:
    """Why nothing can be asked of the served model, if that is so."""
    if context.entry.id == "measure-candidate":
        reason = unservable(context.resolved)
        return Missing(what="everything that needs the server", why=reason) if reason else None
    if context.entry.id == "measure-base":
        base, fine_tune = (model_folder(context.inputs[role]) for role in ("model", "fetch"))
        if "adapter" in context.inputs:
            fine_tune = tokenizer_folder(context.inputs["adapter"]) or fine_tune
        rows, largest = embedding_rows(base), largest_token_id(fine_tune)
        if largest >= rows:
            return Missing(
                what="tasks",
                why=f"the fine-tune's tokenizer has token ids up to {largest}, and the base model "
                f"has embeddings for {rows} tokens: it cannot be asked the same prompts",
            )
    return None


def embedding_rows(folder: Path) -> int:
    """Tokens that a checkpoint knows: its `vocab_size`, or else its input embedding's rows."""
    checkpoint = read_checkpoint(folder, code=LET_IN)
    stated = checkpoint.dimension("vocab_size")
    if stated is not None:
        return stated
    found = [info for name, info in checkpoint.tensors.items() if EMBEDDING.search(name)]
    return max(int(info.shape[0]) for info in found)


def largest_token_id(folder: Path) -> int:
    """The largest id that the tokenizer can give; -1 where only `tokenizer.model` tells."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return -1
    tokenizer = read_json_object(path)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    return max((int(number) for number in ids), default=-1)


def _subject(context: StageContext) -> Any:
    """The served checkpoint; a compressed one has the parameters of what it was made from."""
    artifact = context.inputs["model"]
    fetched = artifact if artifact.manifest.kind == "fetch" else context.inputs["fetch"]
    weights = [path for path in model_folder(artifact).iterdir() if is_weights(path.name)]
    subject = {
        "key": artifact.manifest.key,
        "bytes": sum(path.stat().st_size for path in weights),
        "parameters": fetched.json("source.json")["parameters"],
    }
    if "adapter" in context.inputs and context.entry.id != "measure-base":
        subject["adapter"] = context.inputs["adapter"].manifest.key
    return subject
