"""Audit: is the artifact the source, quantized as the recipe says, and nothing else?

Inputs: `fetch` (the source) and `compress` (the artifact). Writes `audit.json`::

    {"checks": [{"name", "passed", "detail"}], "quantized_modules": int, "kept_modules": [str],
     "bytes": {"source": int, "artifact": int, "expected": int},  # tensors, without headers
     "size_ratio": float}                                         # artifact / source

A failed check is a ToolError: the compress stage made something that must not be measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.artifact_checks import Check, check_tensors
from quantize.checkpoint import Checkpoint, chat_template, matches, model_folder, read_checkpoint
from quantize.errors import SourceError, ToolError
from quantize.formats import WeightFormat, weight_format
from quantize.model_files import TOKENIZER_FILES, read_json_object
from quantize.protocol import write_json
from quantize.recipe import Quantize
from quantize.stages.base import Resolved, StageContext

VERSION = 1

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

CONFIG_TOLERATED = frozenset(
    {"quantization_config", "transformers_version", "_name_or_path", "torch_dtype", "dtype"}
)
"""Keys of config.json that quantizing changes: the rest of what both sides state is equal."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: the audit is the core's own, in numpy."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """What the recipe promises of the artifact."""
    quantize = resolved.recipe.quantize
    return {
        "scheme": quantize.effective_scheme,
        "group_size": quantize.effective_group_size,
        "ignore": list(quantize.ignore),
        "method": quantize.method,
    }


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

    total = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    audit = audit_folder(source, artifact, context.recipe.quantize, report)
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
    source = read_checkpoint(source_folder)
    form = weight_format(quantize)
    try:
        artifact = read_checkpoint(artifact_folder, allow_quantized=True)
    except SourceError as error:
        check = Check("the artifact can be read", False, error.message)
        return {"checks": [asdict(check)]}
    checks, coverage = check_tensors(
        source,
        artifact,
        form,
        quantize.ignore,
        rescales="awq" in quantize.method,
        report=report,
    )
    checks.append(check_quantization_config(artifact.config, form, coverage.kept_modules))
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


def check_quantization_config(
    config: dict[str, Any], form: WeightFormat, kept_modules: Sequence[str]
) -> Check:
    """`quantization_config` tells a server the format that the tensors have."""
    name = "quantization_config"
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return Check(name, False, "config.json has none: servers would read the model as BF16")
    faults = _differences(
        {"quant_method": "compressed-tensors", "format": form.compression}, stated
    )
    group_size = form.group_size if form.strategy == "group" else None
    promised = {
        "num_bits": form.bits,
        "type": "float" if form.compression == "float-quantized" else "int",
        "strategy": form.strategy,
        "symmetric": form.symmetric,
        "group_size": group_size,
    }
    groups = stated.get("config_groups") or {}
    if not groups:
        faults.append("no config_groups")
    for key, group in groups.items():
        faults += [f"{key}.weights.{fault}" for fault in _differences(promised, group["weights"])]
        activations = group.get("input_activations") or {}
        if form.static_input and activations.get("dynamic") is not False:
            faults.append(f"{key}.input_activations is not static")
    ignore = stated.get("ignore") or []
    unlisted = [module for module in kept_modules if not matches(module, ignore)]
    if unlisted:
        faults.append(f"ignore lacks {', '.join(unlisted[:3])}, which is not quantized")
    return Check(name, not faults, "; ".join(faults) or f"{form.compression}, {form.scheme}")


def check_model_config(source: dict[str, Any], artifact: dict[str, Any]) -> Check:
    """Whatever both configs state of the model is equal; a rewrite may add defaults."""
    both = (source.keys() & artifact.keys()) - CONFIG_TOLERATED
    faults = _differences({key: source[key] for key in sorted(both)}, artifact)
    if _rope_theta(source) != _rope_theta(artifact):
        faults.append(f"rope_theta {_rope_theta(source)} became {_rope_theta(artifact)}")
    return Check("model config", not faults, "; ".join(faults) or f"{len(both)} keys are equal")


def _rope_theta(config: dict[str, Any]) -> Any:
    """Transformers 5 moves it from the top level into rope_parameters."""
    nested = config.get("rope_parameters")
    inside = nested.get("rope_theta") if isinstance(nested, dict) else None
    return config.get("rope_theta", inside)


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


def _differences(promised: dict[str, Any], stated: dict[str, Any]) -> list[str]:
    return [
        f"{key} is {stated.get(key)!r}, not {value!r}"
        for key, value in promised.items()
        if stated.get(key) != value
    ]
