"""Linears in the formats of AutoAWQ and GPTQ, packed one number at a time, by the specifications.

Nothing is shared with the readers and writers of the package.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Tensors, bf16, floats, llama_config, llama_tensors, write_checkpoint
from quantized import pack

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, eq=False)  # hashed by identity: packing a number at a time is slow
class Numbers:
    """A weight (out, in): codes and zero points from 0, scales in BF16 or FP16."""

    bits: int
    group: int  # inputs that share a scale
    codes: np.ndarray  # (out, in)
    zero: np.ndarray  # (out, groups)
    scale: np.ndarray  # (out, groups), BF16 as bits
    scale_dtype: str
    symmetric: bool

    @property
    def weight(self) -> np.ndarray:
        """FP32 (out, in), a number at a time."""
        scale = floats(self.scale) if self.scale_dtype == "BF16" else self.scale.astype("<f4")
        groups = np.arange(self.codes.shape[1]) // self.group
        difference = self.codes.astype("<f4") - self.zero[:, groups].astype("<f4")
        return difference * scale[:, groups]


def numbers(
    seed: int,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: str = "BF16",
) -> Numbers:
    """Numbers with every code and zero point in them."""
    generator = np.random.default_rng(seed)
    top = 1 << bits
    groups = columns // group
    codes = generator.integers(0, top, (rows, columns))
    zero = generator.integers(0, top, (rows, groups))
    if symmetric:
        zero[:] = top // 2
    else:
        zero.flat[0] = 0  # what GPTQ's first version cannot say
    scale = generator.uniform(1e-4, 0.1, (rows, groups)).astype("<f4")
    stored = bf16(scale) if dtype == "BF16" else scale.astype("<f2")
    return Numbers(bits, group, codes, zero, stored, dtype, symmetric)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@functools.cache
def awq(one: Numbers) -> Tensors:
    """`order_map` of AutoAWQ's `WQLinear_GEMM.from_linear`."""

    def packed(values: np.ndarray) -> np.ndarray:  # (n, out)
        words = np.zeros((len(values), values.shape[1] // 8), "<i4")
        for row in range(len(values)):
            for column in range(words.shape[1]):
                word = 0
                for place in range(8):
                    word |= int(values[row, column * 8 + AWQ_ORDER[place]]) << (4 * place)
                words[row, column] = _signed(word)
        return words

    return {
        "qweight": ("I32", packed(one.codes.T)),
        "qzeros": ("I32", packed(one.zero.T)),
        "scales": (one.scale_dtype, np.ascontiguousarray(one.scale.T)),
    }


def gptq(one: Numbers, g_idx: np.ndarray | None = None) -> Tensors:
    """`pack_original` of GPTQModel's `PackableQuantLinear`.

    Version 1 stores zero points less 1; symmetric grids are in it, others in version 2.
    """
    parts = dict(_gptq(one))
    if g_idx is not None:
        parts["g_idx"] = ("I32", g_idx.astype("<i4"))
    return parts


@functools.cache
def _gptq(one: Numbers) -> Tensors:
    per_word = 32 // one.bits

    def word(values: Any) -> int:
        found = 0
        for place, value in enumerate(values):
            found |= int(value) << (one.bits * place)
        return _signed(found)

    rows, columns = one.codes.shape
    weight = [
        [word(one.codes[row, start : start + per_word]) for row in range(rows)]
        for start in range(0, columns, per_word)
    ]
    zero = one.zero - one.symmetric
    zeros = [
        [word(zero[start : start + per_word, group]) for start in range(0, rows, per_word)]
        for group in range(zero.shape[1])
    ]
    index = np.arange(columns) // one.group
    return {
        "qweight": ("I32", np.array(weight, "<i4")),
        "qzeros": ("I32", np.array(zeros, "<i4")),
        "scales": (one.scale_dtype, np.ascontiguousarray(one.scale.T)),
        "g_idx": ("I32", index.astype("<i4")),
    }


@functools.cache
def compressed_tensors(one: Numbers) -> Tensors:
    """`pack-quantized`: numbers with an offset of 2**(bits - 1)."""
    offset = 1 << (one.bits - 1)
    parts: Tensors = {
        "weight_packed": ("I32", pack(one.codes - offset, one.bits)),
        "weight_scale": (one.scale_dtype, one.scale),
        "weight_shape": ("I64", np.array(one.codes.shape, "<i8")),
    }
    if not one.symmetric:
        parts["weight_zero_point"] = ("I32", pack((one.zero - offset).T, one.bits).T)
    return parts


PACKERS = {"awq": awq, "gptq": gptq, "compressed-tensors": compressed_tensors}


def block(name: str, one: Numbers, columns: int) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose linears are like `one`."""
    whole = one.group == columns
    size = -1 if whole else one.group
    if name == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    if name == "gptq":
        return {
            "quant_method": "gptq",
            "bits": one.bits,
            "group_size": size,
            "sym": one.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if one.symmetric else "gptq_v2",
        }
    weights = {
        "num_bits": one.bits,
        "type": "int",
        "strategy": "channel" if whole else "group",
        "symmetric": one.symmetric,
        "group_size": None if whole else one.group,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def llama_numbers(*, symmetric: bool = True, dtype: str = "BF16") -> dict[str, Numbers]:
    """Of each linear of the tiny Llama in 4 bits, rounded to nearest: an audit finds the source."""
    return dict(_llama_numbers(symmetric, dtype))


@functools.cache
def _llama_numbers(symmetric: bool, dtype: str) -> dict[str, Numbers]:
    bits, group = 4, 32
    found = {}
    for name, (_, stored) in llama_tensors().items():
        if not name.endswith("_proj.weight"):
            continue
        weight = floats(stored)
        rows, columns = weight.shape
        blocks = weight.reshape(rows, -1, group)
        top = (1 << bits) - 1
        low, high = blocks.min(-1), blocks.max(-1)
        if symmetric:
            wide = np.abs(blocks).max(-1) / (top // 2) * 1.01
        else:
            wide = (high - low) / top * 1.01
        scale = bf16(wide) if dtype == "BF16" else wide.astype("<f2")
        values = floats(scale) if dtype == "BF16" else scale.astype("<f4")
        middle = (top + 1) // 2
        zero = np.full(scale.shape, middle) if symmetric else np.round(-low / values).astype(int)
        codes = np.round(blocks / values[..., None]) + zero[..., None]
        codes = np.clip(codes, 0, top).astype(int).reshape(rows, columns)
        found[name.removesuffix(".weight")] = Numbers(
            bits, group, codes, zero, scale, dtype, symmetric
        )
    return found


def write_stored(
    folder: Path,
    name: str,
    linears: dict[str, Numbers],
    config: dict[str, Any] | None = None,
    *,
    shards: int = 1,
    changes: Tensors | None = None,
) -> Path:
    """The tiny Llama with these linears, stored in the format `name`."""
    tensors: Tensors = {}
    for tensor, value in llama_tensors().items():
        module = tensor.removesuffix(".weight")
        if module in linears:
            parts = PACKERS[name](linears[module])
            tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            tensors[tensor] = value
    first = next(iter(linears.values()))
    stated = config or block(name, first, 0)
    whole = llama_config() | {"quantization_config": stated}
    return write_checkpoint(folder, tensors | (changes or {}), whole, shards=shards)
