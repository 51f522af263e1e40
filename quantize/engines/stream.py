"""Our own streaming quantizer (:mod:`quantize.engine`), in llm-compressor's environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.engine.support import why_not

if TYPE_CHECKING:
    from quantize.quantization import Quantize
    from quantize.recipe import Recipe

NAME = "stream"
SAID = "quantize's own, a decoder layer at a time"
ENVIRONMENT = "llmcompressor"
WORKER = "stream"
FORMAT = "compressed-tensors"
METHODS: Mapping[str, tuple[str, ...]] = {
    "awq": ("W4A16_ASYM", "W4A16", "W8A16"),
    "gptq": ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "NVFP4A16", "MXFP4A16"),
    "awq+gptq": ("W4A16_ASYM", "W4A16"),
    "rtn": ("W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16"),
    "fp8": ("FP8_DYNAMIC", "FP8", "FP8_BLOCK"),
    "int8": ("W8A8",),
}


def cannot_do(quantize: Quantize) -> str | None:
    """All of the block; what it does not know of a checkpoint it leaves to `llmcompressor`."""
    return None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """Nothing: other architectures go to `llmcompressor`."""
    return None


def leaves(architecture: str, recipe: Recipe) -> str | None:
    """Why `llmcompressor` quantizes this checkpoint instead, or None."""
    if recipe.model.trust_remote_code is not None:
        return "the streaming engine runs no code of a checkpoint"
    return why_not(architecture, recipe.quantize.ignore)
