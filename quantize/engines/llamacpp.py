"""llama.cpp's own converter and quantizer: GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.quantization import Quantize

NAME = "llamacpp"
SAID = "llama.cpp's converter and quantizer"
ENVIRONMENT = "llamacpp"
WORKER = "gguf"
FORMAT = "gguf"
ARCHITECTURES = Path(__file__).parent.parent / "data" / "llamacpp.json"
"""`TEXT_MODEL_MAP` of llama.cpp's conversion/__init__.py, of the version that the lock pins."""

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
    """The converter has a class for each architecture; tokenizers are looked at when it runs."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no architecture"
    table = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    if architecture in table["architectures"]:
        return None
    version = table["llama-cpp-python"]
    return (
        f"llama.cpp's converter (of llama-cpp-python {version}) does not know {architecture}: it "
        f"has {len(table['architectures'])} architectures"
    )
