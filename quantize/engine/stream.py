"""The checkpoint from end to end: part after part, each finished on disk before the next begins."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model

from quantize.engine import memory, sensitivity
from quantize.engine.boundaries import Boundaries
from quantize.engine.hidden import BATCH_TOKENS, Sequences
from quantize.engine.journal import Journal
from quantize.engine.layer import Done, Flow, Layer, Task, quantize_layer
from quantize.engine.ranks import Ranks
from quantize.engine.skeleton import DTYPE, Skeleton
from quantize.engine.source import INDEX, Source, Tensors
from quantize.protocol import WorkerError, write_json

VERSION = 1
"""Raised when the same request would give other bytes: a journal of another version is refused."""

OUTSIDE = "outside"
SAMPLED_TOKENS = 8192
"""Tokens in H where it only ranks candidates (AWQ's grid, the sensitivity record)."""

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")

Say = Callable[[float, int], None]
"""Called with layers done (a fraction counts) and layers in all."""


@dataclass(frozen=True)
class Result:
    """What the worker reports."""

    quantized: list[str]
    layers: list[dict[str, Any]]
    unvisited: list[str]
    not_factorised: list[str]


def stream(body: dict[str, Any], work: Path, ranks: Ranks, say: Say) -> Result:
    """Quantize `body["model"]` into `body["output"]`, going on from what `work` holds."""
    torch.set_grad_enabled(False)
    source = Source(Path(body["model"]))
    skeleton = Skeleton(source.folder, body, ranks.device)
    outside, inside = skeleton.tensor_names(source)
    sequences = _sequences(body, ranks)
    journal = _journal(body, source, work, ranks)
    if ranks.first and OUTSIDE not in journal:
        journal.finish(OUTSIDE, source.read(outside, DTYPE))
    task = _task(body, skeleton, sequences, ranks)
    boundaries = None
    if sequences is not None:
        boundaries = Boundaries(skeleton, sequences, work, ranks)
    first = _first(journal, boundaries, len(inside))
    layers = source.read_ahead(inside[first:], DTYPE)
    flows = _flows(boundaries, range(first, len(inside)), source)
    for (index, flow), tensors in zip(flows, layers, strict=True):
        started = time.monotonic()
        done = _one_layer(skeleton, index, tensors, task, flow, say)
        if ranks.first:
            journal.finish(index, done.tensors, **_layer_record(index, started, done))
        ranks.wait()
        if boundaries is not None and flow is not None:
            boundaries.passed(index, flow)
        del done
        memory.trim()
        say(index + 1, len(inside))
    if ranks.first:
        journal.check()
        _assemble(body, journal, skeleton, len(inside))
        _write_sensitivity(body, journal, sequences, task)
    return _result(journal, skeleton, len(inside))


def _sequences(body: dict[str, Any], ranks: Ranks) -> Sequences | None:
    if not body["tokens"]:
        return None
    arrays = np.load(body["tokens"])
    # At least four batches a rank, so that none waits long for another.
    limit = min(BATCH_TOKENS[ranks.device.type], arrays["ids"].size // (4 * ranks.size))
    sequences = Sequences(arrays["ids"], arrays["offsets"], limit)
    if len(sequences.batches) < ranks.size:
        raise WorkerError(
            "UsageError",
            f"{len(sequences.batches)} batches of calibration data for {ranks.size} processes",
            "use more samples or fewer devices",
        )
    return sequences


def _journal(body: dict[str, Any], source: Source, work: Path, ranks: Ranks) -> Journal:
    """Rank 0's is there before the others read it."""
    belongs_to = _belongs_to(body, source)
    if ranks.first:
        journal = Journal(work, belongs_to)
    ranks.wait()
    if not ranks.first:
        journal = Journal(work, belongs_to, writes=False)
    ranks.wait()
    return journal


def _belongs_to(body: dict[str, Any], source: Source) -> dict[str, Any]:
    """Everything that decides the output's bytes, by name, so a refusal can say what changed."""
    places = ("model", "output", "tokens", "copy")
    request = {key: value for key, value in body.items() if key not in places}
    tokens = Path(body["tokens"]).read_bytes() if body["tokens"] else b""
    return {
        "engine": VERSION,
        "checkpoint": source.fingerprint(),
        "calibration": hashlib.sha256(tokens).hexdigest(),
        **{f"quantize.{key}": value for key, value in sorted(request.items())},
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _first(journal: Journal, boundaries: Boundaries | None, layers: int) -> int:
    """The layer to begin with; those behind it that the journal has are done again."""
    unfinished = next((index for index in range(layers) if index not in journal), layers)
    if boundaries is None or unfinished == layers:
        return unfinished
    first = boundaries.newest(unfinished)
    if first < unfinished:
        print(f"from layer {first}, not {unfinished}: the data behind those between is not on disk")
    journal.forget(range(first, layers))
    return first


def _flows(
    boundaries: Boundaries | None, layers: range, source: Source
) -> Iterator[tuple[int, Flow | None]]:
    """Each layer's number with its part of the data's way; without data, with None."""
    if boundaries is None:
        return ((index, None) for index in layers)
    return boundaries.flows(layers, source)


def _task(
    body: dict[str, Any], skeleton: Skeleton, sequences: Sequences | None, ranks: Ranks
) -> Task:
    gptq = "gptq" in body["method"] or body["method"] == "int8"
    every = 1
    if sequences is not None and not gptq:
        every = max(1, sequences.tokens // SAMPLED_TOKENS)
    smooth = get_layer_mappings_from_model(skeleton.model) if "awq" in body["method"] else ()
    return Task(tuple(smooth), gptq, body["dampening"], every, ranks, clip=body.get("clip", False))


def _one_layer(
    skeleton: Skeleton, index: int, tensors: Tensors, task: Task, flow: Flow | None, say: Say
) -> Done:
    prefix = skeleton.prefix(index)
    schemes = {
        name.removeprefix(prefix): scheme
        for name, scheme in skeleton.schemes.items()
        if name.startswith(prefix)
    }
    with skeleton.filled(index, tensors) as module:
        tensors.clear()
        layer = Layer(index, prefix, module, schemes)
        done: Done = quantize_layer(
            layer, task, flow, lambda share: say(index + share, len(skeleton.layers))
        )
        return done


def _layer_record(index: int, started: float, done: Done) -> dict[str, Any]:
    return {
        "layer": index,
        "seconds": time.monotonic() - started,
        "smoothed": done.smoothed,
        **({"clipped": done.clipped} if done.clipped else {}),
        "sensitivity": done.sensitivity,
        "unvisited": done.unvisited,
        "not_factorised": done.not_factorised,
    }


def _assemble(body: dict[str, Any], journal: Journal, skeleton: Skeleton, layers: int) -> None:
    """The checkpoint folder: shards by hard link, index, config, files taken over as they are."""
    output, model = Path(body["output"]), Path(body["model"])
    output.mkdir(parents=True, exist_ok=True)
    parts = [journal.entries[part] for part in (OUTSIDE, *map(str, range(layers)))]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _place(journal.folder / part["shard"], output / name)
        weight_map |= dict.fromkeys(part["tensors"], name)
    total = sum(size for part in parts for size in part["tensors"].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(output / INDEX, index)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    named = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[named] = str(DTYPE).removeprefix("torch.")
    write_json(output / "config.json", config)
    skeleton.update_config(output)
    for name in body["copy"]:
        shutil.copyfile(model / name, output / name)


def _place(shard: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(shard, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(shard, target)


def _write_sensitivity(
    body: dict[str, Any], journal: Journal, sequences: Sequences | None, task: Task
) -> None:
    if sequences is None:
        return
    linears = [
        linear for part in journal.entries.values() for linear in part.get("sensitivity", ())
    ]
    record = {
        "version": sensitivity.VERSION,
        "tokens": sequences.sampled(task.sample_every),
        "linears": sorted(linears, key=lambda linear: (linear["layer"], linear["name"])),
    }
    write_json(Path(body["output"]).parent / "sensitivity.json", record)


def _result(journal: Journal, skeleton: Skeleton, layers: int) -> Result:
    parts = [journal.entries[str(index)] for index in range(layers) if index in journal]

    def named(key: str) -> Iterator[str]:
        return (name for part in parts for name in part[key])

    return Result(
        quantized=sorted(name for name, scheme in skeleton.schemes.items() if scheme.weights),
        layers=[
            {key: part[key] for key in ("layer", "seconds", "clipped") if key in part}
            for part in parts
        ],
        unvisited=list(named("unvisited")),
        not_factorised=list(named("not_factorised")),
    )
