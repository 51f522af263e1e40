"""Publishing to a folder: complete or absent, nothing of the user's overwritten.

The files are written to a hidden folder beside the target, synced, and renamed into place. An
earlier publish of ours is replaced. A folder with files that we did not publish is refused, and one
whose files somebody changed is moved aside.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize import stop
from quantize.disk import FULL, room
from quantize.errors import ConflictError, ResourceError, UsageError
from quantize.findings import Finding
from quantize.listing import LISTING, damage, not_as_made, parse_listing
from quantize.locks import lock_on
from quantize.store import FileEntry, fsync

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Written:
    """`changed` is False when the folder held exactly these files already."""

    changed: bool
    aside: Path | None = None  # where a folder that somebody had changed is now


def publish_folder(
    target: Path,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    lock: Path,
    on_progress: Callable[[int, int], None],
) -> Written:
    """Make `target` hold `files` (bytes in `paths`, by name), copied, so that edits stay there.

    `files` contains the listing. `lock` is held meanwhile; it must be the same file for the same
    target. Raises ConflictError for files of others in `target`, SourceError for a source that is
    not what its entry says, ResourceError when the disk refuses.
    """
    new = target.with_name(f".{target.name}.quantize-new")
    old = target.with_name(f".{target.name}.quantize-old")
    total = sum(entry.bytes for entry in files)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock_on(lock):
        try:
            _clean_up(target, new, old)
            _refuse_files_of_others(target)
            if not _damage(target, {entry.name: entry for entry in files}):
                return Written(changed=False)
            aside = _aside(target)
            try:
                _fill(new, files, paths, on_progress)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            with stop.held():  # between the two renames nothing is published
                if target.exists():
                    os.rename(target, aside or old)
                os.rename(new, target)
                fsync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            number = error.errno
            more = f"; {room(target.parent, total)}" if number in FULL else ""
            raise ResourceError(
                f"cannot publish to {target}: {error.strerror or error}{more}",
                "free space or permissions there, or set another publish.folder",
            ) from error
    return Written(changed=True, aside=aside)


def folder_findings(target: Path, taken: Iterable[Path]) -> list[Finding]:
    """A folder to publish to that is, holds or lies inside one that is `taken`."""
    hint = "set publish.folder to a folder of its own"
    place = target.resolve()
    return [
        Finding(f"publish.folder: {target} overlaps {other}, which is in use", hint, UsageError)
        for other in taken
        if place == other.resolve()
        or place in other.resolve().parents
        or other.resolve() in place.parents
    ]


def _clean_up(target: Path, new: Path, old: Path) -> None:
    """What a killed run left: a half-written folder, and maybe the earlier one out of its place."""
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)


def _refuse_files_of_others(target: Path) -> None:
    """ConflictError if `target` holds anything that its own listing does not name."""
    if not target.exists():
        return
    hint = "move it away or delete it, or set another publish.folder; then run the command again"
    if not target.is_dir():
        raise ConflictError(f"{target} is not a folder", hint)
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir()}
    if not present:
        return
    others = sorted(present - {LISTING} - _own_listing(target).keys())
    if LISTING not in present or others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise ConflictError(
            f"{target} holds files that this pipeline did not publish: {shown}", hint
        )


def _own_listing(target: Path) -> dict[str, FileEntry]:
    path = target / LISTING
    if not path.is_file():
        return {}
    return parse_listing(path.read_text(encoding="utf-8", errors="replace"), str(path))


def _damage(target: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """As :func:`damage` with contents, plus files that `files` does not name any more."""
    gone = sorted(_own_listing(target).keys() - files.keys())
    return [f"{name} is not published any more" for name in gone] + damage(
        target, files, hash_files=True
    )


def _aside(target: Path) -> Path | None:
    """A free name for an earlier publish that somebody changed since; None if it is unchanged."""
    present = {
        name: entry for name, entry in _own_listing(target).items() if (target / name).is_file()
    }
    if not damage(target, present, hash_files=True):
        return None
    number = 1
    while (path := target.with_name(f"{target.name}.changed-{number}")).exists():
        number += 1
    return path


def _fill(
    folder: Path,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    on_progress: Callable[[int, int], None],
) -> None:
    """Copy every file into `folder`, checking it on the way, and sync everything."""
    total, done = sum(entry.bytes for entry in files), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    for entry in files:
        destination = folder / entry.name
        destination.parent.mkdir(parents=True, exist_ok=True)
        _copy(entry, paths[entry.name], destination, advance)
    for parent, _, _ in os.walk(folder):
        fsync(Path(parent))


def _copy(
    entry: FileEntry, source: Path, destination: Path, advance: Callable[[int], None]
) -> None:
    """Copy and sync one file; SourceError if its bytes are not those of its entry."""
    if not source.is_file():
        raise not_as_made(source, "is missing")
    digest = hashlib.sha256()
    with source.open("rb") as reader, destination.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
            advance(len(chunk))
        writer.flush()
        os.fsync(writer.fileno())
    if digest.hexdigest() != entry.sha256:
        raise not_as_made(source, "was changed since it was made (sha256 differs)")
