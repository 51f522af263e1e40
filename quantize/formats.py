"""What a scheme promises on disk: names, dtypes and shapes of a quantized linear, and its values.

The layouts are those of compressed-tensors 0.19 (`compressors/*/base.py`). Integers below 8 bits:
32 consecutive bits become one little-endian int32 word, the first element in the lowest bits, each
stored with an offset of 2**(bits - 1). Floats of 4 bits (E2M1): two to a byte, the first in the
lower half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quantize.modules import matches
from quantize.quantization import Quantize
from quantize.schemes import FIXED_GROUPS
from quantize.tensors import DTYPES, TensorInfo, load_tensor, to_float32

BLOCK = 128
"""Rows and columns of a weight that share a scale in FP8_BLOCK."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Value of each FP4 bit pattern: sign, 2 exponent bits (bias 1), 1 of mantissa."""

E8M0 = np.array([*(2.0 ** (n - 127) for n in range(255)), np.nan], np.float32)
"""Value of each E8M0 bit pattern: a power of two."""

FLOAT_SCALES = ("BF16", "F16", "F32")

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor of a module (`weight_packed`, ...) → its safetensors dtype and shape."""

Compression = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
]
"""Names that compressed-tensors and servers have for ways of storing."""


@dataclass(frozen=True)
class WeightFormat:
    """How a scheme stores one linear weight (out_features, in_features)."""

    scheme: str
    compression: Compression
    bits: int
    strategy: Literal["group", "tensor_group", "channel", "tensor", "block"]
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["dynamic", "static"] | None = None  # None: they stay in BF16

    @property
    def number(self) -> Literal["int", "float"]:
        """Kind of the stored numbers."""
        return "int" if self.compression in ("pack-quantized", "int-quantized") else "float"

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `weight_scale` for a weight of this shape."""
        rows, columns = shape
        match self.strategy:
            case "group" | "tensor_group":
                return (rows, columns // (self.group_size or columns))
            case "channel":
                return (rows, 1)
            case "tensor":
                return (1,)
            case "block":
                return (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))

    def layout(self, shape: tuple[int, ...], scale_dtype: str) -> Layout:
        """All tensors of a quantized module but its bias; `scale_dtype` where scales are floats."""
        rows, columns = shape
        scale = self.scale_shape(shape)
        layout: Layout = {"weight_scale": (scale_dtype, scale)}
        match self.compression:
            case "pack-quantized":
                layout["weight_packed"] = ("I32", (rows, math.ceil(columns * self.bits / 32)))
                layout["weight_shape"] = ("I64", (2,))
            case "int-quantized":
                layout["weight"] = ("I8", shape)
            case "float-quantized":
                layout["weight"] = ("F8_E4M3", shape)
            case "nvfp4-pack-quantized":
                layout["weight_packed"] = ("U8", (rows, columns // 2))
                layout["weight_scale"] = ("F8_E4M3", scale)
                layout["weight_global_scale"] = ("F32", (1,))
            case "mxfp4-pack-quantized":
                layout["weight_packed"] = ("U8", (rows, columns // 2))
                layout["weight_scale"] = ("U8", scale)
        if not self.symmetric:
            words = math.ceil(rows * self.bits / 32)
            layout["weight_zero_point"] = ("I32", (words, *scale[1:]))
        if self.activations == "static":
            layout["input_scale"] = (scale_dtype, (1,))
        return layout

    def scale_values(
        self, stored: npt.NDArray[Any], dtype: str, suffix: str = "weight_scale"
    ) -> npt.NDArray[np.float32]:
        """A scale as a number. MXFP4's are stored as U8, but are E8M0."""
        if self.compression == "mxfp4-pack-quantized" and suffix == "weight_scale":
            values: npt.NDArray[np.float32] = E8M0[stored]
            return values
        return to_float32(stored, dtype)

    def dequantized_rows(
        self, tensors: Mapping[str, TensorInfo], rows: npt.NDArray[np.int64], columns: int
    ) -> npt.NDArray[np.float32]:
        """Rows (n, columns) of the weight that a server computes with: scale * (q - zero point)."""
        scale_info = tensors["weight_scale"]
        scale = self.scale_values(load_tensor(scale_info)[self._scale_rows(rows)], scale_info.dtype)
        if "weight_global_scale" in tensors:  # by which the scales were multiplied to fit into FP8
            scale = scale / np.asarray(load_tensor(tensors["weight_global_scale"]))
        q = self._stored_rows(tensors, rows, columns)
        if not self.symmetric:
            words = np.asarray(load_tensor(tensors["weight_zero_point"]))
            zero = np.ascontiguousarray(unpack(np.ascontiguousarray(words.T), self.bits).T)
            q = q - self._spread(zero[rows].astype(np.float32), columns)
        return q * self._spread(scale, columns)

    def _stored_rows(
        self, tensors: Mapping[str, TensorInfo], rows: npt.NDArray[np.int64], columns: int
    ) -> npt.NDArray[np.float32]:
        """The numbers as they are stored, (n, columns)."""
        if "weight_packed" in tensors:
            packed = np.asarray(load_tensor(tensors["weight_packed"])[rows])
            if self.number == "float":
                return E2M1[_halves(packed)][:, :columns]
            return unpack(packed, self.bits)[:, :columns].astype(np.float32)
        weight = tensors["weight"]
        values = np.asarray(load_tensor(weight)[rows])
        return values.astype(np.float32) if weight.dtype == "I8" else to_float32(values, "F8_E4M3")

    def _scale_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        match self.strategy:
            case "tensor":
                return np.zeros_like(rows)
            case "block":
                return rows // BLOCK
            case _:
                return rows

    def _spread(self, values: npt.NDArray[np.float32], columns: int) -> npt.NDArray[np.float32]:
        """Scales or zero points (n, groups), or (n,), repeated to (n, columns)."""
        if values.ndim == 1 or values.shape[1] == 1:
            return values.reshape(-1, 1)
        width = BLOCK if self.strategy == "block" else columns // values.shape[1]
        return np.repeat(values, width, axis=1)[:, :columns]


def unpack(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int8]:
    """Signed integers (n, words * 32 / bits) packed in int32 words (n, words), `bits` 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits do not divide a word")
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 4:
        octets = _halves(octets)
    return (octets.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _halves(octets: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Bytes (n, m) as (n, 2m) numbers of 4 bits, the lower half first."""
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def weight_format(scheme: str, group_size: int | str | None) -> WeightFormat:
    """The format of a scheme; `group_size` as `Quantize.effective_group_size` gives it."""
    size = group_size if isinstance(group_size, int) else None
    strategy: Literal["group", "channel"] = "group" if size else "channel"
    match scheme:
        case "W4A16" | "W4A16_ASYM":
            symmetric = scheme == "W4A16"
            return WeightFormat(scheme, "pack-quantized", 4, strategy, size, symmetric)
        case "W8A16":
            return WeightFormat(scheme, "pack-quantized", 8, strategy, size)
        case "W8A8":
            return WeightFormat(scheme, "int-quantized", 8, "channel", activations="dynamic")
        case "FP8_DYNAMIC":
            return WeightFormat(scheme, "float-quantized", 8, "channel", activations="dynamic")
        case "FP8":
            return WeightFormat(scheme, "float-quantized", 8, "tensor", activations="static")
        case "FP8_BLOCK":
            return WeightFormat(scheme, "float-quantized", 8, "block", activations="dynamic")
        case "NVFP4A16":
            size = FIXED_GROUPS[scheme]
            return WeightFormat(scheme, "nvfp4-pack-quantized", 4, "tensor_group", size)
        case "MXFP4A16":
            return WeightFormat(scheme, "mxfp4-pack-quantized", 4, "group", FIXED_GROUPS[scheme])
        case other:
            raise ValueError(f"no format known for scheme {other}")


@dataclass(frozen=True)
class Rule:
    """A format and the modules that a recipe gives it to."""

    key: str  # where the recipe says it: quantize, quantize.overrides[0], ...
    form: WeightFormat
    modules: tuple[str, ...] | None = None  # None: every module that is left


@dataclass(frozen=True)
class ModuleFormats:
    """The format of each linear: none if ignored, else that of the first rule that names it."""

    ignore: tuple[str, ...]
    rules: tuple[Rule, ...]  # overrides in the recipe's order, then the block's own scheme

    def rule(self, module: str) -> Rule | None:
        """The rule that holds for a linear, or None where it stays as it is."""
        if matches(module, self.ignore):
            return None
        return next(r for r in self.rules if r.modules is None or matches(module, r.modules))

    def of(self, module: str) -> WeightFormat | None:
        """The format of a linear, or None where it stays as it is."""
        rule = self.rule(module)
        return None if rule is None else rule.form


def module_formats(quantize: Quantize) -> ModuleFormats:
    """What a recipe's quantize block promises of each linear.

    Nothing for GGUF: llama.cpp's types are mixtures, see :mod:`quantize.gguf.types`.
    """
    if quantize.effective_format == "gguf":
        return ModuleFormats(("re:.*",), ())
    rules = [
        Rule(
            f"quantize.overrides[{index}]",
            weight_format(override["scheme"], override["group_size"]),
            tuple(override["modules"]),
        )
        for index, override in enumerate(quantize.effective_overrides)
    ]
    own = weight_format(quantize.effective_scheme, quantize.effective_group_size)
    return ModuleFormats(quantize.ignore, (*rules, Rule("quantize", own)))


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in layout.values())
