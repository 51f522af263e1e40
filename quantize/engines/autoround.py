"""AutoRound, as a modifier of llm-compressor's `oneshot`: rounding learned by signed gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.recipe import Quantize

NAME = "autoround"
SAID = "AutoRound, in llm-compressor's oneshot"
ENVIRONMENT = "llmcompressor"
WORKER = "oneshot"
FORMAT = "compressed-tensors"
METHODS: Mapping[str, tuple[str, ...]] = {"autoround": ("W4A16",)}


def cannot_do(quantize: Quantize) -> str | None:
    """No overrides and no KV cache: neither has been tried."""
    if quantize.overrides:
        return "overrides"
    return "kv_cache" if quantize.kv_cache is not None else None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """Nothing that can be told from the config."""
    return None
