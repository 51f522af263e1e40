"""Looking at every weight while its bytes are hashed: one pass over a file for both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantize.printable import shortened
from quantize.tensors import DTYPES, FLOATS, TensorInfo, read_header
from quantize.untrusted import open_regular

BLOCK_BYTES = 4 << 20
"""Fits a processor's cache, so that looking costs no second trip to memory."""


def hash_and_look(
    path: Path, report: Callable[[int], None] = lambda _: None
) -> tuple[str, list[str]]:
    """sha256 (hex) of a safetensors file, and a line for each tensor that has a NaN or Inf.

    `report` is told of bytes done.
    """
    tensors = sorted(read_header(path).values(), key=lambda info: info.start)
    digest, faults = hashlib.sha256(), []
    with open_regular(path) as file:
        digest.update(file.read(tensors[0].start if tensors else -1))
        for info in tensors:
            bad, first, position = 0, 0, 0
            while block := file.read(min(BLOCK_BYTES, info.bytes - position)):
                digest.update(block)
                mask = _not_finite(block, info)
                if mask is not None:
                    here = np.flatnonzero(mask)
                    if not bad:
                        first = position // DTYPES[info.dtype].itemsize + int(here[0])
                    bad += len(here)
                position += len(block)
                report(len(block))
            if bad:
                faults.append(_fault(info, bad, first))
        while block := file.read(BLOCK_BYTES):  # it has grown since: its hash will say so
            digest.update(block)
    return digest.hexdigest(), faults


def _fault(info: TensorInfo, bad: int, first: int) -> str:
    where = [int(index) for index in np.unravel_index(first, info.shape)] if info.shape else []
    name = shortened(info.name)
    return f"{name} has {bad} NaN or Inf of {info.elements} (the first at {where})"


def _not_finite(block: bytes, info: TensorInfo) -> npt.NDArray[np.bool_] | None:
    """Which elements are NaN or infinite; None where none is, which costs one pass.

    An element is not finite exactly if its exponent is all ones: the largest magnitude of a block,
    as an unsigned number without its sign, says whether there is one.
    """
    if info.dtype not in FLOATS or info.dtype not in EXPONENTS:
        return None
    unsigned, magnitude, exponent = EXPONENTS[info.dtype]
    values = np.frombuffer(block, unsigned) & unsigned.type(magnitude)
    limit = unsigned.type(exponent)
    return values >= limit if len(values) and values.max() >= limit else None


EXPONENTS: dict[str, tuple[np.dtype[np.unsignedinteger], int, int]] = {
    "BF16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
    "F16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
    "F32": (np.dtype("<u4"), 0x7FFFFFFF, 0x7F800000),
    "F64": (np.dtype("<u8"), (1 << 63) - 1, 0x7FF << 52),
}
"""Of a source's float dtypes: unsigned numpy type, all bits but the sign, the exponent's bits."""
