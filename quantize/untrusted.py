"""Files that others made: opened only if regular, read only up to a size, named when wrong.

Nothing here follows what a file says, executes it or waits for it. Opening a named pipe would wait
for a writer, reading a device never ends, and a text of a few bytes can grow without bound as YAML;
every file of a checkpoint, an adapter or a data set goes through one of these functions before
anything else touches it.
"""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from quantize.errors import SourceError
from quantize.printable import shortened

JSON_LIMIT_BYTES = 256 << 20
"""The largest tokenizer.json in use has 33 MB, the largest index 20 MB."""

TEXT_LIMIT_BYTES = 16 << 20
"""Of a chat template, a card or a licence."""

HELD_OUT_LIMIT_BYTES = 256 << 20
"""Of held-out text, which is read whole: fifty million tokens."""

TABLE_LIMIT_BYTES = 64 << 30
"""Of any other file of data, which is hashed whole."""

FRONT_MATTER_LIMIT_BYTES = 256 << 10
MAX_DEPTH = 64
"""Levels of nesting in the front matter of a card."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_MAGIC = (
    (b"PK\x03\x04", "a zip archive (or a PyTorch pickle, which is one)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"Rar!", "a rar archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a parquet file"),
    (b"\x7fELF", "a program"),
    (b"#!", "a script"),
    (b"\x93NUMPY", "a numpy array"),
    (b"version https://git-lfs", "a git-lfs pointer"),
    *((b"\x80" + bytes([protocol]), "a Python pickle") for protocol in range(2, 6)),
)
"""First bytes of what is found under the names of weights and is none."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".7z", ".rar", ".tar.zst", ".tar.bz2")


def what_it_is(head: bytes) -> str | None:
    """What a file's first 512 bytes say that it is, or None where they say nothing."""
    if not head:
        return "empty"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, most likely an error message that was saved instead of the file"
    if text.startswith((b'{"error', b"{'error")):
        return "an error message that was saved instead of the file"
    return "zeros, of a download that was not finished" if not any(head) else None


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; SourceError for all else, without waiting for it."""
    try:
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)  # it may be another one by now
    except SourceError:
        file.close()
        raise
    return file


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise SourceError(f"{path} is {what}, not a file", "put the file itself there")


def unreadable(path: Path, error: Exception) -> SourceError:
    """The error for a file that the system does not give us."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SourceError(f"cannot read {path}: {reason}", "check that it exists and you may read it")


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """A whole small file; SourceError where it is larger than `limit_bytes`."""
    with open_regular(path) as file:
        try:
            data = file.read(limit_bytes + 1)
        except OSError as error:
            raise unreadable(path, error) from error
    if len(data) > limit_bytes:
        raise SourceError(
            f"{path} is larger than {limit_bytes} bytes, far more than such a file has",
            "look at what it is, and replace it",
        )
    return data


def read_text(path: Path, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """A whole small file of UTF-8, with or without a byte order mark; line ends as they are."""
    data = read_bytes(path, limit_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})", "save it as UTF-8"
        ) from error


def read_json_object(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in a file; SourceError names the file and the line of a mistake.

    Repeated names are refused: programs differ in which of the two they take. NaN and Infinity are
    read, as Python writes them into configs (`time_step_limit` of Mamba).
    """
    text = read_text(path, limit_bytes)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}", "correct or replace it") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}, not a JSON object", "replace it")
    return value


def parse_json(text: str) -> Any:
    """JSON without repeated names; ValueError also for what is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"repeated name {shortened(name)!r}")
            seen.add(name)
    return value


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML front matter of a Markdown file; empty without one.

    Every scalar stays a string: YAML would read the language code `no` as false. Aliases are
    refused, since a few lines of them stand for more text than there is memory.
    """
    lines = read_text(path).splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)])
    try:
        if len(text) > FRONT_MATTER_LIMIT_BYTES:
            raise ValueError(f"longer than {FRONT_MATTER_LIMIT_BYTES} characters")
        _require_plain(text)
        value = yaml.load(text, Loader=_LOADER)  # builds strings, lists and dicts only
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # TypeError: PyYAML on a list as a key; ValueError also: Python's own on bad escapes
        said = shortened(" ".join(str(error).split()), 300)
        raise SourceError(
            f"the front matter of {path} is not valid YAML: {said}", "correct or remove it"
        ) from error
    return value if isinstance(value, dict) else {}


_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def _require_plain(text: str) -> None:
    """ValueError for aliases and for deep nesting, read as a stream: nothing is built."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has an alias (*name): write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def foreign_link(path: Path) -> str | None:
    """Where a symbolic link leads that is not followed; None for a file, or a link that is.

    Links are followed inside their own folder, and from a snapshot of a Hugging Face cache into
    that repository's blobs (``models--owner--name/{snapshots/COMMIT,blobs}``): see
    docs/adr/0024-links.md. The folder itself may be named by a link: that is the user's word.
    """
    if not path.is_symlink():
        return None
    try:
        target = path.resolve(strict=True)
        folder = path.parent.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a ring of links, before Python 3.13
        return f"{path.readlink()}, which leads nowhere"
    if target.parent == folder:
        return None
    repository = folder.parent.parent
    in_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    if in_cache and target.parent == repository / "blobs":
        return None
    return str(target)
