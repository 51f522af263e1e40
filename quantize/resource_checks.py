"""Does the machine have what the stages need? By the formulas of :mod:`quantize.capacity`.

Only what is certain is refused: weights, matrices, files. What an estimate adds for libraries and
allocators is in `quantize plan`, and keeps nobody from trying.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.capacity.cards import find_card
from quantize.capacity.estimate import (
    Needs,
    cache_value_bytes,
    context_length,
    served_bytes,
    stage_needs,
)
from quantize.capacity.parts import Peak
from quantize.capacity.serving import PARALLEL_SIZES, attention, least_gpus
from quantize.checkpoint import Checkpoint
from quantize.environments import accelerator as accelerator_here
from quantize.errors import ResourceError
from quantize.findings import Finding
from quantize.machine import gpus, memory_bytes
from quantize.quantization import Quantize
from quantize.recipe import Recipe
from quantize.source_checks import promised_bytes, tensor_parallel_faults
from quantize.stages.fetch import BASE

SLACK_BYTES = 256 << 20
"""Logs, samples and token ids of one run."""

CHECKED = {
    "fetch": ("fetch",),
    "gguf": ("gguf",),
    "calibrate": ("calibrate",),
    "compress": ("compress",),
    "adopt": ("adopt",),
    "convert": ("convert",),
    "measure": ("measure-baseline", "measure-candidate"),
}
"""Kind of a stage → the stages of that kind that need the most."""

OTHERWISE = ("--cpu-offload-gb", "--kv-cache-dtype", "--max-model-len", "--pipeline-parallel-size")
"""Flags of vLLM in `serve.extra_args` by which a server needs less of a GPU than is computed."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that the run is meant for: `count` of one kind; `bytes` of the smallest."""

    name: str
    bytes: int
    count: int


def check_resources(
    checkpoint: Checkpoint,
    recipe: Recipe,
    store: Path,
    to_run: Collection[str],
    accelerator: str | None = None,
    *,
    downloads: Collection[str] = (),
    unpacks: bool = False,
) -> list[Finding]:
    """Host memory, disk and GPU memory for the stages that will run.

    `to_run` has their kinds, and may have the ids of those that measure.
    A recipe that names `machine.gpu` is meant for such a machine. `downloads` has the ids of
    the fetch stages whose checkpoint is on the Hub: one download is counted, for `fetch` in
    `to_run` may be the kind of `fetch-base` alone. `unpacks`: the candidate is measured in BF16.
    """
    here = accelerator or accelerator_here()
    device = here if recipe.machine.gpu is None else "cuda"
    unpacks = unpacks and device == "cpu"
    stages = [(name, kind) for kind in CHECKED if kind in to_run for name in CHECKED[kind]]
    measured = set(CHECKED["measure"]) & set(to_run)
    if measured:  # a baseline may have been measured elsewhere
        stages = [(name, kind) for name, kind in stages if kind != "measure" or name in measured]
    if BASE in to_run and "fetch" not in downloads:
        stages.append((BASE, "fetch"))
    absent = {"adopt" if recipe.quantize.artifact is None else "compress"}
    absent |= set() if recipe.quantize.repacks else {"convert"}
    absent |= set() if recipe.quantize.effective_format == "gguf" else {"gguf"}
    absent |= set() if recipe.evaluate is not None else {"measure"}
    stages = [(name, kind) for name, kind in stages if kind not in absent]
    if not stages:
        return []
    needs = stage_needs(checkpoint, recipe, device, stages, downloads=downloads, unpacks=unpacks)
    findings = _check_disk(checkpoint, recipe, store, to_run, needs)
    findings += _check_memory(needs)
    target = target_gpus(recipe, here)
    if target is not None:
        findings += check_gpus(checkpoint, recipe, target, needs)
    return findings


def target_gpus(recipe: Recipe, accelerator: str) -> Gpus | None:
    """The recipe's machine, or the GPUs that are here; None without any."""
    machine = recipe.machine
    if machine.gpu is not None:
        card = find_card(machine.gpu)
        assert card is not None, "the recipe names a card of the table"
        return Gpus(card.name, card.bytes, machine.gpus or 1)
    found = gpus() if accelerator == "cuda" else []
    if not found:
        return None
    name, size = min(found, key=lambda one: one[1])
    return Gpus(name, size, machine.gpus or len(found))


def _check_disk(
    checkpoint: Checkpoint,
    recipe: Recipe,
    store: Path,
    to_run: Collection[str],
    needs: Sequence[Needs],
) -> list[Finding]:
    """The store's file system, and that of the published folder, which is a copy."""
    places = [
        (
            store,
            f"the store {store}",
            SLACK_BYTES + sum(p.bytes for one in needs for p in one.disk if not p.spare),
            "free some with `quantize store gc`, or name another place with --store",
        )
    ]
    folder = recipe.publish.folder
    if folder is not None and "publish" in to_run:
        path, hint = Path(folder).expanduser(), "free some, or set another publish.folder"
        places.append(
            (path, f"the file system of {folder}", promised_bytes(checkpoint, recipe), hint)
        )
    total: dict[int, int] = {}  # what earlier places of the same file system take
    findings = []
    for place, name, needed, hint in places:
        there = next(p for p in (place, *place.absolute().parents) if p.exists())
        device, free = there.stat().st_dev, shutil.disk_usage(there).free
        total[device] = total.get(device, 0) + needed
        if free < total[device]:
            message = (
                f"{name} has {free} bytes free ({_gb(free)}), "
                f"this run writes about {total[device]} ({_gb(total[device])})"
            )
            findings.append(Finding(message, hint, ResourceError))
    return findings


def _check_memory(needs: Sequence[Needs]) -> list[Finding]:
    """The machine's memory, or its control group's limit."""
    memory = memory_bytes()
    return [
        Finding(
            f"{one.stage} needs {_gb(one.host.certain)} of memory ({_said(one.host)}), "
            f"this machine has {_gb(memory)}",
            "run on a machine with more memory",
            ResourceError,
        )
        for one in needs
        if memory < one.host.certain
    ]


def check_gpus(
    checkpoint: Checkpoint, recipe: Recipe, target: Gpus, needs: Sequence[Needs]
) -> list[Finding]:
    """GPU memory, and how many GPUs a server is asked to use."""
    findings = []
    for one in needs:
        given = {argument.partition("=")[0] for argument in recipe.serve.extra_args}
        if one.device is None or (one.kind == "measure" and given & set(OTHERWISE)):
            continue
        usable = target.bytes
        if one.kind == "measure":
            usable = round(recipe.serve.gpu_memory_utilization * target.bytes)
        if one.device.certain > usable:
            share = "" if usable == target.bytes else f" (of which vLLM takes {_gb(usable)})"
            each = f" on each of {one.gpus} GPUs" if one.gpus > 1 else ""
            message = (
                f"{one.stage} needs {_gb(one.device.certain)} of GPU memory{each} "
                f"({_said(one.device)}), {target.name} has {_gb(target.bytes)}{share}"
            )
            findings.append(
                Finding(message, _remedy(checkpoint, recipe, target, one), ResourceError)
            )
        elif one.gpus > target.count:
            message = (
                f"{one.stage} serves on {one.gpus} GPUs, the machine has {target.count} "
                f"({target.name})"
            )
            hint = f"set serve.tensor_parallel_size to {target.count}, or use more GPUs"
            findings.append(Finding(message, hint, ResourceError))
    return findings


def _remedy(checkpoint: Checkpoint, recipe: Recipe, target: Gpus, one: Needs) -> str:
    """What would do: a tensor-parallel size, a shorter context, or a larger card."""
    if one.kind != "measure":
        return "use a GPU with more memory, or run this stage on the CPU"
    fewest = fitting_size(checkpoint, recipe, target.bytes, one.stage)
    if fewest is None:
        return "use GPUs with more memory, or lower serve.max_model_len"
    enough = "" if fewest <= target.count else f" on a machine with {fewest} such GPUs"
    return (
        f"set serve.tensor_parallel_size to {fewest}{enough}; or lower serve.max_model_len, "
        "or use GPUs with more memory"
    )


def even_sizes(checkpoint: Checkpoint, quantize: Quantize | None) -> tuple[int, ...]:
    """Tensor-parallel sizes that split the checkpoint, or what is made of it, evenly."""
    return tuple(
        size for size in PARALLEL_SIZES if not tensor_parallel_faults(checkpoint, quantize, size)
    )


def fitting_size(
    checkpoint: Checkpoint,
    recipe: Recipe,
    gpu_bytes: int,
    stage: str,
    sizes: Sequence[int] | None = None,
) -> int | None:
    """The smallest of the sizes (those that split evenly) that holds weights and one request."""
    shape = attention(checkpoint.text_config)
    if isinstance(shape, str):
        return None
    if sizes is None:
        quantized = stage == "measure-candidate"
        sizes = even_sizes(checkpoint, recipe.quantize if quantized else None)
    return least_gpus(
        gpu_bytes,
        recipe.serve.gpu_memory_utilization,
        served_bytes(checkpoint, recipe, stage, unpacks=False),
        shape,
        context_length(checkpoint, recipe) or 1,
        sizes,
        cache_value_bytes(recipe, stage),
    )


def _said(peak: Peak) -> str:
    """The parts that are certain, largest first."""
    certain = sorted((part for part in peak.parts if not part.spare), key=lambda part: -part.bytes)
    return ", ".join(f"{part.what} {_gb(part.bytes)}" for part in certain if part.bytes)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
