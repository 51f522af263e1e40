"""GPTQModel 7.7, the maintained successor of AutoGPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.recipe import Quantize

NAME = "gptqmodel"
SAID = "GPTQModel, the successor of AutoGPTQ"
ENVIRONMENT = "gptqmodel"
WORKER = "gptqmodel"
FORMAT = "gptq"
METHODS: Mapping[str, tuple[str, ...]] = {"gptq": ("W4A16", "W4A16_ASYM", "W8A16")}


def cannot_do(quantize: Quantize) -> str | None:
    """One scheme for all linears of the layers."""
    if quantize.overrides:
        return "overrides"
    return "kv_cache" if quantize.kv_cache is not None else None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """See the protocol."""
    return None
