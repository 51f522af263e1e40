"""A quantized checkpoint in another format, with the same numbers: bits move, nothing is rounded.

Codes, zero points and scales are taken over as they are, scales in their own dtype, so that
dequantized weights are equal bit by bit. What a format cannot express is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.artifact_formats import ArtifactFormat, Facts
from quantize.checkpoint import Checkpoint, read_checkpoint
from quantize.errors import SourceError, UsageError
from quantize.formats import WeightFormat
from quantize.modules import module_name
from quantize.remote_code import LET_IN, code_files
from quantize.rewriting import OnProgress, Planned, write_checkpoint
from quantize.stored import (
    CACHE_SCALES,
    Linear,
    Stored,
    facts_of,
    form_of,
    modules_of,
    read_linears,
)


@dataclass(frozen=True)
class Repacked:
    """What became of a checkpoint."""

    before: str  # name of the format that it was in
    after: str
    modules: int  # quantized linears
    bytes_before: int  # of all tensors
    bytes_after: int


def repack(
    source: Path,
    target: Path,
    into: ArtifactFormat,
    on_progress: OnProgress,
    *,
    symmetric: bool | None = None,
    code: str | None = None,
) -> Repacked:
    """Write the quantized checkpoint in `source` to the empty folder `target`, stored as `into`.

    `symmetric`: what grids are that the checkpoint's config calls asymmetric; None: symmetric
    where every zero point is in the middle. `code`: as of :func:`quantize.checkpoint.examine`.
    SourceError where the checkpoint cannot be read, or `into` cannot hold it.
    """
    checkpoint = read_checkpoint(source, allow_quantized=True, code=code)
    stored, linears = read_linears(checkpoint)
    if stored.format is into:
        raise UsageError(f"{source} is stored as {into.NAME} already", "name another --format")
    linears = _with_symmetry(stored, linears, symmetric)
    kept = _kept(checkpoint, linears)
    quantized = {module: facts_of(linear.form) for module, linear in linears.items()}
    _require(checkpoint, stored, into, linears, kept)
    config = _config(checkpoint, into, quantized, kept)
    planned = _plan(checkpoint, stored, linears, into)
    files = [name for name in checkpoint.files if name != "README.md"]  # a card of what it was
    files += code_files(source) if code == LET_IN else []
    write_checkpoint(target, planned, source, files, config, on_progress)
    return Repacked(
        stored.format.NAME,
        into.NAME,
        len(linears),
        checkpoint.weight_bytes,
        sum(tensor.size for tensor in planned.values()),
    )


def _with_symmetry(
    stored: Stored, linears: Mapping[str, Linear], symmetric: bool | None
) -> dict[str, Linear]:
    """Linears whose grids are called asymmetric, and all are symmetric, are called that.

    AWQ stores zero points of both.
    """
    if symmetric is None:
        symmetric = all(
            stored.grid(linear.form, linear.tensors, linear.shape).centred
            for linear in linears.values()
            if not linear.form.symmetric
        )
    found = {}
    for module, linear in linears.items():
        facts = facts_of(linear.form)
        form = form_of(Facts(facts.bits, facts.group_size, facts.symmetric or symmetric))
        found[module] = Linear(form, linear.shape, linear.tensors)
    return found


def _kept(checkpoint: Checkpoint, linears: Mapping[str, Linear]) -> list[str]:
    """Linears that are not quantized."""
    names = [module_name(info.name) for info in checkpoint.linears()]
    return [name for name in names if name not in linears]


def _require(
    checkpoint: Checkpoint,
    stored: Stored,
    into: ArtifactFormat,
    linears: Mapping[str, Linear],
    kept: list[str],
) -> None:
    """SourceError with the parts that the format cannot express."""
    faults: dict[str, str] = {}  # what → the first module
    for module, linear in linears.items():
        misfit = into.cannot_store(linear.form, linear.shape)
        if misfit is not None:
            faults.setdefault(misfit, module)
        dtype = linear.tensors[stored.format.SCALE].dtype
        if dtype not in into.SCALE_DTYPES:
            faults.setdefault(f"scales in {dtype}, which its readers round", module)
    said = [f"{what} ({module})" for what, module in faults.items()]
    named = into.cannot_name(list(linears), kept)
    said += [named] if named is not None else []
    said += [f"{name}: scales of a KV cache" for name in _cache_scales(checkpoint)[:1]]
    if said:
        raise _refused(checkpoint, into, "; ".join(said))


def _cache_scales(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if name.endswith(CACHE_SCALES)]


def _refused(checkpoint: Checkpoint, into: ArtifactFormat, why: str) -> SourceError:
    return SourceError(
        f"{into.NAME} cannot hold the checkpoint in {checkpoint.folder}: {why}",
        "take another format: docs/formats.md says what each holds",
    )


def _config(
    checkpoint: Checkpoint,
    into: ArtifactFormat,
    quantized: Mapping[str, Facts],
    kept: list[str],
) -> dict[str, Any]:
    """The checkpoint's config with what the new format says in it."""
    try:
        block = into.config(quantized, kept)
    except ValueError as error:
        raise _refused(checkpoint, into, str(error)) from error
    return {**checkpoint.config, "quantization_config": block}


def _plan(
    checkpoint: Checkpoint, stored: Stored, linears: Mapping[str, Linear], into: ArtifactFormat
) -> dict[str, Planned]:
    """Every tensor of the new checkpoint by name."""
    planned: dict[str, Planned] = {}
    for module, parts in modules_of(checkpoint.tensors).items():
        linear = linears.get(module)
        for suffix, info in parts.items():
            if linear is None or suffix == "bias":
                planned[info.name] = Planned.copy(info)
        if linear is None:
            continue
        scale = linear.tensors[stored.format.SCALE]
        layout = into.layout(linear.form, linear.shape, scale.dtype)
        # GPTQ's g_idx and compressed-tensors' weight_shape go where the weight is.
        file = linear.tensors[stored.format.SPLIT[0]].file.name
        for suffix, (dtype, shape) in layout.items():
            data = functools.partial(_repacked, stored, linear, into, suffix)
            planned[f"{module}.{suffix}"] = Planned(dtype, shape, file, data)
    return planned


def _repacked(stored: Stored, linear: Linear, into: ArtifactFormat, suffix: str) -> Iterator[bytes]:
    """The bytes of one tensor of a linear; SourceError where the format cannot hold its numbers."""
    form: WeightFormat = linear.form
    grid = stored.grid(form, linear.tensors, linear.shape)
    try:
        for piece in into.write(grid, form.symmetric)[suffix]:
            yield piece.tobytes()
    except ValueError as error:
        name = module_name(next(iter(linear.tensors.values())).name)
        raise SourceError(
            f"{into.NAME} cannot hold {name}: {error}",
            "docs/formats.md says what each format holds",
        ) from error
