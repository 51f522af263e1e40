"""Serve a checkpoint and measure it through the server: smoke, perplexity, tasks, load.

The same code for the baseline and the candidate. Each part is kept as soon as it is finished, so a
killed measurement goes on with the next part.
"""

from __future__ import annotations

from typing import Any

from quantize.checkpoint import model_folder
from quantize.protocol import write_json
from quantize.records import MEASURE_SCHEMA, MeasureRecord, Missing
from quantize.servers import SERVERS
from quantize.stages.base import Resolved, StageContext

VERSION = 1


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """The server's environment, and lm-eval's where the suite has tasks."""
    server = SERVERS[resolved.recipe.serve.engine].ENVIRONMENT
    suite = resolved.suite
    return (server, "lmeval") if suite is not None and suite.tasks else (server,)


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The suite with everything it names, how it is served, and on what."""
    serve = resolved.recipe.serve.model_dump(mode="json", exclude={"tensor_parallel_sizes"})
    suite = resolved.suite
    assert suite is not None, "the planner adds this stage only for a suite"
    names = ["suite", "prompts"]
    names += ["text"] if suite.perplexity else []
    names += ["tasks"] if suite.tasks_folder else []
    digests = {name: resolved.digests[name] for name in names}
    return {**digests, "serve": serve, "accelerator": resolved.accelerator}


def unservable(resolved: Resolved) -> str | None:
    """Why the candidate cannot be measured on this machine, or None."""
    server, quantize = SERVERS[resolved.recipe.serve.engine], resolved.recipe.quantize
    schemes = [quantize.effective_scheme, *(override.scheme for override in quantize.overrides)]
    reasons = (server.cannot_serve(scheme, resolved.accelerator) for scheme in schemes)
    return next((reason for reason in reasons if reason is not None), None)


def run(context: StageContext) -> None:
    """Write `record.json`, `token_logprobs.npz` and `samples/<task>.jsonl`."""
    suite = context.resolved.suite
    assert suite is not None, "the planner adds this stage only for a suite"
    candidate = context.entry.id == "measure-candidate"
    reason = unservable(context.resolved) if candidate else None
    record: MeasureRecord = {
        "schema": MEASURE_SCHEMA,
        "subject": _subject(context),
        "suite": suite.name,
        "smoke": [],
        "tasks": [],
        "not_measured": [],
        "versions": {},
        "seconds": {},
    }
    if reason:
        record["not_measured"].append(Missing(what="everything that needs the server", why=reason))
    else:
        # Its HTTP client would cost every `plan` a quarter of a second.
        from quantize.measure.through_server import measure

        measure(context, suite, record)
    write_json(context.files / "record.json", record)


def _subject(context: StageContext) -> Any:
    source = context.inputs["fetch"].json("source.json")
    artifact = context.inputs["model"]
    weights = model_folder(artifact).glob("*.safetensors")
    return {
        "key": artifact.manifest.key,
        "bytes": sum(path.stat().st_size for path in weights),
        "parameters": source["parameters"],
    }
