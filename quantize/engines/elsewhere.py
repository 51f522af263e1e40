"""No engine of ours: the recipe names an artifact that somebody quantized elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.engines import stream

if TYPE_CHECKING:
    from quantize.quantization import Quantize

NAME = "elsewhere"
SAID = "none of ours: quantized elsewhere, and taken as it is"
ENVIRONMENT = ""
WORKER = ""
FORMAT = "compressed-tensors"
METHODS: Mapping[str, tuple[str, ...]] = {**stream.METHODS, "autoround": ("W4A16",)}
"""AutoRound is no engine here (docs/engines.md); what it made can be measured."""


def cannot_do(quantize: Quantize) -> str | None:
    """All of the block: the audit tells whether the artifact is what it says."""
    return None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """Nothing is loaded."""
    return None
