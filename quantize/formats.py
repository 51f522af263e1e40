"""What a scheme promises on disk: names, dtypes and shapes of a quantized linear, and its values.

The layouts are those of compressed-tensors 0.19 (`compressors/pack_quantized`, `naive_quantized`):
below 8 bits, 32 consecutive elements become `bits` little-endian int32 words, the first element in
the lowest bits, each stored with an offset of 2**(bits - 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quantize.recipe import Quantize
from quantize.tensors import DTYPES, TensorInfo, load_tensor, to_float32

BLOCK = 128
"""Rows and columns of a weight that share a scale in FP8_BLOCK."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor of a module (`weight_packed`, ...) → its safetensors dtype and shape."""


@dataclass(frozen=True)
class WeightFormat:
    """How a scheme stores one linear weight (out_features, in_features)."""

    scheme: str
    compression: Literal["pack-quantized", "int-quantized", "float-quantized"]
    bits: int
    strategy: Literal["group", "channel", "tensor", "block"]
    group_size: int | None = None
    symmetric: bool = True
    static_input: bool = False  # activations have a scale on disk, too

    @property
    def packed(self) -> bool:
        """Whether several weights share an int32 word."""
        return self.compression == "pack-quantized"

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `weight_scale` for a weight of this shape."""
        rows, columns = shape
        match self.strategy:
            case "group":
                return (rows, columns // (self.group_size or columns))
            case "channel":
                return (rows, 1)
            case "tensor":
                return (1,)
            case "block":
                return (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))

    def layout(self, shape: tuple[int, ...], scale_dtype: str) -> Layout:
        """All tensors of a quantized module but its bias."""
        rows, columns = shape
        scale = self.scale_shape(shape)
        layout: Layout = {"weight_scale": (scale_dtype, scale)}
        if self.packed:
            layout["weight_packed"] = ("I32", (rows, math.ceil(columns * self.bits / 32)))
            layout["weight_shape"] = ("I64", (2,))
        else:
            layout["weight"] = ("I8" if self.compression == "int-quantized" else "F8_E4M3", shape)
        if not self.symmetric:
            words = math.ceil(rows * self.bits / 32)
            layout["weight_zero_point"] = ("I32", (words, *scale[1:]))
        if self.static_input:
            layout["input_scale"] = (scale_dtype, (1,))
        return layout

    def dequantized_rows(
        self, tensors: Mapping[str, TensorInfo], rows: npt.NDArray[np.int64], columns: int
    ) -> npt.NDArray[np.float32]:
        """Rows (n, columns) of the weight that a server computes with: scale * (q - zero point)."""
        scale_info = tensors["weight_scale"]
        scale = to_float32(load_tensor(scale_info)[self._scale_rows(rows)], scale_info.dtype)
        if self.packed:
            packed = np.asarray(load_tensor(tensors["weight_packed"])[rows])
            q = unpack(packed, self.bits)[:, :columns].astype(np.float32)
        else:
            weight = tensors["weight"]
            values = np.asarray(load_tensor(weight)[rows])
            q = values.astype(np.float32) if weight.dtype == "I8" else to_float32(values, "F8_E4M3")
        if not self.symmetric:
            words = np.asarray(load_tensor(tensors["weight_zero_point"]))
            zero = np.ascontiguousarray(unpack(np.ascontiguousarray(words.T), self.bits).T)
            q = q - self._spread(zero[rows].astype(np.float32), columns)
        return q * self._spread(scale, columns)

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
    if bits == 4:  # the lower half comes first
        octets = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)
    return (octets.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def weight_format(quantize: Quantize) -> WeightFormat:
    """The format that a recipe's quantize block promises."""
    scheme = quantize.effective_scheme
    size = quantize.effective_group_size
    group = None if size == "channel" else size
    strategy: Literal["group", "channel"] = "group" if group else "channel"
    match scheme:
        case "W4A16" | "W4A16_ASYM":
            symmetric = scheme == "W4A16"
            return WeightFormat(scheme, "pack-quantized", 4, strategy, group, symmetric)
        case "W8A16":
            return WeightFormat(scheme, "pack-quantized", 8, strategy, group)
        case "W8A8":
            return WeightFormat(scheme, "int-quantized", 8, "channel")
        case "FP8_DYNAMIC":
            return WeightFormat(scheme, "float-quantized", 8, "channel")
        case "FP8":
            return WeightFormat(scheme, "float-quantized", 8, "tensor", static_input=True)
        case "FP8_BLOCK":
            return WeightFormat(scheme, "float-quantized", 8, "block")
        case other:
            raise ValueError(f"no format known for scheme {other}")


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in layout.values())
