"""llm-compressor's `oneshot`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.engines import stream

if TYPE_CHECKING:
    from quantize.quantization import Quantize

NAME = "llmcompressor"
SAID = "llm-compressor's oneshot"
ENVIRONMENT = "llmcompressor"
WORKER = "oneshot"
FORMAT = "compressed-tensors"
METHODS = stream.METHODS


def cannot_do(quantize: Quantize) -> str | None:
    """All of the block but for clipping."""
    return "clip (its AWQ has none)" if quantize.clip else None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """Nothing that can be told from the config."""
    return None
