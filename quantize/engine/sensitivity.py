"""What each linear would lose at each scheme, recorded while its H is in memory."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, initialize_module_for_quantization

from quantize.engine.inputs import Inputs, bf16_products
from quantize.engine.nearest import nearest, sample_rows
from quantize.engine.schemes import scheme
from quantize.modules import served_unit

VERSION = 1

CANDIDATES: tuple[tuple[str, int | None], ...] = (
    ("W4A16", 128),
    ("W4A16", 32),
    ("W4A16_ASYM", 128),
    ("W4A16_ASYM", 32),
    ("W8A16", 128),
    ("FP8_DYNAMIC", None),
)
ROWS = 256


def record(name: str, layer: int, module: torch.nn.Module, inputs: Inputs) -> dict[str, Any] | None:
    """One linear of `sensitivity.json`; see docs/search.md for the fields.

    error = tr(E H ET) / tr(W H WT), E = Q(W) - W with Q rounding to nearest: the squared error of
    the linear's output over the calibration tokens, relative to the output; dimensionless, from
    at most `ROWS` evenly spaced rows.
    """
    weight = module.weight
    rows, columns = weight.shape
    candidates: list[dict[str, Any]] = []
    with bf16_products():
        some = sample_rows(weight, ROWS).float()
        total = float(((some @ inputs.gram) * some).sum())
        if not total > 0:  # dead inputs or weights: nothing to lose, no ratio to give
            return None
        for scheme_name, group_size in CANDIDATES:
            if group_size is not None and columns % group_size:
                continue
            args = scheme(scheme_name, group_size, ["Linear"])
            sampled = sample_rows(weight, ROWS)
            error = nearest(sampled, args.weights).float() - sampled.float()
            lost = float(((error @ inputs.gram) * error).sum())
            candidates.append(
                {
                    "scheme": scheme_name,
                    "group_size": group_size,
                    "bytes": _bytes(rows, columns, weight.dtype, args),
                    "error": lost / total,
                }
            )
    plain = {"scheme": "BF16", "group_size": None, "bytes": 2 * rows * columns, "error": 0.0}
    return {
        "name": name,
        "layer": layer,
        "unit": served_unit(name),
        "shape": [rows, columns],
        "candidates": [*candidates, plain],
    }


def _bytes(rows: int, columns: int, dtype: torch.dtype, made: QuantizationScheme) -> int:
    """Bytes of all tensors of one linear in its compressed format: asked of the packer itself."""
    with torch.device("meta"):
        module = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
        initialize_module_for_quantization(module, made)
    state = dict(module.state_dict())
    packer = BaseCompressor.get_value_from_registry(
        infer_module_format(torch.nn.Linear, made).value
    )
    packed = packer.compress(state, made)
    if "weight_zero_point" in packed:  # not packed on the meta device
        scales = packed["weight_scale"].shape[-1]
        words = -(-rows * made.weights.num_bits // 32)
        packed["weight_zero_point"] = torch.empty(words, scales, dtype=torch.int32, device="meta")
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
