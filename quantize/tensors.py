"""The safetensors format: strict headers, memory-mapped tensors, BF16 and FP8 in numpy.

A file is 8 bytes of header length (little endian), a JSON header of that length, and the tensors'
bytes. The header maps each name to a dtype, a shape and an interval of the data; the intervals
must tile the data without holes (https://github.com/huggingface/safetensors#format). Nothing here
executes what it reads, and nothing is read beyond the header until a tensor is asked for.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.errors import SourceError
from quantize.printable import shortened
from quantize.untrusted import open_regular, parse_json, what_it_is

HEADER_LIMIT_BYTES = 32 << 20
"""Room for 200,000 tensors in one file. The reference implementation reads up to 100 MB, which as
Python's objects can take gigabytes."""

MOST_DIMENSIONS = 16
LARGEST_EXTENT = 1 << 48
"""More elements than any disk holds. Without a limit a shape of a few kilobytes takes minutes to
multiply, and its product is too long to be printed."""

HEAD_BYTES = 512

CHUNK_ELEMENTS = 1 << 22
"""Elements that :func:`chunks` holds at once: 16 MiB of FP32."""

LFS_POINTER = b"version https://git-lfs"

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),  # bits: numpy has no FP8
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # bits: numpy has no BF16
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""safetensors dtype → the numpy dtype that :func:`load_tensor` returns."""

FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F16", "BF16", "F32", "F64"})
"""Dtypes that can hold a NaN."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: bytes `start` to `end` of `file`, row-major."""

    name: str
    dtype: str  # safetensors name: BF16, I32, F8_E4M3, ...
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` is what git leaves in place of a large file that was not downloaded."""
    with open_regular(path) as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises SourceError, naming the file, for anything that the format does not allow: a git-lfs
    pointer, a truncated or overlong file, a header that is not JSON, repeated names, unknown
    dtypes, intervals that overlap, leave holes or do not fit their shape.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD_BYTES)
        if head.startswith(LFS_POINTER):
            raise SourceError(
                f"{path.name} is a git-lfs pointer of {size} bytes, not the weights",
                "run `git lfs pull` in the checkpoint's folder",
            )
        header, data_start = _parse(path, file, head, size)
    _check_metadata(path, header.pop("__metadata__", {}))
    tensors = {name: _tensor(path, name, value, data_start) for name, value in header.items()}
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "follows a hole"
            name = shortened(info.name)
            raise _damaged(path, f"tensor {name} {fault} (byte {info.start}, not {position})")
        position = info.end
    if position > size:
        raise SourceError(
            f"{path.name} is truncated: its header promises {position} bytes, the file has {size}",
            "download or copy this file again",
        )
    if position < size:
        raise _damaged(path, f"its header accounts for {position} bytes, the file has {size}")
    return tensors


def load_tensor(info: TensorInfo) -> npt.NDArray[Any]:
    """The tensor as a read-only memory map of its shape; BF16 as uint16 bits, FP8 as uint8 bits."""
    dtype = DTYPES[info.dtype]
    if info.elements == 0:
        return np.empty(info.shape, dtype)
    return np.memmap(info.file, dtype, mode="r", offset=info.start, shape=info.shape)


def chunks(info: TensorInfo, elements: int = CHUNK_ELEMENTS) -> Iterator[npt.NDArray[Any]]:
    """The tensor's elements in order, at most `elements` at a time, each chunk (n,)."""
    flat = load_tensor(info).reshape(-1)
    for start in range(0, info.elements, elements):
        yield flat[start : start + elements]


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values of an array that :func:`load_tensor` returned for a float `dtype`, same shape."""
    if dtype == "BF16":  # BF16 is the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        values: npt.NDArray[np.float32] = E4M3[array]
        return values
    if dtype in ("F16", "F32", "F64"):
        return array.astype(np.float32)
    raise ValueError(f"no conversion of {dtype} to float32")


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Round finite values to `dtype` (nearest, ties to even), as :func:`load_tensor` gives it."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return rounded.astype(np.uint16)
    raise ValueError(f"no conversion of float32 to {dtype}")


def _e4m3_values() -> npt.NDArray[np.float32]:
    """The 256 values of FP8 E4M3FN: 4 exponent bits (bias 7), 3 of mantissa, S.1111.111 is NaN."""
    bits = np.arange(256)
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    magnitude[(bits & 0x7F) == 0x7F] = np.nan
    return (sign * magnitude).astype(np.float32)


E4M3 = _e4m3_values()
"""Value of each FP8 E4M3FN bit pattern, (256,) float32."""


def _damaged(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"{path.name} is not a valid safetensors file: {fault}", "download or copy it again"
    )


def _parse(
    path: Path, file: io.BufferedReader, head: bytes, size: int
) -> tuple[dict[str, Any], int]:
    """The header as it stands, and the offset at which the data starts."""
    length = int.from_bytes(head[:8], "little")
    if size < 8:
        raise _damaged(path, f"it has {size} bytes, the header's length alone takes 8")
    if head[8:9] != b"{":
        what = what_it_is(head)
        raise _damaged(path, f"it is {what}" if what else "its header does not start with '{'")
    if length > HEADER_LIMIT_BYTES:
        raise _damaged(path, f"a header of {length} bytes (at most {HEADER_LIMIT_BYTES})")
    if 8 + length > size:
        raise SourceError(
            f"{path.name} is truncated: its header alone needs {8 + length} bytes, "
            f"the file has {size}",
            "download or copy this file again",
        )
    file.seek(8)
    try:
        header: dict[str, Any] = parse_json(file.read(length).decode("utf-8"))
    except ValueError as error:  # bad UTF-8, bad JSON, repeated names
        raise _damaged(path, f"its header cannot be read ({shortened(str(error))})") from error
    return header, 8 + length


def _check_metadata(path: Path, metadata: Any) -> None:
    """Text for text: the reference implementation refuses all else."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "__metadata__ is not a mapping of text to text")


def _tensor(path: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    shown = shortened(name)
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            fault = f"tensor {shown} is not described by dtype, shape, data_offsets"
            raise _damaged(path, fault)
    if dtype not in DTYPES:
        raise _damaged(path, f"tensor {shown} has the unknown dtype {shortened(dtype, 20)}")
    if len(shape) > MOST_DIMENSIONS or not all(_is_extent(extent) for extent in shape):
        raise _damaged(path, f"tensor {shown} has the shape {_described(shape)}")
    if not (_is_extent(begin) and _is_extent(end)):
        raise _damaged(path, f"tensor {shown} has the data_offsets {_described([begin, end])}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if begin > end or end - begin != expected:
        fault = f"tensor {shown} ({dtype} {shape}) takes {expected} bytes, not {end - begin}"
        raise _damaged(path, fault)
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _is_extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_EXTENT  # a bool is no number here


def _described(values: list[Any]) -> str:
    """A list that may hold anything, of any length: numbers too long to print are left out."""
    parts = [
        f"a number of {value.bit_length()} bits"
        if type(value) is int and value.bit_length() > 64
        else shortened(repr(value), 24)
        if isinstance(value, int | float | str | None)
        else type(value).__name__
        for value in values[:4]
    ]
    return f"[{', '.join(parts)}{', ...' if values[4:] else ''}]"
