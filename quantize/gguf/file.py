"""The GGUF format: strict headers, memory-mapped tensors; the values are in quantize.gguf.values.

A file is the magic `GGUF`, a version, the numbers of tensors and of metadata entries, the entries,
the tensors' descriptions, and from the next multiple of `general.alignment` on the tensors' bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Nothing here executes what it reads;
nothing is allocated because a file says so: every count is held against what is left of the file.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.errors import SourceError
from quantize.printable import shortened
from quantize.untrusted import open_regular, what_it_is

MAGIC = b"GGUF"
VERSION = 3
"""Since 2023; versions 1 and 2 have narrower counts, and no tool writes them any more."""

MOST_TENSORS = 200_000
MOST_ENTRIES = 10_000
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
LARGEST_EXTENT = 1 << 48
"""More elements than any disk holds; see quantize.tensors."""
LONGEST_KEY_BYTES = 65_535
LONGEST_TEXT_BYTES = 16 << 20
"""Of one text: a chat template has some kilobytes."""
HEADER_LIMIT_BYTES = 256 << 20
"""The vocabulary is in it: 256,000 tokens with their merges take 12 MB."""
LARGEST_ALIGNMENT = 1 << 16

SCALARS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Metadata type → struct format; 8 is text, 9 an array."""
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorType:
    """A number format of ggml: `elements` values of a row take `bytes` bytes."""

    name: str
    elements: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.bytes / self.elements


TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    20: TensorType("IQ4_NL", 32, 18),
    23: TensorType("IQ4_XS", 256, 136),
    26: TensorType("I32", 1, 4),
    30: TensorType("BF16", 1, 2),
}
"""ggml's number of a type → what it is (ggml/include/ggml.h, ggml-common.h): those that the
recipes' schemes can lead to."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: bytes `start` to `end` of `file`, row-major like the source's `shape`."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # (..., rows, columns): GGUF's dimensions the other way round
    file: Path
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file, without what fills up to the alignment."""
        return self.end - self.start

    def load(self) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, (rows, bytes of a row) uint8, mapped and not read yet."""
        flat = np.memmap(self.file, np.uint8, "r", self.start, (self.bytes,))
        columns = self.shape[-1] if self.shape else 1
        row_bytes = columns // self.type.elements * self.type.bytes
        return flat.reshape(-1, row_bytes) if row_bytes else flat.reshape(0, 1)


@dataclass(frozen=True)
class Gguf:
    """A file's header."""

    path: Path
    metadata: dict[str, Any]  # arrays as lists
    tensors: dict[str, GgufTensor]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors by their number of values, scales included."""
        return 8 * self.weight_bytes / sum(tensor.elements for tensor in self.tensors.values())


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file.

    Raises SourceError, naming the file, for anything that the format does not allow: another magic
    or version, counts and texts longer than the file or the limits above, nested arrays, repeated
    names, unknown types, rows that are no whole number of blocks, intervals that overlap, leave
    holes or end beyond the file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(path, file, size)
        head = reader.take(4)
        if head != MAGIC:
            file.seek(0)
            what = what_it_is(file.read(512))
            raise _damaged(path, f"it is {what}" if what else "it does not start with GGUF")
        version = reader.number("<I")
        if version != VERSION:
            raise _damaged(path, f"its version is {version}, and {VERSION} is read")
        tensor_count = reader.count("tensors", MOST_TENSORS)
        entry_count = reader.count("metadata entries", MOST_ENTRIES)
        metadata = _metadata(reader, entry_count)
        described = [_described(reader) for _ in range(tensor_count)]
        alignment = _alignment(path, metadata)
        start = _aligned(reader.position, alignment)
    return Gguf(path, metadata, _tensors(path, described, start, alignment, size))


class _Reader:
    """Reads forwards and never more than there is."""

    def __init__(self, path: Path, file: io.BufferedReader, size: int) -> None:
        self.path, self._file, self._size, self.position = path, file, size, 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if self.position + count > min(self._size, HEADER_LIMIT_BYTES):
            if self.position + count > self._size:
                raise SourceError(
                    f"{self.path.name} is truncated: its header goes on at byte {self._size}, "
                    "where the file ends",
                    "download or make this file again",
                )
            raise _damaged(self.path, f"a header of more than {HEADER_LIMIT_BYTES >> 20} MiB")
        data = self._file.read(count)
        if len(data) != count:
            raise _damaged(self.path, "it became shorter while it was read")
        self.position += count
        return data

    def number(self, form: str) -> Any:
        """One scalar of a struct format."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, most: int) -> int:
        """A 64-bit count of things that take a byte each at least."""
        found = int(self.number("<Q"))
        if found > most:
            raise _damaged(self.path, f"it says that it has {found} {what} (at most {most})")
        return found

    def text(self, what: str, longest: int) -> str:
        """A text; bytes that are no UTF-8 are written out."""
        return self.take(self.count(f"bytes in {what}", longest)).decode(
            "utf-8", "backslashreplace"
        )


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text("a key", LONGEST_KEY_BYTES)
        if key in found:
            raise _damaged(reader.path, f"it has {shortened(key)} twice")
        found[key] = _value(reader, key, int(reader.number("<I")))
    return found


def _value(reader: _Reader, key: str, kind: int) -> Any:
    if kind == TEXT:
        return reader.text(shortened(key), LONGEST_TEXT_BYTES)
    if kind in SCALARS:
        return reader.number(SCALARS[kind])
    if kind != ARRAY:
        raise _damaged(reader.path, f"{shortened(key)} has the unknown type {kind}")
    inner = int(reader.number("<I"))
    count = reader.count(f"elements in {shortened(key)}", HEADER_LIMIT_BYTES)
    if inner == TEXT:
        return [reader.text(shortened(key), LONGEST_TEXT_BYTES) for _ in range(count)]
    if inner not in SCALARS:  # arrays of arrays are allowed there, and nothing writes them
        raise _damaged(reader.path, f"{shortened(key)} is an array of the type {inner}")
    form = SCALARS[inner]
    data = reader.take(count * struct.calcsize(form))
    return np.frombuffer(data, np.dtype(form)).tolist()


def _described(reader: _Reader) -> tuple[str, TensorType, tuple[int, ...], int]:
    """(name, type, shape, offset in the data) of the next tensor."""
    name = reader.text("a tensor's name", LONGEST_KEY_BYTES)
    shown = shortened(name)
    dimensions = int(reader.number("<I"))
    if dimensions > MOST_DIMENSIONS:
        raise _damaged(reader.path, f"tensor {shown} has {dimensions} dimensions")
    extents = tuple(int(reader.number("<Q")) for _ in range(dimensions))
    kind, offset = int(reader.number("<I")), int(reader.number("<Q"))
    if kind not in TYPES:
        raise _damaged(reader.path, f"tensor {shown} has the type {kind}, which is not read")
    tensor_type = TYPES[kind]
    if any(extent > LARGEST_EXTENT for extent in extents) or offset > LARGEST_EXTENT:
        raise _damaged(reader.path, f"tensor {shown} is larger than any disk")
    if extents and extents[0] % tensor_type.elements:
        raise _damaged(
            reader.path,
            f"rows of tensor {shown} have {extents[0]} values, which are no whole blocks of "
            f"{tensor_type.elements} ({tensor_type.name})",
        )
    return name, tensor_type, extents[::-1], offset


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    sound = type(found) is int and 8 <= found <= LARGEST_ALIGNMENT and found & (found - 1) == 0
    if not sound:
        raise _damaged(path, f"its alignment is {shortened(str(found))}")
    return int(found)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _tensors(
    path: Path,
    described: list[tuple[str, TensorType, tuple[int, ...], int]],
    start: int,
    alignment: int,
    size: int,
) -> dict[str, GgufTensor]:
    """The tensors by name; their intervals tile the data but for what fills up to the alignment."""
    found: dict[str, GgufTensor] = {}
    position = start
    for name, kind, shape, offset in sorted(described, key=lambda entry: entry[3]):
        if name in found:
            raise _damaged(path, f"it has tensor {shortened(name)} twice")
        begin = start + offset
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "follows a hole"
            raise _damaged(path, f"tensor {shortened(name)} {fault}")
        end = begin + math.prod(shape) // kind.elements * kind.bytes
        if end > size:
            raise SourceError(
                f"{path.name} is truncated: tensor {shortened(name)} ends at byte {end}, the file "
                f"has {size}",
                "download or make this file again",
            )
        found[name] = GgufTensor(name, kind, shape, path, begin, end)
        position = _aligned(end, alignment)
    last = max((tensor.end for tensor in found.values()), default=size)
    if not last <= size <= max(position, last):
        raise _damaged(path, f"its header accounts for {position} bytes, the file has {size}")
    return found


def _damaged(path: Path, fault: str) -> SourceError:
    return SourceError(
        f"{path.name} is not a valid GGUF file: {fault}", "download or make this file again"
    )
