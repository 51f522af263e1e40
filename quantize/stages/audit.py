"""Audit: is the artifact the source, quantized as the recipe says, and nothing else?

Inputs: `fetch` (the source) and `compress` (the artifact); `adapter`, where one is kept apart,
which must be what was fetched and fit the artifact; `gguf`, where llama.cpp quantizes, which must
be the source (:mod:`quantize.gguf`). Writes `audit.json`::

    {"checks": [{"name", "passed", "detail"}], "quantized_modules": int, "kept_modules": [str],
     "bytes": {"source": int, "artifact": int, "expected": int},  # tensors, without headers
     "size_ratio": float,                                         # artifact / source
     "tensor_parallel": {"1": [], "2": [what does not split evenly], ...},  # by shapes alone
     "gguf"?: {"file", "bytes", "type", "bits_per_weight", "formats": {number format: tensors}}}

A failed check is a ToolError: the compress stage made something that must not be measured.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.adapter import adapter_folder
from quantize.adapter_checks import check_adapter
from quantize.artifact_checks import Check, check_tensors
from quantize.checkpoint import Checkpoint, chat_template, model_folder, read_checkpoint
from quantize.config_checks import check_model_config, check_quantization_config
from quantize.errors import SourceError, ToolError
from quantize.formats import module_formats
from quantize.gguf.against_bf16 import check_quantized
from quantize.gguf.against_source import check_converted
from quantize.gguf.file import read_gguf
from quantize.gguf.values import is_quantized
from quantize.keys import file_sha256
from quantize.model_files import TOKENIZER_FILES, read_json_object
from quantize.protocol import write_json
from quantize.quantization import Quantize
from quantize.recipe import Recipe
from quantize.remote_code import LET_IN
from quantize.source_checks import tensor_parallel_faults
from quantize.stages import gguf
from quantize.stages.base import Resolved, StageContext
from quantize.stages.compress import gguf_name
from quantize.store import Artifact
from quantize.stored import stored_as

VERSION = 3

PARALLEL_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes that the card speaks of, beside those of the recipe."""
SHOWN_FAULTS = 3

TOLERATED: dict[str, dict[str, str]] = {
    "tokenizer.json": {
        "truncation": "a setting of the caller, which every loader sets anew",
        "padding": "a setting of the caller, which every loader sets anew",
    },
    "tokenizer_config.json": {
        "chat_template": "compared by its effect: it may move to chat_template.jinja",
        "local_files_only": "how it was loaded, not what it is",
        "is_local": "how it was loaded, not what it is",
        "name_or_path": "where it was loaded from",
    },
    "generation_config.json": {"transformers_version": "who wrote it last"},
}
"""Top-level keys that may differ in a rewritten JSON file, and why."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: the audit is the core's own, in numpy."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """What the recipe promises of the artifact."""
    quantize = resolved.recipe.quantize
    inputs: dict[str, Any] = {
        "scheme": quantize.effective_scheme,
        "group_size": quantize.effective_group_size,
        "ignore": list(quantize.ignore),
        "method": quantize.method,
    }
    if quantize.overrides:
        inputs["overrides"] = quantize.effective_overrides
    if quantize.kv_cache is not None:
        inputs["kv_cache"] = quantize.kv_cache
    if quantize.effective_format != "compressed-tensors":
        inputs["format"] = quantize.effective_format
    unusual = set(resolved.recipe.serve.tensor_parallel_sizes) - set(PARALLEL_SIZES)
    if unusual:  # the others are looked at for every recipe
        inputs["tensor_parallel_sizes"] = sorted(unusual)
    return inputs


def run(context: StageContext) -> None:
    """Write `audit.json`, or raise ToolError with the checks that failed."""
    source = model_folder(context.inputs["fetch"])
    artifact = model_folder(context.inputs["compress"])
    progress = context.runner.progress
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        progress.step("reading tensors", done / 1e9, total / 1e9, "GB")

    if "gguf" in context.inputs:
        original = model_folder(context.inputs["gguf"]) / gguf.FILE
        file = artifact / gguf_name(context.resolved)
        total = source_bytes(source) + 2 * original.stat().st_size
        audit = audit_gguf(source, original, file, context.recipe.quantize, report)
    else:
        total = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
        audit = audit_folder(source, artifact, context.recipe.quantize, report)
        audit["tensor_parallel"] = tensor_parallel(source, context.recipe)
    if "adapter" in context.inputs:
        check = check_kept_adapter(context.inputs["adapter"], read_checkpoint(source, code=LET_IN))
        audit["checks"].append(asdict(check))
    failed = [check for check in audit["checks"] if not check["passed"]]
    if failed:
        write_json(context.work / "audit.json", audit)
        lines = [f"{len(failed)} of {len(audit['checks'])} checks of the artifact failed:"]
        lines += [f"  {check['name']}: {check['detail']}" for check in failed]
        raise ToolError("\n".join(lines), f"the whole audit is {context.work / 'audit.json'}")
    write_json(context.files / "audit.json", audit)


def audit_folder(
    source_folder: Path,
    artifact_folder: Path,
    quantize: Quantize,
    report: Any = lambda _: None,
) -> dict[str, Any]:
    """The content of `audit.json` for two checkpoint folders and what one promises of the other.

    An artifact that cannot be read at all is one failed check, so that it is reported in the same
    place; a source that cannot be read is a SourceError.
    """
    source = read_checkpoint(source_folder, code=LET_IN)
    kv_cache = quantize.kv_cache is not None
    try:
        artifact = read_checkpoint(artifact_folder, allow_quantized=True, code=LET_IN)
    except SourceError as error:
        check = Check("the artifact can be read", False, error.message)
        return {"checks": [asdict(check)]}
    stored = stored_as(quantize, artifact.config)
    checks, coverage = check_tensors(
        source,
        artifact,
        module_formats(quantize),
        stored,
        kv_cache=kv_cache,
        rescales="awq" in quantize.method,
        report=report,
    )
    formats = {module: linear.form for module, linear in coverage.quantized.items()}
    checks.append(
        check_quantization_config(
            artifact.config, formats, coverage.kept_modules, stored, kv_cache=kv_cache
        )
    )
    checks.append(check_model_config(source.config, artifact.config))
    checks += check_files(source, artifact)
    return {
        "checks": [asdict(check) for check in checks],
        "quantized_modules": len(coverage.quantized),
        "kept_modules": coverage.kept_modules,
        "bytes": {
            "source": source.weight_bytes,
            "artifact": artifact.weight_bytes,
            "expected": coverage.expected_bytes,
        },
        "size_ratio": artifact.weight_bytes / source.weight_bytes,
    }


def audit_gguf(
    source_folder: Path,
    converted_file: Path,
    made_file: Path,
    quantize: Quantize,
    report: Any = lambda _: None,
) -> dict[str, Any]:
    """The content of `audit.json` for a GGUF file, the BF16 one before it, and their source."""
    source = read_checkpoint(source_folder, code=LET_IN)
    scheme = quantize.effective_scheme
    try:
        converted, made = read_gguf(converted_file), read_gguf(made_file)
    except SourceError as error:
        return {"checks": [asdict(Check("the artifact can be read", False, error.message))]}
    checks = check_converted(source, converted, report)
    checks += check_quantized(converted, made, scheme, report)
    quantized = [tensor for tensor in made.tensors.values() if is_quantized(tensor)]
    return {
        "checks": [asdict(check) for check in checks],
        "quantized_modules": len(quantized),
        "kept_modules": [],
        "bytes": {
            "source": source.weight_bytes,
            "artifact": made.weight_bytes,
            "expected": made.weight_bytes,  # what the header says, and the reader has seen is there
        },
        "size_ratio": made.weight_bytes / source.weight_bytes,
        "tensor_parallel": {},  # llama.cpp splits by layers or rows as it finds room
        "gguf": {
            "file": made_file.name,
            "bytes": made_file.stat().st_size,
            "type": scheme,
            "bits_per_weight": made.bits_per_weight,
            "formats": dict(Counter(tensor.type.name for tensor in made.tensors.values())),
        },
    }


def source_bytes(folder: Path) -> int:
    """Of the source's weights, for progress."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tensor_parallel(folder: Path, recipe: Recipe) -> dict[str, list[str]]:
    """By size, what does not split evenly over so many GPUs: the first few, nothing if all does."""
    checkpoint = read_checkpoint(folder, code=LET_IN)
    sizes = sorted({*PARALLEL_SIZES, *recipe.serve.tensor_parallel_sizes})
    return {
        str(size): tensor_parallel_faults(checkpoint, recipe.quantize, size)[:SHOWN_FAULTS]
        for size in sizes
    }


def check_kept_adapter(artifact: Artifact, source: Checkpoint) -> Check:
    """The adapter's files are those that were fetched, and fit the model they are served with."""
    folder = adapter_folder(artifact)
    listed = {entry["name"]: entry["sha256"] for entry in artifact.json("adapter.json")["files"]}
    found = {path.name: file_sha256(path) for path in folder.iterdir()}
    faults = [
        f"{name} differs"
        for name in sorted({*listed, *found})
        if listed.get(name) != found.get(name)
    ]
    faults += [finding.message for finding in check_adapter(folder, "separate", source)]
    return Check("adapter", not faults, "; ".join(faults) or f"{len(listed)} files as fetched")


def check_files(source: Checkpoint, artifact: Checkpoint) -> list[Check]:
    """Tokenizer files, chat template and generation config say what the source's say."""
    faults: list[str] = []
    tolerated: list[str] = []
    for name in TOKENIZER_FILES:
        if name in source.files and name not in ("chat_template.jinja", "chat_template.json"):
            _compare(source, artifact, name, faults, tolerated)
    fine = "identical" + (f"; tolerated: {', '.join(tolerated)}" if tolerated else "")
    tokenizer = Check("tokenizer", not faults, "; ".join(faults) or fine)
    theirs, ours = chat_template(source.folder), chat_template(artifact.folder)
    fine = "identical" if theirs is not None else "neither has one"
    template = Check(
        "chat template", theirs == ours, fine if theirs == ours else "differs from the source's"
    )
    return [tokenizer, template, _check_generation_config(source, artifact)]


def _check_generation_config(source: Checkpoint, artifact: Checkpoint) -> Check:
    name = "generation_config.json"
    faults: list[str] = []
    tolerated: list[str] = []
    if name in source.files:
        _compare(source, artifact, name, faults, tolerated)
    elif name in artifact.files:
        # save_pretrained writes one even where the source has none: it may repeat the config only.
        written = read_json_object(artifact.folder / name)
        faults = [
            f"the source has none, ours sets {key} to {value!r}"
            for key, value in sorted(written.items())
            if key not in ("_from_model_config", "transformers_version", "use_cache")
            and source.text_config.get(key, source.config.get(key)) != value
        ]
    return Check("generation config", not faults, "; ".join(faults) or "says the same")


def _compare(
    source: Checkpoint, artifact: Checkpoint, name: str, faults: list[str], tolerated: list[str]
) -> None:
    """Equal bytes, or equal JSON but for the tolerated keys."""
    if name not in artifact.files:
        faults.append(f"{name} is missing")
        return
    theirs = (source.folder / name).read_bytes()
    ours = (artifact.folder / name).read_bytes()
    if theirs == ours:
        return
    if not name.endswith(".json"):
        faults.append(f"{name} differs")
        return
    left, right = json.loads(theirs), json.loads(ours)
    if not isinstance(left, dict) or not isinstance(right, dict):
        faults += [f"{name} differs"] if left != right else []
        return
    allowed = TOLERATED.get(name, {})
    changed = sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
    faults += [f"{name}: {key} differs" for key in changed if key not in allowed]
    tolerated += [f"{name}: {key} ({allowed[key]})" for key in changed if key in allowed]
