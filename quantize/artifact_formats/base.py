"""What a format's module says of it, and the numbers of a linear without their layout.

A weight (out_features, in_features) is scale * (code - zero point), with codes and zero points from
0 to 2**bits - 1; a symmetric grid has the zero point 2**(bits - 1) everywhere. Formats differ in
where these numbers lie, so that repacking moves bits and rounds nothing. numpy alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from quantize.formats import Layout, WeightFormat
    from quantize.quantization import Quantize

Arrays = Mapping[str, npt.NDArray[Any]]
"""Tensor of a module (`qweight`, ...) → its elements; BF16 as uint16 bits."""

Codes = Callable[[npt.NDArray[np.int64], slice], npt.NDArray[np.uint8]]
"""Rows (n,) and columns (a slice of m) of a weight → its codes (n, m)."""

BLOCK_ELEMENTS = 1 << 22
"""Of a weight that are repacked at a time: at most 64 MiB of words and codes."""

HALVES = ("F16", "BF16")
"""Readers of AWQ and GPTQ put scales into the model's dtype, which is one of these."""


@dataclass(frozen=True)
class Facts:
    """What a format's config says of one linear; `group_size` None: one scale an output."""

    bits: int
    group_size: int | None
    symmetric: bool


@dataclass(frozen=True)
class Grid:
    """A quantized weight (out, in), whatever its layout. Codes are read when they are asked for."""

    bits: int
    shape: tuple[int, int]
    codes: Codes
    scale: npt.NDArray[Any]  # (out, groups), as stored
    zero: npt.NDArray[np.uint8] | None = None  # (out, groups); None: symmetric
    group: npt.NDArray[np.int64] | None = None  # (in,): of each input; None: groups in order

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """The group of each input, (in,)."""
        if self.group is not None:
            return self.group
        size = self.shape[1] // self.scale.shape[1]
        groups: npt.NDArray[np.int64] = np.arange(self.shape[1], dtype=np.int64) // size
        return groups

    @property
    def zeros(self) -> npt.NDArray[np.uint8]:
        """Zero points (out, groups), also of a symmetric grid."""
        if self.zero is not None:
            return self.zero
        return np.full(self.scale.shape, self.middle, np.uint8)

    @property
    def centred(self) -> bool:
        """Whether every zero point is that of a symmetric grid."""
        return self.zero is None or bool(np.all(self.zero == self.middle))

    def dequantized(
        self, rows: npt.NDArray[np.int64], scale: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Rows (n, in) of scale * (code - zero point); `scale` is (out, groups) in FP32.

        The difference is a small whole number, so FP32 rounds once, in the product.
        """
        codes = self.codes(rows, slice(0, self.shape[1])).astype(np.float32)
        zero = self.zeros[rows].astype(np.float32)
        values: npt.NDArray[np.float32] = codes - zero[:, self.groups]
        values *= scale[rows][:, self.groups]
        return values


class ArtifactFormat(Protocol):
    """A module of this package with these names at its top level."""

    NAME: str
    LOADED_WITH: tuple[
        str, ...
    ]  # packages that transformers 5 asks for (quantizers/quantizer_*.py)
    METHOD: str  # `quant_method` in config.json
    SCALE: str  # the tensor that every quantized module has
    SCALE_DTYPES: tuple[str, ...]  # those that its readers do not round
    SHAPED: tuple[str, ...]  # tensors that :meth:`shape` looks at
    SPLIT: tuple[str, ...]  # tensors that tensor parallelism cuts; the packed weight is the first
    TRANSPOSED: bool  # whether these are (in, out)

    def cannot_hold(self, quantize: Quantize) -> str | None:
        """Which part of the recipe's block it cannot express, or None."""
        ...

    def cannot_store(self, form: WeightFormat, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape does not fit, or None."""
        ...

    def cannot_name(self, quantized: Sequence[str], kept: Sequence[str]) -> str | None:
        """Why its config cannot say which linears are quantized and which are not, or None."""
        ...

    def layout(self, form: WeightFormat, shape: tuple[int, ...], scale_dtype: str) -> Layout:
        """All tensors of a quantized module but its bias."""
        ...

    def facts(self, block: Mapping[str, Any], module: str) -> Facts:
        """What `quantization_config` says of a linear; ValueError where it is not for us."""
        ...

    def shape(self, facts: Facts, arrays: Arrays) -> tuple[int, int]:
        """Of the weight, (out, in)."""
        ...

    def read(
        self, facts: Facts, shape: tuple[int, int], arrays: Arrays, block: Mapping[str, Any]
    ) -> Grid:
        """A module's numbers; ValueError where they contradict each other."""
        ...

    def write(self, grid: Grid, symmetric: bool) -> dict[str, Iterator[npt.NDArray[Any]]]:
        """The elements of the tensors of :meth:`layout`, in order, in pieces."""
        ...

    def config(self, quantized: Mapping[str, Facts], kept: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` for these linears; `kept` are not quantized."""
        ...

    def config_faults(
        self, block: Mapping[str, Any], quantized: Mapping[str, Facts], kept: Sequence[str]
    ) -> list[str]:
        """Where `quantization_config` does not say what the linears have."""
        ...


def to_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Codes (n, m) as int32 words (n, m * bits / 32), the first in the lowest bits."""
    per_word = 32 // bits
    fields = codes.astype(np.uint32).reshape(len(codes), -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(fields << shifts, axis=2)
    return words.astype("<u4").view("<i4")


def to_codes(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`to_words`: (n, m) words as (n, m * 32 / bits) codes."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def column_blocks(shape: tuple[int, int], multiple: int) -> Iterator[slice]:
    """Slices of the columns of a weight, of about BLOCK_ELEMENTS elements; whole words each."""
    rows, columns = shape
    step = max(1, BLOCK_ELEMENTS // max(rows, 1) // multiple) * multiple
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def pieces(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """A small tensor in one piece."""
    yield array


def differences(promised: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """What `stated` says otherwise than promised."""
    return [
        f"{key} is {stated.get(key)!r}, not {value!r}"
        for key, value in promised.items()
        if stated.get(key) != value
    ]


def common(quantized: Mapping[str, Facts]) -> Facts:
    """What most linears have: a config's own values."""
    found = list(quantized.values())
    return max(dict.fromkeys(found), key=found.count)


def whole_number(block: Mapping[str, Any], *keys: str) -> int:
    """The first of these keys that a config states; ValueError where it is no whole number."""
    value = next((block[key] for key in keys if block.get(key) is not None), None)
    if type(value) is not int:
        raise ValueError(f"{keys[0]} of quantization_config is {value!r}, not a whole number")
    return value


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A part of a config that anyone may have written; ValueError where it is no JSON object."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} of quantization_config is no JSON object")
    return value


def names_it(pattern: str, module: str) -> bool:
    """Whether a regular expression matches from a name's start; ValueError where it is none."""
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def stores_group_index(quantize: Quantize) -> bool:
    """Whether the engine's result has groups that are no runs of neighbouring inputs.

    GPTQModel's `desc_act`. The static order of our own engines leaves groups where they are.
    """
    return quantize.engine == "gptqmodel" and quantize.activation_order == "weight"
