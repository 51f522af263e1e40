"""Looking for canaries in everything that a run wrote, printed and sent."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.faults.leaks import forms


def found(texts: Iterable[tuple[str, bytes]], canaries: Mapping[str, str]) -> set[str]:
    """ "<which canary> in <where>" for every text (name, content) that holds one in any form."""
    wanted = {name: forms(canary) | slashed(canary) for name, canary in canaries.items()}
    return {
        f"{name} in {where}"
        for where, content in texts
        for name, written in wanted.items()
        if any(form in layer for layer in layers(content) for form in written)
    }


def slashed(text: str) -> set[bytes]:
    r"""As JSON where its writer escapes slashes (``\/``)."""
    return {text.replace("/", r"\/").encode()}


def layers(content: bytes) -> Iterator[bytes]:
    """The content; of an archive (.npz) also its members, of a picture (PNG) its texts."""
    yield content
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield archive.read(name)
    if content.startswith(b"\x89PNG"):
        yield from _png_texts(content)


def _png_texts(content: bytes) -> Iterator[bytes]:
    """The data of zTXt and iTXt chunks; those of tEXt stand in the file as they are."""
    at = 8
    while at + 8 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        data = content[at + 8 : at + 8 + size]
        if kind in (b"zTXt", b"iTXt"):
            for start in range(len(data)):
                if data[start : start + 1] == b"\x78":
                    try:
                        yield zlib.decompress(data[start:])
                        break
                    except zlib.error:
                        continue
        at += 12 + size


def files(folder: Path, since: float = 0.0) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder that was written after `since` (seconds of the epoch)."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_mtime >= since:
            yield str(path), path.read_bytes()
