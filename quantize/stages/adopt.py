"""Adopt: a checkpoint that was quantized elsewhere, instead of the compress stage's result.

Input: `fetch`, what it was made from. Files: `model/`, and `compress.json` with what the recipe
says of it and who wrote it, as far as its config.json tells::

    {"engine": "elsewhere", "method", "scheme", "group_size", "ignore", ...,
     "made_by": text,                       # quant_method, and the tool's version where it is said
     "from": {"repo", "commit"} or {"folder": base name}}

Whether it is the source, quantized as the recipe says, is for the audit to tell, as of any result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.checkpoint import read_checkpoint
from quantize.errors import SourceError
from quantize.keys import digest
from quantize.model_files import CHECKPOINT_FILES
from quantize.printable import shortened
from quantize.protocol import write_json
from quantize.stages.base import Resolved, StageContext
from quantize.stages.compress import what_is_asked
from quantize.stages.fetch import download, hash_files, link_or_copy

VERSION = 1

INPUT = "artifact"
"""What the resolved inputs call it."""


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: files are looked at and copied."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The artifact's contents, and what the recipe says of them."""
    return {"artifact": resolved.digests[INPUT], **what_is_asked(resolved.recipe.quantize)}


def run(context: StageContext) -> None:
    """Bring the artifact here; a SourceError where it is no sound checkpoint."""
    quantize = context.recipe.quantize
    assert quantize.artifact is not None, "the planner adds this stage only for an artifact"
    local = context.resolved.paths.get(INPUT)
    if local is None:
        folder = download(context, INPUT, context.work / "model", CHECKPOINT_FILES)
        repo, _, commit = context.resolved.digests[INPUT].rpartition("@")
        origin = {"repo": repo, "commit": commit}
    else:
        folder, origin = local.absolute(), {"folder": local.absolute().name}
    checkpoint = read_checkpoint(folder, allow_quantized=True)
    step = context.runner.progress.step
    if local is not None:
        entries = hash_files(folder, checkpoint.files, step)
        _unchanged(context, folder, digest({entry.name: entry.sha256 for entry in entries}))
    output = context.files / "model"
    output.mkdir()
    for done, name in enumerate(checkpoint.files):
        step("taking over the checkpoint", done, len(checkpoint.files))
        if local is None:
            link_or_copy(str(folder / name), str(output / name))
        else:  # no link: whoever owns the folder may write to it
            shutil.copyfile(folder / name, output / name)
    write_json(
        context.files / "compress.json",
        {
            **what_is_asked(quantize),
            "engine": quantize.engine,
            "made_by": made_by(checkpoint.config),
            "from": origin,
            "versions": {},
        },
    )


def _unchanged(context: StageContext, folder: Path, found: str) -> None:
    if found != context.resolved.digests[INPUT]:
        raise SourceError(
            f"the artifact in {folder} changed after the run began",
            "run the command again once nobody writes there",
        )


def made_by(config: Mapping[str, Any]) -> str:
    """Which tool's format, and which version of it, `config.json` says; `an unknown tool`."""
    block = config.get("quantization_config")
    if not isinstance(block, Mapping):
        return "an unknown tool"
    said = [str(block.get("quant_method") or "an unknown tool")]
    meta = block.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else block.get("version")
    if isinstance(quantizer, list):
        quantizer = ", ".join(map(str, quantizer))
    if isinstance(quantizer, str) and quantizer:
        said.append(shortened(quantizer))
    return ", ".join(said)
