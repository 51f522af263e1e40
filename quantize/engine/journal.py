"""What is finished, in a file of one synced line per layer; a kill loses the layer under way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from quantize.engine.source import Tensors
from quantize.protocol import WorkerError

NAME = "journal.jsonl"


class Journal:
    """The first line says which inputs the work belongs to; each further line is a finished part.

    A part is `outside` or a layer's number. Its line is written after its shard is in place, so a
    part with a line is never computed again, and one without is computed from the start.
    """

    def __init__(self, folder: Path, belongs_to: dict[str, Any], writes: bool = True) -> None:
        """Read what is there; only one process of several `writes`, and must have begun."""
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        self._path, self._writes = folder / NAME, writes
        self._first_line = json.dumps({"belongs_to": belongs_to}) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        lines, sound_bytes = _whole_lines(self._path)
        if writes and lines:
            os.truncate(self._path, sound_bytes)
        if not lines:
            _write_synced(self._path, self._first_line)
            return
        if lines[0].get("belongs_to") != belongs_to:
            changed = sorted(
                key
                for key in belongs_to
                if lines[0].get("belongs_to", {}).get(key) != belongs_to[key]
            )
            raise WorkerError(
                "ConflictError",
                f"{self._path} belongs to other inputs: {', '.join(changed) or 'unknown'} changed",
                f"remove {folder} to start this quantization from its first layer",
            )
        for line in lines[1:]:
            if self._sound(line):
                self.entries[line["part"]] = line

    def _sound(self, line: dict[str, Any]) -> bool:
        shard = self.folder / line["shard"]
        return shard.is_file() and bool(shard.stat().st_size == line["bytes"])

    def __contains__(self, part: object) -> bool:
        return str(part) in self.entries

    def finish(self, part: object, tensors: Tensors, **record: Any) -> None:
        """Write the part's shard (temporary file, sync, rename), then its line (synced)."""
        shard = f"part-{part}.safetensors"
        with _synced(self.folder / shard) as temporary:
            contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"format": "pt"})
        path = self.folder / shard
        line = {
            "part": str(part),
            "shard": shard,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "tensors": {
                name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()
            },
            **record,
        }
        _append_synced(self._path, json.dumps(line) + "\n")
        self.entries[str(part)] = line

    def forget(self, parts: Iterable[object]) -> None:
        """These parts are to be done again: their lines go."""
        gone = self.entries.keys() & {str(part) for part in parts}
        if not gone:
            return
        for part in gone:
            del self.entries[part]
        if self._writes:
            lines = (json.dumps(line) + "\n" for line in self.entries.values())
            _write_synced(self._path, self._first_line + "".join(lines))

    def check(self) -> None:
        """Read every shard again and compare it with what was written."""
        for entry in self.entries.values():
            path = self.folder / entry["shard"]
            if _sha256(path) != entry["sha256"]:
                raise WorkerError(
                    "ResourceError",
                    f"{path} was changed or damaged after it was written",
                    f"check the disk, then remove {self.folder} to start again",
                )


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The file's lines up to the first torn one, which a kill can leave, and their bytes."""
    lines: list[dict[str, Any]] = []
    sound = 0
    if not path.is_file():
        return lines, sound
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            sound += len(line)
            lines.append(value)
    return lines, sound


def _write_synced(path: Path, text: str) -> None:
    with _synced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _append_synced(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _synced(path: Path) -> Iterator[Path]:
    """A temporary name; what is written there is synced and gets the right one."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
