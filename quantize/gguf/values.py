"""What the blocks of ggml's number formats mean, in numpy.

Layouts: ggml/src/ggml-common.h of llama.cpp, whose `dequantize_row_*` (ggml-quants.c) say what the
fields mean; tests/end_to_end/test_gguf.py holds all of them against llama.cpp's own package. Every
function takes blocks (blocks, bytes of a block) uint8, and gives float32 (blocks, values of one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.gguf.file import GgufTensor, TensorType

Blocks = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]
Report = Callable[[int], None]
"""Called with the bytes of each tensor that was read."""

CHUNK_BYTES = 64 << 20
"""Of a tensor that the audits look at together."""

NONLINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""The 16 values of IQ4_NL and IQ4_XS."""

SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where a block has its FP16 numbers: the scale, and the minimum's scale where there is one."""


def dequantized(rows: Blocks, kind: TensorType) -> Values:
    """Rows (rows, bytes of a row) of a tensor as float32 (rows, columns)."""
    if kind.name in PLAIN:
        return PLAIN[kind.name](np.ascontiguousarray(rows))
    blocks = np.ascontiguousarray(rows).reshape(-1, kind.bytes)
    return DEQUANTIZE[kind.name](blocks).reshape(len(rows), -1)


def block_scales(rows: Blocks, kind: TensorType) -> Values:
    """The FP16 numbers of all blocks of some rows, as float32 (blocks, numbers)."""
    blocks = rows.reshape(-1, kind.bytes)
    return np.stack([_half(blocks, at)[:, 0] for at in SCALES[kind.name]], axis=1)


def is_quantized(tensor: GgufTensor) -> bool:
    """Whether the tensor has blocks with scales."""
    return tensor.type.name in SCALES


def _half(blocks: Blocks, at: int) -> Values:
    """The FP16 number at byte `at` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Blocks) -> npt.NDArray[np.uint8]:
    """(blocks, n) bytes → (blocks, 2 n): all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Blocks, at: int) -> npt.NDArray[np.uint8]:
    """(blocks, 32): bits 0 to 31 of the 32-bit number at byte `at`, as 0 or 16."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return (bits << 4).astype(np.uint8)


def _q4_0(blocks: Blocks) -> Values:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> Values:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> Values:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (values.astype(np.float32) - 16)


def _q5_1(blocks: Blocks) -> Values:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * values.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> Values:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _crumbs(packed: Blocks) -> npt.NDArray[np.uint8]:
    """64 bytes of 2-bit numbers → (blocks, 2, 4, 32): half of the block, shift, place."""
    halves = packed.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return ((halves >> shifts) & 3).astype(np.uint8)


def _by_sixteen(values: npt.NDArray[Any], scales: npt.NDArray[Any]) -> Values:
    """256 values of each block times 16 scales: a scale for 16 neighbours."""
    grouped = values.reshape(-1, 16, 16).astype(np.float32)
    return (grouped * scales.astype(np.float32).reshape(-1, 16, 1)).reshape(-1, 256)


def _q2_k(blocks: Blocks) -> Values:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    minima = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    values = _by_sixteen(_crumbs(blocks[:, 16:80]), scales)
    return values - np.repeat(minima, 16, axis=1)


def _q3_k(blocks: Blocks) -> Values:
    high_mask, low = blocks[:, :32], _crumbs(blocks[:, 32:96])
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1)
    high = (high_mask.reshape(-1, 1, 1, 32) >> shifts) & 1
    values = low.astype(np.int8) - np.where(high == 1, 0, 4).astype(np.int8)
    packed = blocks[:, 96:108]
    fours = _nibbles(packed[:, :8])  # (blocks, 16)
    twos = (packed[:, 8:].reshape(-1, 1, 4) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = (fours | (twos.reshape(-1, 16) << 4)).astype(np.float32) - 32
    return _by_sixteen(values, _half(blocks, 108) * scales)


def _six_bits(packed: Blocks) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """12 bytes of Q4_K and Q5_K → eight 6-bit scales and eight 6-bit minima, (blocks, 8) each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minima


def _by_thirty_two(blocks: Blocks, values: npt.NDArray[np.uint8]) -> Values:
    """(blocks, 8, 32) numbers of Q4_K or Q5_K with their scales and minima, (blocks, 256)."""
    scales, minima = _six_bits(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    minimum = (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return (scale * values.astype(np.float32) - minimum).reshape(-1, 256)


def _alternating(packed: Blocks) -> npt.NDArray[np.uint8]:
    """128 bytes → (blocks, 8, 32): of each 32 bytes the low halves, then the high ones."""
    groups = packed.reshape(-1, 4, 1, 32)
    halves = (groups >> np.array([0, 4], np.uint8)[:, None]) & 15
    return halves.astype(np.uint8).reshape(-1, 8, 32)


def _q4_k(blocks: Blocks) -> Values:
    return _by_thirty_two(blocks, _alternating(blocks[:, 16:]))


def _q5_k(blocks: Blocks) -> Values:
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = (((blocks[:, 16:48].reshape(-1, 1, 32) >> shifts) & 1) << 4).astype(np.uint8)
    return _by_thirty_two(blocks, _alternating(blocks[:, 48:]) | fifth)


def _q6_k(blocks: Blocks) -> Values:
    halves = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = (halves >> np.array([0, 4], np.uint8)[:, None]) & 15  # (blocks, 2, 2, 64)
    high = _crumbs(blocks[:, 128:192])
    values = (low.reshape(-1, 2, 4, 32) | (high << 4)).astype(np.int16) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _by_sixteen(values, _half(blocks, 208) * scales)


def _iq4_nl(blocks: Blocks) -> Values:
    return _half(blocks, 0) * NONLINEAR[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Blocks) -> Values:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2").astype(np.uint16)  # (blocks, 1)
    twos = ((high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    fours = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8)) & 15
    scales = (fours.reshape(-1, 8) | (twos << 4)).astype(np.float32) - 32
    numbers = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 8, 32)
    return ((_half(blocks, 0) * scales)[:, :, None] * NONLINEAR[numbers]).reshape(-1, 256)


def _bf16(rows: Blocks) -> Values:
    return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)


PLAIN: Mapping[str, Callable[[Blocks], Values]] = {
    "F32": lambda rows: rows.view("<f4").astype(np.float32),
    "F16": lambda rows: rows.view("<f2").astype(np.float32),
    "BF16": _bf16,
}

DEQUANTIZE: Mapping[str, Callable[[Blocks], Values]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
