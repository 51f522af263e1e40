"""Store the result in another format: repacked, not quantized again.

Inputs: `fetch`, `compress`. Writes `model/` and `compress.json`, which says what the compress
stage's does and more::

    {..., "conversion": {"before": "compressed-tensors", "after": "awq", "modules": int,
                         "bytes_before": int, "bytes_after": int}}   # of all tensors

Later stages read it in the role `compress`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quantize.artifact_formats import FORMATS
from quantize.checkpoint import model_folder
from quantize.protocol import write_json
from quantize.remote_code import LET_IN
from quantize.repacking import repack
from quantize.stages.base import Resolved, StageContext

VERSION = 1


def environments(resolved: Resolved, entry_id: str) -> tuple[str, ...]:
    """None: bits are moved in numpy."""
    return ()


def key_inputs(resolved: Resolved, entry_id: str) -> dict[str, Any]:
    """The format; what is repacked is an input."""
    return {"format": resolved.recipe.quantize.effective_format}


def run(context: StageContext) -> None:
    """Write `model/` and `compress.json`."""
    quantize, compress = context.recipe.quantize, context.inputs["compress"]
    output = context.files / "model"
    output.mkdir()
    step = context.runner.progress.step
    repacked = repack(
        model_folder(compress),
        output,
        FORMATS[quantize.effective_format],
        lambda done, total: step("repacking the weights", done / 1e9, total / 1e9, "GB"),
        symmetric=not quantize.effective_scheme.endswith("_ASYM"),
        code=LET_IN,
    )
    context.versions.update(compress.manifest.versions)  # of the tools that made the numbers
    record = compress.json("compress.json") | {"conversion": asdict(repacked)}
    write_json(context.files / "compress.json", record)
