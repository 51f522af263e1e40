"""AutoAWQ 0.2.9, archived upstream since May 2025; kept because recipes in the field name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.recipe import Quantize

NAME = "autoawq"
SAID = "AutoAWQ"
ENVIRONMENT = "autoawq"
WORKER = "autoawq"
FORMAT = "awq"
METHODS: Mapping[str, tuple[str, ...]] = {"awq": ("W4A16_ASYM",)}


def cannot_do(quantize: Quantize) -> str | None:
    """One scheme for all linears of the layers."""
    if quantize.overrides:
        return "overrides"
    return "kv_cache" if quantize.kv_cache is not None else None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """See the protocol."""
    return None
