"""How quantized checkpoints are stored: one file per format, in the literal table `FORMATS`.

Arrays in, arrays out: nothing here opens a file. A file's tensors come from :mod:`quantize.stored`.
"""

from __future__ import annotations

from typing import cast

from quantize.artifact_formats import awq, compressed_tensors, gptq
from quantize.artifact_formats.base import ArtifactFormat, Facts, Grid

__all__ = ["FORMATS", "ArtifactFormat", "Facts", "Grid", "format_of"]

FORMATS: dict[str, ArtifactFormat] = {
    "compressed-tensors": cast(ArtifactFormat, compressed_tensors),
    "awq": cast(ArtifactFormat, awq),
    "gptq": cast(ArtifactFormat, gptq),
}
"""Those that hold safetensors. GGUF is a file of its own kind, which llama.cpp alone writes."""


def format_of(name: str) -> ArtifactFormat:
    """The format of that name; what is in no table of ours is sized as compressed-tensors is."""
    return FORMATS.get(name, FORMATS["compressed-tensors"])
