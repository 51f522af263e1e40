"""Sensitivity records like the engine's, and what a recipe does with a module."""

from __future__ import annotations

import random
from typing import Any

from quantize.modules import matches, served_unit
from quantize.quantization import Quantize
from quantize.sensitivity import BF16, Choice

SCHEMES = (("W4A16_ASYM", 128), ("W4A16_ASYM", 32), ("W8A16", 128), ("FP8_DYNAMIC", None))
BITS: dict[tuple[str, int | None], float] = {
    ("W4A16_ASYM", 128): 4.15625,
    ("W4A16_ASYM", 32): 4.625,
    ("W8A16", 128): 8.125,
}
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (64, 256),
    "self_attn.v_proj": (64, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}


def record(layers: int = 4, seed: int = 0) -> dict[str, Any]:
    """A sensitivity record like the engine's, with errors spread over a decade."""
    draw = random.Random(seed)
    linears = []
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            module = f"model.layers.{layer}.{name}"
            base = draw.lognormvariate(-4.5, 0.7)
            candidates: list[dict[str, Any]] = [
                {
                    "scheme": scheme,
                    "group_size": group,
                    "bytes": int(rows * columns * BITS.get((scheme, group), 8 + 16 / columns) / 8),
                    "error": base / (1, 1.7, 300, 25)[index],
                }
                for index, (scheme, group) in enumerate(SCHEMES)
            ]
            bf16 = {"scheme": "BF16", "group_size": None, "bytes": 2 * rows * columns, "error": 0.0}
            linears.append(
                {
                    "name": module,
                    "layer": layer,
                    "unit": served_unit(module),
                    "shape": [rows, columns],
                    "candidates": [*candidates, bf16],
                }
            )
    return {"version": 1, "tokens": 4096, "linears": linears}


def choice_of(quantize: Quantize, module: str) -> Choice:
    """What a recipe does with a module: ignore beats all, then the first override that names it."""
    if matches(module, quantize.ignore):
        return BF16
    for override in quantize.effective_overrides:
        if matches(module, override["modules"]):
            return Choice(override["scheme"], override["group_size"])
    return Choice(quantize.effective_scheme, quantize.effective_group_size)
