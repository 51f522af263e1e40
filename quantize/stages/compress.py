"""Quantize: an engine in its environment, on the calibrate stage's token ids."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint import model_folder
from quantize.engines import ENGINES, stream
from quantize.model_files import TOKENIZER_FILES, any_match, checkpoint_files
from quantize.modelfile import modelfile
from quantize.protocol import write_atomic, write_json
from quantize.quantization import Quantize
from quantize.remote_code import code_files
from quantize.stages import gguf
from quantize.stages.base import Resolved, StageContext

VERSION = 2

VERBATIM = (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json", "LICENSE*")
"""Taken over from the source byte by byte: libraries rewrite these when they save."""

BESIDE_GGUF = ("LICENSE*",)
"""The same beside GGUF, which has the rest inside."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """The engine's environment."""
    return (ENGINES[resolved.recipe.quantize.engine].ENVIRONMENT,)


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The quantize block with its defaults filled in, without options the method does not read."""
    quantize = resolved.recipe.quantize
    named = {"file": gguf_name(resolved)} if quantize.effective_format == "gguf" else {}
    return what_is_asked(quantize) | named


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
    if quantize.clip:
        inputs["clip"] = True
    return inputs


def gguf_name(resolved: Resolved) -> str:
    """Name of the file that is published: the recipe's, without what says that it is GGUF."""
    scheme = resolved.recipe.quantize.effective_scheme
    name = resolved.recipe.name.removesuffix(f"-{scheme.lower()}").removesuffix("-gguf")
    return f"{name}-{scheme}.gguf"


def run(context: StageContext) -> None:
    """Run the worker; write the checkpoint into `model/` and what was done into `compress.json`.

    The streaming engine leaves `sensitivity.json` beside it where there was calibration data;
    llama.cpp's artifact is a GGUF file, its importance matrix `imatrix.gguf` and a `Modelfile`.
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
    if quantize.clip:
        request["clip"] = True
    said = _engine(context)
    engine = ENGINES[said["engine"]]
    verbatim = BESIDE_GGUF if engine.FORMAT == "gguf" else VERBATIM
    copied = [name for name in checkpoint_files(source) if any_match(name, verbatim)]
    env = {"HF_HUB_OFFLINE": "1"}
    if context.recipe.model.trust_remote_code is not None:
        copied += code_files(source)
        request["trust_remote_code"] = True
        env["HF_MODULES_CACHE"] = str(context.work / "code")  # transformers imports a copy
    result = context.runner.worker(
        engine.ENVIRONMENT,
        engine.WORKER,
        request
        | {"model": str(source), "output": str(output), "tokens": tokens, "copy": copied}
        | _of_gguf(context),
        work=context.work,
        label="compress",
        env=env,
    )
    if "gguf" in context.inputs:
        file = gguf_name(context.resolved)
        write_atomic(output / "Modelfile", modelfile(source, file))
    context.versions.update(result.pop("versions"))
    write_json(
        context.files / "compress.json",
        request | said | {"calibrated": tokens is not None, "versions": context.versions} | result,
    )


def _of_gguf(context: StageContext) -> dict[str, Any]:
    """What llama.cpp's worker needs beside the block: the BF16 file, and rows as text."""
    if "gguf" not in context.inputs:
        return {}
    converted, calibration = context.inputs["gguf"], context.recipe.calibration
    rows = None
    if "calibrate" in context.inputs:
        rows = str(context.inputs["calibrate"].file("rows.jsonl"))
    return {
        "gguf": str(converted.file(f"model/{gguf.FILE}")),
        "file": gguf_name(context.resolved),
        "rows": rows,
        "packing": calibration is not None and calibration.packing,
    }


def _engine(context: StageContext) -> dict[str, str]:
    """`engine`, and `engine_note` where it is not the one that the recipe asks for."""
    quantize = context.recipe.quantize
    source = context.inputs["fetch"].json("source.json")
    if quantize.engine == "stream":
        reason = stream.leaves(source["architecture"], context.recipe)
        if reason is not None:
            note = f"quantized by llm-compressor's oneshot: {reason}"
            context.notes.append(note)
            context.runner.progress.note(note)
            return {"engine": "llmcompressor", "engine_note": note}
    return {"engine": quantize.engine}
