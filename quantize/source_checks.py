"""Does a checkpoint fit what a recipe does with it? Shapes and files only, no weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.artifact_formats import ArtifactFormat, format_of
from quantize.checkpoint import Checkpoint, examine
from quantize.findings import Finding
from quantize.formats import (
    BLOCK,
    ModuleFormats,
    Rule,
    WeightFormat,
    layout_bytes,
    module_formats,
)
from quantize.gguf.types import estimated_bytes
from quantize.header_checks import check_headers, promises_of
from quantize.modules import matches, module_name, nearest, served_unit
from quantize.parallel_checks import check_tensor_parallel, parallel_faults
from quantize.quantization import Quantize
from quantize.recipe import Recipe
from quantize.schemes import GROUPED
from quantize.tensors import TensorInfo
from quantize.tokenizer_checks import check_tokenizer

JOINED = re.compile(r"\.(q_proj|k_proj|gate_proj)$")
"""Linears that vLLM joins with the next: FP8 blocks must not straddle the seam."""

USUAL_GROUPS = (32, 64, 128)


def check_checkpoint(
    folder: Path, recipe: Recipe, code: str | None = None, commit: str | None = None
) -> list[Finding]:
    """All that is wrong with a checkpoint folder, on its own and for this recipe.

    `code`, `commit`: as of :func:`quantize.checkpoint.examine`.
    """
    checkpoint, findings = examine(folder, code=code, commit=commit)
    return findings if checkpoint is None else check_source(checkpoint, recipe)


def check_source(checkpoint: Checkpoint, recipe: Recipe) -> list[Finding]:
    """What is wrong with the checkpoint itself, and what the recipe asks for and it does not allow.

    The parts stand alone in :mod:`quantize.checklist`, which names each.
    """
    promises = promises_of(checkpoint)
    return [
        *(check_headers(checkpoint, promises) if promises is not None else ()),
        *check_tokenizer(checkpoint).findings,
        *check_schemes(checkpoint, recipe),
        *check_parallel(checkpoint, recipe),
        *check_lengths(checkpoint, recipe),
    ]


def check_schemes(checkpoint: Checkpoint, recipe: Recipe) -> list[Finding]:
    """Module patterns, group sizes, blocks, tied heads, and what is served as one matrix.

    Nothing for GGUF: llama.cpp falls back to other types where shapes do not fit.
    """
    if recipe.quantize.effective_format == "gguf":
        return []
    formats = module_formats(recipe.quantize)
    findings = _check_patterns(checkpoint, formats)
    chosen = _chosen(checkpoint, formats)
    if not chosen:
        findings.append(
            Finding(
                f"nothing to quantize: ignore covers all {len(checkpoint.linears())} linears",
                "shorten quantize.ignore",
            )
        )
    if checkpoint.tied_embeddings and formats.of("lm_head") is not None:
        findings.append(
            Finding(
                "lm_head shares its weight with the embedding and cannot be quantized alone",
                "add lm_head to quantize.ignore",
            )
        )
    for rule in formats.rules:
        infos = [info for info, theirs in chosen if theirs is rule]
        findings += _check_groups(infos, rule)
        findings += _check_blocks(infos, rule.form)
    findings += _check_stored(checkpoint, format_of(recipe.quantize.effective_format), chosen)
    return findings + _check_units(checkpoint, formats)


def check_parallel(checkpoint: Checkpoint, recipe: Recipe) -> list[Finding]:
    """Every size that the checkpoint is measured or to be served with."""
    chosen = chosen_weights(checkpoint, recipe.quantize)
    sizes = sorted({recipe.serve.tensor_parallel_size, *recipe.serve.tensor_parallel_sizes})
    stored = format_of(recipe.quantize.effective_format)
    return [found for n in sizes for found in check_tensor_parallel(checkpoint, chosen, n, stored)]


def chosen_weights(checkpoint: Checkpoint, quantize: Quantize) -> list[tuple[TensorInfo, Rule]]:
    """The weights that a recipe quantizes, each with the rule that says how."""
    return _chosen(checkpoint, module_formats(quantize))


def promised_bytes(checkpoint: Checkpoint, recipe: Recipe, stored: str | None = None) -> int:
    """Bytes of the artifact's tensors: quantized ones by their format, the others as they are.

    `stored`: name of a format; that which the recipe wants if absent. Of GGUF an estimate, by the
    bits that the type has on a large model.
    """
    if recipe.quantize.effective_format == "gguf":
        return estimated_bytes(recipe.quantize.effective_scheme, checkpoint.parameters)
    layout = format_of(stored or recipe.quantize.effective_format).layout
    chosen = {i.name: r.form for i, r in _chosen(checkpoint, module_formats(recipe.quantize))}
    return sum(
        layout_bytes(layout(chosen[name], info.shape, "BF16")) if name in chosen else info.bytes
        for name, info in checkpoint.tensors.items()
    )


def _chosen(checkpoint: Checkpoint, formats: ModuleFormats) -> list[tuple[TensorInfo, Rule]]:
    """The weights that are quantized, each with the rule that says how."""
    rules = [(info, formats.rule(module_name(info.name))) for info in checkpoint.linears()]
    return [(info, rule) for info, rule in rules if rule is not None]


def _check_patterns(checkpoint: Checkpoint, formats: ModuleFormats) -> list[Finding]:
    """A misspelt entry would quantize what its author wanted to keep, or in another format."""
    modules = [module_name(info.name) for info in checkpoint.linears()]
    entries = [("quantize.ignore", entry) for entry in formats.ignore if entry != "lm_head"]
    entries += [(f"{rule.key}.modules", e) for rule in formats.rules for e in rule.modules or ()]
    findings = [
        Finding(
            f"{key}: {entry!r} matches none of the {len(modules)} linears",
            f"names look like {', '.join(nearest(entry, modules))}; correct the entry or remove it",
        )
        for key, entry in entries
        if not any(matches(module, [entry]) for module in modules)
    ]
    used = {rule.key for module in modules if (rule := formats.rule(module)) is not None}
    for rule in formats.rules:
        if rule.modules is None or rule.key in used:
            continue
        if any(matches(module, rule.modules) for module in modules):
            message = f"{rule.key} changes nothing: ignore or earlier overrides name its modules"
            findings.append(Finding(message, "remove it, or put it before the others"))
    return findings


def _check_groups(infos: Sequence[TensorInfo], rule: Rule) -> list[Finding]:
    """llm-compressor (`group_size_validation.py`): the input must be a whole number of groups."""
    size = rule.form.group_size
    bad = [info for info in infos if size is not None and info.shape[1] % size]
    if not bad or size is None:
        return []
    fitting = [g for g in USUAL_GROUPS if all(info.shape[1] % g == 0 for info in infos)]
    hint = "add these modules to quantize.ignore, or take a scheme without groups (FP8_DYNAMIC)"
    if rule.form.scheme in GROUPED:
        sizes = [*map(str, fitting), "channel"]
        hint = f"set {rule.key}.group_size to {' or '.join(sizes)}"
    columns = sorted({info.shape[1] for info in bad})
    return [
        Finding(
            f"group size {size} does not divide the input dimension of {_named(bad)}"
            + (f" (dimensions {', '.join(map(str, columns))})" if len(columns) > 1 else ""),
            hint,
        )
    ]


def _check_blocks(chosen: Sequence[TensorInfo], form: WeightFormat) -> list[Finding]:
    """FP8 blocks of 128 x 128: compressed-tensors pads rows, vLLM does not pad what it joins.

    Activations are quantized in groups of 128 inputs (`fp8_utils.py`, per_token_group_quant_fp8),
    so inputs must divide; joined outputs must, too (validate_fp8_block_shape).
    """
    if form.strategy != "block":
        return []
    bad = [
        info
        for info in chosen
        if info.shape[1] % BLOCK
        or (JOINED.search(module_name(info.name)) and info.shape[0] % BLOCK)
    ]
    if not bad:
        return []
    return [
        Finding(
            f"FP8_BLOCK needs dimensions divisible by {BLOCK}, unlike {_named(bad)}",
            "use scheme FP8_DYNAMIC, or add these modules to quantize.ignore",
        )
    ]


def _check_stored(
    checkpoint: Checkpoint,
    stored: ArtifactFormat,
    chosen: Sequence[tuple[TensorInfo, Rule]],
) -> list[Finding]:
    """Shapes and names that the artifact's format cannot express."""
    misfits: dict[str, list[TensorInfo]] = {}
    for info, rule in chosen:
        why = stored.cannot_store(rule.form, info.shape)
        if why is not None:
            misfits.setdefault(why, []).append(info)
    hint = "add these modules to quantize.ignore, or take format compressed-tensors"
    findings = [
        Finding(f"format {stored.NAME} cannot hold {_named(infos)}: {why}", hint)
        for why, infos in misfits.items()
    ]
    quantized = [module_name(info.name) for info, _ in chosen]
    linears = [module_name(info.name) for info in checkpoint.linears()]
    kept = sorted(set(linears) - set(quantized), key=linears.index)
    if (why := stored.cannot_name(quantized, kept)) is not None:
        hint = "change quantize.ignore, or take format compressed-tensors"
        findings.append(Finding(f"format {stored.NAME} cannot hold {why}", hint))
    return findings


def _check_units(checkpoint: Checkpoint, formats: ModuleFormats) -> list[Finding]:
    """Linears that are served as one matrix have one format, or none of them has any."""
    units: dict[str, dict[str, WeightFormat | None]] = {}
    for info in checkpoint.layer_linears():
        module = module_name(info.name)
        units.setdefault(served_unit(module), {})[module] = formats.of(module)
    split = [members for members in units.values() if len(set(members.values())) > 1]
    if not split:
        return []
    first: dict[WeightFormat | None, str] = {}
    for module, form in split[0].items():
        first.setdefault(form, module)
    said = [f"{module} {_said(form)}" for form, module in first.items()]
    more = f" (and {len(split) - 1} more groups of modules)" if split[1:] else ""
    return [
        Finding(
            f"vLLM serves as one what the recipe treats differently: {', '.join(said)}{more}",
            "name q_proj, k_proj and v_proj together, gate_proj and up_proj together, and all "
            "experts of a layer together, in overrides and in ignore",
        )
    ]


def _said(form: WeightFormat | None) -> str:
    if form is None:
        return "in BF16"
    return f"in {form.scheme}" + (f" with groups of {form.group_size}" if form.group_size else "")


def tensor_parallel_faults(
    checkpoint: Checkpoint, quantize: Quantize | None, size: int
) -> list[str]:
    """What does not split evenly over `size` GPUs; see :mod:`quantize.parallel_checks`.

    Without a `quantize` block, of the checkpoint in BF16: its heads.
    """
    if quantize is None:
        return parallel_faults(checkpoint, [], size)
    stored = format_of(quantize.effective_format)
    return parallel_faults(checkpoint, chosen_weights(checkpoint, quantize), size, stored)


def check_lengths(checkpoint: Checkpoint, recipe: Recipe) -> list[Finding]:
    """Lengths beyond the trained positions; rope scaling by a factor is left to the server."""
    limit = checkpoint.dimension("max_position_embeddings")
    if limit is None or _scales_rope(checkpoint.text_config):
        return []
    asked = {"serve.max_model_len": recipe.serve.max_model_len}
    if recipe.calibration is not None and recipe.calibrates:
        asked["calibration.sequence_length"] = recipe.calibration.sequence_length
    return [
        Finding(
            f"{key} is {value}, the checkpoint has {limit} positions (max_position_embeddings)",
            f"set {key} to {limit} or less",
        )
        for key, value in asked.items()
        if value is not None and value > limit
    ]


def _scales_rope(config: dict[str, Any]) -> bool:
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if isinstance(rope, dict) and rope.get("factor") is not None:
            return True
    return False


def _named(infos: Sequence[TensorInfo]) -> str:
    first = f"{infos[0].name} {list(infos[0].shape)}"
    return first + (f" and {len(infos) - 1} more tensors" if infos[1:] else "")
