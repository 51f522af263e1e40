"""Two versions of a small model, with every way a file can travel, and the Hub that holds one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.listing import LISTING, write_listing
from quantize.store import FileEntry
from tests.hub_server import Limits
from tests.hub_server.repos import Tree

LIMITS = Limits(multipart_bytes=60_000, part_bytes=30_000)
IN_MEMORY_BYTES = 50_000
CARD = b"---\nlicense: apache-2.0\nbase_model: acme/base\n---\n# Version %d\n"


def _noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


FIRST: dict[str, bytes] = {
    "README.md": CARD % 1,
    "config.json": b'{"bits": 8}\n',
    "tokenizer.json": b"{}\n",
    "model-00001-of-00002.safetensors": _noise(1, 20_000),
    "model-00002-of-00002.safetensors": _noise(2, 70_000),
    "merges.txt": b"a b\n",
    "quantize/plots/old.png": b"\x89PNG\0" + _noise(3, 2_000),
    "quantize/record.json": b'{"version": 1}\n',
}
SECOND: dict[str, bytes] = {
    "README.md": CARD % 2,
    "config.json": b'{"bits": 4}\n',
    "tokenizer.json": b"{}\n",
    "model-00001-of-00002.safetensors": _noise(1, 20_000),  # stays
    "model-00002-of-00002.safetensors": _noise(4, 80_000),  # changes, in three parts
    "model-extra.safetensors": _noise(5, 25_000),  # new
    "quantize/plots/new.png": b"\x89PNG\0" + _noise(6, 3_000),
    "quantize/record.json": b'{"version": 2}\n',
    "empty.txt": b"",
}  # merges.txt and old.png are gone


@dataclass(frozen=True)
class Version:
    """Files on disk and the checksums that a repository with them has."""

    folder: Path
    sha256: Mapping[str, str]

    def is_in(self, tree: Tree) -> bool:
        """Whether a commit has these files and, but for the Hub's and `theirs.txt`, no others."""
        found = {name: file.sha256 for name, file in tree.items()}
        found.pop(".gitattributes", None)
        found.pop("theirs.txt", None)
        return found == self.sha256


def write_version(folder: Path, contents: Mapping[str, bytes]) -> Version:
    """The files with their listing."""
    entries = []
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        entries.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
    entries.append(write_listing(folder / LISTING, entries))
    return Version(folder, {entry.name: entry.sha256 for entry in entries})
