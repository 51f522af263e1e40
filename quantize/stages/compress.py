"""Quantize: an engine in its environment, on the calibrate stage's token ids."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint import model_folder
from quantize.engine.support import why_not
from quantize.engines import ENGINES
from quantize.model_files import TOKENIZER_FILES, any_match, checkpoint_files
from quantize.protocol import write_json
from quantize.recipe import Quantize
from quantize.remote_code import code_files
from quantize.stages.base import Resolved, StageContext

VERSION = 2

VERBATIM = (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json", "LICENSE*")
"""Taken over from the source byte by byte: libraries rewrite these when they save."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """The engine's environment."""
    return (ENGINES[resolved.recipe.quantize.engine].ENVIRONMENT,)


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The quantize block with its defaults filled in, without options the method does not read."""
    return what_is_asked(resolved.recipe.quantize)


def what_is_asked(quantize: Quantize) -> dict[str, Any]:
    """The block as a key reads it."""
    inputs: dict[str, Any] = {
        "method": quantize.method,
        "scheme": quantize.effective_scheme,
        "group_size": quantize.effective_group_size,
        "ignore": list(quantize.ignore),
        "engine": quantize.engine,
    }
    if quantize.overrides:
        inputs["overrides"] = quantize.effective_overrides
    if quantize.kv_cache is not None:
        inputs["kv_cache"] = quantize.kv_cache
    if "gptq" in quantize.method or quantize.method == "int8":
        inputs["dampening"] = quantize.dampening
        inputs["activation_order"] = quantize.activation_order
    return inputs


def run(context: StageContext) -> None:
    """Run the worker; write the checkpoint into `model/` and what was done into `compress.json`.

    The streaming engine leaves `sensitivity.json` beside it where there was calibration data.
    """
    quantize = context.recipe.quantize
    source = model_folder(context.inputs["fetch"])
    output = context.files / "model"
    output.mkdir()
    tokens = None
    if "calibrate" in context.inputs:
        tokens = str(context.inputs["calibrate"].file("tokens.npz"))
    request: dict[str, Any] = {
        "method": quantize.method,
        "scheme": quantize.effective_scheme,
        "group_size": quantize.effective_group_size,
        "ignore": list(quantize.ignore),
        "overrides": quantize.effective_overrides,
        "kv_cache": quantize.kv_cache,
        "dampening": quantize.dampening,
        "activation_order": quantize.activation_order,
    }
    said = _engine(context)
    engine = ENGINES[said["engine"]]
    copied = [name for name in checkpoint_files(source) if any_match(name, VERBATIM)]
    env = {"HF_HUB_OFFLINE": "1"}
    if context.recipe.model.trust_remote_code is not None:
        copied += code_files(source)
        request["trust_remote_code"] = True
        env["HF_MODULES_CACHE"] = str(context.work / "code")  # transformers imports a copy
    result = context.runner.worker(
        engine.ENVIRONMENT,
        engine.WORKER,
        request | {"model": str(source), "output": str(output), "tokens": tokens, "copy": copied},
        work=context.work,
        label="compress",
        env=env,
    )
    context.versions.update(result.pop("versions"))
    write_json(
        context.files / "compress.json",
        request | said | {"calibrated": tokens is not None, "versions": context.versions} | result,
    )


def _engine(context: StageContext) -> dict[str, str]:
    """`engine`, and `engine_note` where it is not the one that the recipe asks for."""
    quantize = context.recipe.quantize
    source = context.inputs["fetch"].json("source.json")
    if quantize.engine == "stream":
        reason = why_not(source["architecture"], quantize.ignore)
        if context.recipe.model.trust_remote_code is not None:
            reason = "the streaming engine runs no code of a checkpoint"
        if reason is not None:
            note = f"quantized by llm-compressor's oneshot: {reason}"
            context.notes.append(note)
            context.runner.progress.note(note)
            return {"engine": "llmcompressor", "engine_note": note}
    return {"engine": quantize.engine}
