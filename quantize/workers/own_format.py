"""What the workers share whose engines save in a format of their own: token ids in, folder out."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from quantize.modules import matches
from quantize.protocol import WorkerError, write_json
from quantize.workers.loading import COMPUTED

INDEX = "model.safetensors.index.json"
PACKED = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Ends of the names of the tensors that stand for a quantized module's weight."""


def token_rows(path: str | Path) -> list[list[int]]:
    """The calibrate stage's sequences, in its order."""
    arrays = np.load(path)
    ids, offsets = arrays["ids"], arrays["offsets"]
    return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]


def finish(body: Mapping[str, Any], quantization: Mapping[str, Any], engine: str) -> list[str]:
    """Make the saved folder the checkpoint's own but for its weights; names of quantized modules.

    The weights' files and index stay. config.json is the source's with the `quantization_config`
    that the engine wrote, not what its transformers made of it; `copy` is taken over byte by byte;
    everything else that the engine saved is removed.
    """
    source, output = Path(body["model"]), Path(body["output"])
    for path in output.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            path.unlink()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", config | {"quantization_config": quantization})
    for name in body["copy"]:
        shutil.copyfile(source / name, output / name)
    tied = bool(config.get("tie_word_embeddings"))
    return quantized_modules(tensor_names(source), tensor_names(output), engine, tied=tied)


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in the folder's safetensors files."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            names.update(file.keys())
    return names


def quantized_modules(
    source: set[str], saved: set[str], engine: str, *, tied: bool = False
) -> list[str]:
    """The modules that were packed; a SourceError unless all else is there and nothing besides.

    Libraries fill what a checkpoint lacks at random and leave out what they have no place for.
    """
    packed = {name.rpartition(".")[0] for name in saved if name.endswith(".qweight")}
    weights = {f"{module}.weight" for module in packed}
    kept = {name for name in saved if not name.endswith(PACKED)}
    optional = {"lm_head.weight"} if tied else set()
    wanted = {name for name in source - weights if not name.endswith(COMPUTED)}
    for what, names in (
        ("lost", wanted - kept - optional),
        ("made up", (kept | weights) - source - optional),
    ):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more tensors" if others else ""
            raise WorkerError(
                "SourceError",
                f"{engine} {what} {first}{more}: it does not know this checkpoint as it is",
                "use engine stream",
            )
    return sorted(packed)


def ignored(modules: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of the modules that the recipe leaves as they are, but for the head."""
    return [name for name in modules if name != "lm_head" and matches(name, patterns)]
