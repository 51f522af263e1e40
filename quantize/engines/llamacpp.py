"""llama.cpp's own converter and quantizer: GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.recipe import Quantize

NAME = "llamacpp"
SAID = "llama.cpp's converter and quantizer"
ENVIRONMENT = "llamacpp"
WORKER = "gguf"
FORMAT = "gguf"
METHODS: Mapping[str, tuple[str, ...]] = {
    "gguf": (
        "Q4_K_M",
        "Q4_K_S",
        "Q5_K_M",
        "Q5_K_S",
        "Q6_K",
        "Q8_0",
        "Q3_K_M",
        "Q2_K",
        "IQ4_XS",
        "IQ4_NL",
        "Q4_0",
    )
}


def cannot_do(quantize: Quantize) -> str | None:
    """The type says which tensor gets which format: llama.cpp's own mixture."""
    if quantize.overrides:
        return "overrides"
    if quantize.kv_cache is not None:
        return "kv_cache"
    return "ignore, beside lm_head" if set(quantize.ignore) - {"lm_head"} else None


def cannot_read(config: Mapping[str, Any]) -> str | None:
    """See the protocol."""
    return None
