"""What was published, as a file among the published ones: names, sizes and checksums.

A published folder or repository says by itself which of its files are ours and whether they are
still what they were. The listing names every file but itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from quantize.errors import ConflictError, SourceError, ToolError
from quantize.keys import file_sha256
from quantize.protocol import write_json
from quantize.store import FileEntry

LISTING = "quantize/manifest.json"
SIGNATURE = "quantize/model.sig"
SCHEMA = "quantize.published/1"
SHA256 = re.compile(r"[0-9a-f]{64}")

DOT_FOLDERS = frozenset({".eval_results"})
"""The only names with a leading dot that are published."""


def write_listing(path: Path, files: Sequence[FileEntry]) -> FileEntry:
    """Write the listing of `files`, and return its own entry."""
    ordered = sorted(files, key=lambda entry: entry.name)
    write_json(path, {"schema": SCHEMA, "files": [asdict(entry) for entry in ordered]})
    return FileEntry(LISTING, path.stat().st_size, file_sha256(path))


def parse_listing(text: str, where: str) -> dict[str, FileEntry]:
    """The entries of a listing by name; ConflictError if the text is none."""
    try:
        return read_listing(text)
    except ValueError as error:
        raise ConflictError(
            f"{where} is not a listing that we wrote: {error}",
            "publish to another place, or delete it",
        ) from error


def read_listing(text: str) -> dict[str, FileEntry]:
    """The entries of a listing by name; a ValueError that says why the text is none.

    Names are relative, with forward slashes, and stay inside the folder: a listing may come from a
    stranger, and every one of its names becomes a path.
    """
    try:
        value = json.loads(text)
        if value["schema"] != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        entries = [FileEntry(**entry) for entry in value["files"]]
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError("it has no list of files with name, bytes and sha256") from error
    for entry in entries:
        if not is_inside(entry.name) or entry.name == LISTING:
            raise ValueError(f"it names {entry.name!r}, which is no file of the folder")
        sound = isinstance(entry.sha256, str) and SHA256.fullmatch(entry.sha256)
        if not sound or type(entry.bytes) is not int or entry.bytes < 0:
            raise ValueError(f"size or sha256 of {entry.name} is none")
    names = {entry.name: entry for entry in entries}
    if len(names) != len(entries):
        raise ValueError("it names a file twice")
    return names


def is_inside(name: object) -> bool:
    """Whether `name` is a relative path with forward slashes that cannot leave its folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name or ":" in name.partition("/")[0]:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def damage(folder: Path, files: Mapping[str, FileEntry], *, hash_files: bool) -> list[str]:
    """What is missing from `folder` or differs from `files`; added files are not looked for."""
    differences = (
        entry.difference(folder, hash_files=hash_files) for _, entry in sorted(files.items())
    )
    return [said for said in differences if said is not None]


def not_as_made(path: Path, what: str) -> SourceError:
    """The error for a file of an artifact that must not be published: missing, or changed."""
    return SourceError(
        f"{path} {what}; nothing was published",
        "run the same command again: a damaged artifact is made anew; "
        "`quantize store verify` finds all of them",
    )


def refuse_hidden(name: str) -> None:
    """ToolError for a name with a part that begins with a dot, and for one that leaves the root."""
    first, *rest = name.split("/")
    hidden = first.startswith(".") and first not in DOT_FOLDERS
    if hidden or any(part.startswith(".") for part in rest) or "" in (first, *rest):
        raise ToolError(
            f"{name} would be published, but hidden files never are",
            "this is a bug of the stage that made it: please report it",
        )
