"""Xet's formats as hf_xet sends them: xorbs of compressed chunks, and shards.

A xorb is a row of chunks, each after a header of 8 bytes: version, compressed size (3 bytes),
compression (0 none, 1 LZ4, 2 LZ4 of bytes grouped by four), size (3 bytes); little-endian. A shard
says which chunks of which xorbs a file consists of, in entries of 48 bytes, and its sha256. The
chunks' own hashes are not looked at: the files' sha256 shows whether the bytes are right.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import lz4.frame
import numpy as np

from tests.hub_server.accounts import Refused

HEADER_BYTES, ENTRY_BYTES = 48, 48
BOOKEND = b"\xff" * 32
VERIFIED, DESCRIBED = 1 << 31, 1 << 30  # what follows the segments: hashes of each; the sha256


@dataclass(frozen=True)
class Segment:
    """Some chunks of a xorb, the last exclusive."""

    xorb: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class XetFile:
    """A file that a shard describes."""

    sha256: str
    segments: tuple[Segment, ...]

    def content(self, xorbs: Mapping[str, bytes]) -> bytes:
        """The file's bytes; Refused when a xorb is missing or shorter than said."""
        parts = []
        for segment in self.segments:
            if segment.xorb not in xorbs:
                raise Refused(400, f"xorb {segment.xorb} was not uploaded")
            part = b"".join(chunks_of(xorbs[segment.xorb])[segment.first : segment.last])
            if len(part) != segment.size:
                raise Refused(400, f"xorb {segment.xorb} has not the bytes that the shard names")
            parts.append(part)
        return b"".join(parts)


def hash_text(raw: bytes) -> str:
    """A hash in Xet's notation: four little-endian numbers of 8 bytes."""
    return "".join(raw[start : start + 8][::-1].hex() for start in range(0, 32, 8))


def chunks_of(xorb: bytes) -> list[bytes]:
    """The chunks, decompressed."""
    chunks, place = [], 0
    while place < len(xorb):
        stored = int.from_bytes(xorb[place + 1 : place + 4], "little")
        kind, size = xorb[place + 4], int.from_bytes(xorb[place + 5 : place + 8], "little")
        if xorb[place] != 0 or kind > 2:
            raise Refused(400, "a xorb of an unknown version or compression")
        chunk = xorb[place + 8 : place + 8 + stored]
        try:
            chunk = lz4.frame.decompress(chunk) if kind else chunk
        except RuntimeError as error:
            raise Refused(400, f"a chunk cannot be decompressed: {error}") from error
        chunk = _ungrouped(chunk) if kind == 2 else chunk
        if len(chunk) != size:
            raise Refused(400, "a chunk has another size than its header says")
        chunks.append(chunk)
        place += 8 + stored
    return chunks


def files_of(shard: bytes) -> list[XetFile]:
    """The files that a shard describes."""
    files, place = [], HEADER_BYTES
    while place + ENTRY_BYTES <= len(shard) and shard[place : place + 32] != BOOKEND:
        flags, count = struct.unpack_from("<II", shard, place + 32)
        place += ENTRY_BYTES
        segments = []
        for start in range(place, place + count * ENTRY_BYTES, ENTRY_BYTES):
            size, first, last = struct.unpack_from("<III", shard, start + 36)
            segments.append(Segment(hash_text(shard[start : start + 32]), size, first, last))
        place += count * ENTRY_BYTES * (2 if flags & VERIFIED else 1)
        if not flags & DESCRIBED:
            raise Refused(400, "the shard names no sha256")
        files.append(XetFile(hash_text(shard[place : place + 32]), tuple(segments)))
        place += ENTRY_BYTES
    return files


def _ungrouped(content: bytes) -> bytes:
    """Undo the grouping: all first bytes of four came first, then all second ones, ..."""
    values = np.frombuffer(content, dtype=np.uint8)
    found = np.empty_like(values)
    start = 0
    for offset in range(4):
        count = len(found[offset::4])
        found[offset::4] = values[start : start + count]
        start += count
    return found.tobytes()
