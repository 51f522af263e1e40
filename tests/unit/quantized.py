"""Tiny checkpoints quantized to nearest, in numpy: what the compress stage would make of them.

Written by the formats' specifications; nothing is shared with the readers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Tensors, bf16, floats, llama_config, write_checkpoint

from quantize.quantization import Quantize

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers (n, m) into int32 words (n, ceil(m * bits / 32)), the first lowest."""
    per_word = 32 // bits
    rows = []
    for row in values.tolist():
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for place, value in enumerate(row[start : start + per_word]):
                word |= (value + (1 << (bits - 1))) << (place * bits)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return np.array(rows, "<i4")


def scheme_of(module: str, quantize: Quantize) -> tuple[str, int | str]:
    """Scheme and group size: the first override that names the module, else the block's own."""
    for override in quantize.overrides:
        for entry in override.modules:
            named = re.match(entry[3:], module) if entry.startswith("re:") else entry == module
            if named:
                return override.scheme, override.group_size or 128
    return quantize.effective_scheme, quantize.group_size or 128


def quantized_tensors(tensors: Tensors, quantize: Quantize) -> Tensors:
    """Every linear of the layers, rounded to nearest; the rest as it is."""
    result: Tensors = {}
    for name, (dtype, bits) in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = (dtype, bits)
            continue
        module = name.removesuffix(".weight")
        parts = _quantized(floats(bits), *scheme_of(module, quantize))
        result |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        if quantize.kv_cache and module.endswith(".k_proj"):
            attention = module.removesuffix(".k_proj")
            for part in "kv":
                result[f"{attention}.{part}_scale"] = ("BF16", bf16(np.array([0.02])))
    return result


def _quantized(weight: np.ndarray, scheme: str, size: int | str) -> Tensors:
    match scheme:
        case "W4A16" | "W4A16_ASYM" | "W8A16":
            return _packed(weight, scheme, weight.shape[1] if size == "channel" else int(size))
        case "W8A8":
            scale = bf16(np.abs(weight).max(1, keepdims=True) / 127 * 1.01)
            q = np.clip(np.round(weight / floats(scale)), -128, 127).astype("i1")
            return {"weight": ("I8", q), "weight_scale": ("BF16", scale)}
        case "NVFP4A16" | "MXFP4A16":
            return _fp4(weight, scheme)
    return _fp8(weight, scheme)


def _packed(weight: np.ndarray, scheme: str, group: int) -> Tensors:
    rows, columns = weight.shape
    bits = 8 if scheme == "W8A16" else 4
    groups = weight.reshape(rows, columns // group, group)
    top = (1 << (bits - 1)) - 1
    if scheme == "W4A16_ASYM":
        low, high = groups.min(-1), groups.max(-1)
        scale = bf16((high - low) / 15 * 1.01)
        zero = np.clip(np.round(-8 - low / floats(scale)), -8, 7).astype(int)
    else:
        scale = bf16(np.abs(groups).max(-1) / top * 1.01)
        zero = np.zeros(scale.shape, int)
    q = np.round(groups / floats(scale)[..., None]) + zero[..., None]
    q = np.clip(q, -top - 1, top).astype(int).reshape(rows, columns)
    parts: Tensors = {
        "weight_packed": ("I32", pack(q, bits)),
        "weight_scale": ("BF16", scale),
        "weight_shape": ("I64", np.array([rows, columns], "<i8")),
    }
    if scheme == "W4A16_ASYM":
        parts["weight_zero_point"] = ("I32", pack(zero.T, bits).T)
    return parts


def _fp4(weight: np.ndarray, scheme: str) -> Tensors:
    rows, columns = weight.shape
    size = 16 if scheme == "NVFP4A16" else 32
    groups = weight.astype(np.float64).reshape(rows, columns // size, size)
    largest = np.abs(groups).max(-1)
    if scheme == "NVFP4A16":  # FP8 scales, times one FP32 factor that makes them fill FP8's range
        factor = np.float32(448 * 6 / largest.max())
        scale = e4m3(largest / 6 * factor)
        values = e4m3_values(scale) / factor
        parts: Tensors = {"weight_scale": ("F8_E4M3", scale)}
        parts["weight_global_scale"] = ("F32", np.array([factor], "<f4"))
    else:  # powers of two, as their exponents plus 127
        exponents = np.ceil(np.log2(largest / 6))
        values = 2.0**exponents
        parts = {"weight_scale": ("U8", (exponents + 127).astype("u1"))}
    scaled = (groups / values[..., None]).reshape(rows, columns)
    nearest = np.abs(np.abs(scaled)[..., None] - FP4).argmin(-1) | np.where(scaled < 0, 8, 0)
    parts["weight_packed"] = ("U8", (nearest[:, ::2] + 16 * nearest[:, 1::2]).astype("u1"))
    return parts


def _fp8(weight: np.ndarray, scheme: str) -> Tensors:
    rows, columns = weight.shape
    if scheme == "FP8_BLOCK":
        blocks = weight.reshape(-(-rows // 64) // 2 or 1, -1, columns // 128, 128)
        scale = bf16(np.abs(blocks).max((1, 3)) / 448 * 1.01)
        spread = np.repeat(np.repeat(floats(scale), 128, 0)[:rows], 128, 1)
    elif scheme == "FP8":
        scale = bf16(np.abs(weight).max(keepdims=True).reshape(1) / 448 * 1.01)
        spread = floats(scale)
    else:
        scale = bf16(np.abs(weight).max(1, keepdims=True) / 448 * 1.01)
        spread = floats(scale)
    parts: Tensors = {"weight": ("F8_E4M3", e4m3(weight / spread)), "weight_scale": ("BF16", scale)}
    if scheme == "FP8":
        parts["input_scale"] = ("BF16", bf16(np.array([0.05])))
    return parts


def e4m3(values: np.ndarray) -> np.ndarray:
    """Bits of FP8 E4M3 by truncation of the magnitude: S.eeee.mmm, bias 7."""
    magnitude = np.abs(values).astype(np.float64)
    exponent = np.floor(np.log2(np.maximum(magnitude, 2.0**-9)))
    exponent = np.clip(exponent, -6, 8)
    steps = np.floor(magnitude / 2.0 ** (exponent - 3)).astype(int)  # 8..15 when normal
    normal = steps >= 8
    biased = np.where(normal, exponent + 7, 0).astype(int)
    bits = (biased << 3) | np.where(normal, steps - 8, steps)
    return (bits | np.where(values < 0, 0x80, 0)).astype("u1")


def e4m3_values(bits: np.ndarray) -> np.ndarray:
    """What positive E4M3 bits mean."""
    exponent, mantissa = (bits >> 3).astype(int), (bits & 7).astype(int)
    return np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)


def quantization_config(quantize: Quantize) -> dict[str, Any]:
    """As compressed-tensors 0.19 writes it, a group for each override and one for the rest."""
    groups = [
        _group(list(override.modules), override.scheme, override.group_size or 128)
        for override in quantize.overrides
    ]
    own = (quantize.effective_scheme, quantize.group_size or 128)
    groups.append(_group(["Linear"], *own))
    forms = {group["format"] for group in groups}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    cache |= {"dynamic": False, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "ignore": ["lm_head"],
        "kv_cache_scheme": cache if quantize.kv_cache else None,
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
    }


def _group(targets: list[str], scheme: str, size: int | str) -> dict[str, Any]:
    forms = {"NVFP4A16": "nvfp4-pack", "MXFP4A16": "mxfp4-pack", "W8A8": "int"}
    form = "pack" if scheme in ("W4A16", "W4A16_ASYM", "W8A16") else forms.get(scheme, "float")
    strategy = {"FP8": "tensor", "FP8_BLOCK": "block", "NVFP4A16": "tensor_group"}
    strategy["MXFP4A16"] = "group"
    grouped = form == "pack" and size != "channel"
    sizes = {"NVFP4A16": 16, "MXFP4A16": 32}
    dynamic = scheme != "FP8"
    return {
        "targets": targets,
        "format": f"{form}-quantized",
        "weights": {
            "num_bits": 4 if "4" in scheme else 8,
            "type": "int" if form in ("pack", "int") else "float",
            "strategy": "group" if grouped else strategy.get(scheme, "channel"),
            "symmetric": scheme != "W4A16_ASYM",
            "group_size": size if grouped else sizes.get(scheme),
            "dynamic": False,
        },
        "input_activations": None if "pack" in form else {"dynamic": dynamic, "num_bits": 8},
    }


def write_quantized(folder: Path, tensors: Tensors, quantize: Quantize) -> Path:
    """What the compress stage makes of a checkpoint of these tensors."""
    config = llama_config() | {"quantization_config": quantization_config(quantize)}
    return write_checkpoint(folder, quantized_tensors(tensors, quantize), config)
