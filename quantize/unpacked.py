"""A quantized checkpoint with its weights unpacked to BF16, for servers that lack a kernel.

Of a scheme that leaves activations alone, packed and unpacked weights are the same function: a
kernel for packed weights computes scale * (q - zero point) itself, and multiplies in BF16. So what
quantizing cost can be measured on any machine; what a kernel does, and how fast, cannot.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantize.checkpoint import Checkpoint, read_checkpoint
from quantize.errors import ToolError
from quantize.formats import WeightFormat, module_formats, weight_format
from quantize.quantization import Quantize
from quantize.remote_code import LET_IN
from quantize.rewriting import OnProgress, Planned, write_checkpoint
from quantize.stored import Parts, Stored, modules_of, stored_as
from quantize.tensors import from_float32

ROWS = 1024
"""Of a weight that are unpacked at a time: for 8192 columns 32 MiB in FP32."""


def is_weight_only(quantize: Quantize) -> bool:
    """Whether no scheme of the recipe quantizes activations."""
    schemes = [quantize.effective_scheme, *(part.scheme for part in quantize.overrides)]
    if quantize.effective_format == "gguf":
        return False  # what serves GGUF computes with its weights as they are
    return all(weight_format(scheme, None).activations is None for scheme in schemes)


def write_unpacked(
    artifact: Path, source: Path, quantize: Quantize, target: Path, on_progress: OnProgress
) -> None:
    """Write the checkpoint `artifact` to `target`, every weight in the source's shape, unpacked.

    `source` is what `artifact` was made from, by `quantize`. An earlier `target` is replaced.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    made = read_checkpoint(artifact, allow_quantized=True, code=LET_IN)
    planned = _plan(made, read_checkpoint(source, code=LET_IN), quantize)
    files = [path.name for path in artifact.iterdir() if path.is_file()]
    config = {k: value for k, value in made.config.items() if k != "quantization_config"}
    write_checkpoint(target, planned, artifact, files, config, on_progress)


def _plan(made: Checkpoint, source: Checkpoint, quantize: Quantize) -> dict[str, Planned]:
    """Every tensor of the unpacked checkpoint by name; scales of a KV cache are left out.

    They go with the config that asks for an FP8 cache.
    """
    formats, stored = module_formats(quantize), stored_as(quantize, made.config)
    planned = {}
    for module, parts in modules_of(made.tensors).items():
        form = formats.of(module) if stored.format.SCALE in parts else None
        for suffix, info in parts.items():
            if form is None or suffix == "bias":
                planned[info.name] = Planned.copy(info)
        if form is not None:
            weight = source.tensors.get(f"{module}.weight")
            if weight is None:
                raise ToolError(f"{module} is quantized, and the source has no such weight")
            numbers = {suffix: info for suffix, info in parts.items() if suffix != "bias"}
            data = functools.partial(_in_bf16, stored, form, numbers, weight.shape)
            file = next(iter(parts.values())).file.name
            planned[weight.name] = Planned("BF16", weight.shape, file, data)
    return planned


def _in_bf16(
    stored: Stored, form: WeightFormat, parts: Parts, shape: tuple[int, ...]
) -> Iterator[bytes]:
    """The bytes of a weight (out, in), some rows at a time."""
    for start in range(0, shape[0], ROWS):
        wanted = np.arange(start, min(start + ROWS, shape[0]))
        values = stored.dequantized_rows(form, parts, wanted, shape)
        yield from_float32(np.ascontiguousarray(values, dtype=np.float32), "BF16").tobytes()
