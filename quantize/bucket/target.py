"""Publishing to a bucket, or to any other URL that fsspec can write: complete, or no manifest.

Object stores know no rename and no transaction over several files. What makes a publish is
therefore its listing, `quantize/manifest.json`: it is there only while every file that it names is
there with that content. One publish is, in this order:

1. `quantize/publishing.json` is written: which files are ours, and which will change.
2. The earlier listing is deleted, then `config.json` (without it no loader takes the rest for a
   model), then files that are gone.
3. What is new or different is sent, `config.json` last.
4. Everything is listed and compared.
5. The listing is written and read back, `quantize/publishing.json` deleted.

A run that is killed leaves `quantize/publishing.json`, from which the next one knows what is ours.
Files of others are neither overwritten nor deleted: a place that holds any is refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from quantize.bucket.client import (
    Place,
    RemoteFile,
    delete,
    discard_unfinished,
    etag_of,
    list_files,
    open_place,
    read,
    require_write,
    send,
    sha256,
    write,
)
from quantize.bucket.errors import TRY_AGAIN
from quantize.errors import ConflictError, ToolError
from quantize.keys import file_sha256
from quantize.listing import LISTING, not_as_made, parse_listing
from quantize.locks import lock_on
from quantize.store import FileEntry

PUBLISHING = "quantize/publishing.json"
SCHEMA = "quantize.publishing/1"
ENTRANCE = "config.json"
"""Deleted first and sent last."""
SAMPLE_BYTES = 64 << 10
"""Read back from the beginning of a file and from somewhere in it, where no checksum is told."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Found:
    """What the place holds, and which of it an earlier publish left there."""

    files: Mapping[str, RemoteFile]
    recorded: Mapping[str, FileEntry]  # what our notes say that it holds
    unsure: frozenset[str]  # ours, but a killed run was about to change them
    listing: bytes | None
    publishing: bytes | None  # what a killed run noted

    @property
    def ours(self) -> set[str]:
        """Names of our files, whether there now or not."""
        return {*self.recorded, *self.unsure, LISTING, PUBLISHING}


@dataclass
class _Local:
    """The files to publish. Digests are computed once."""

    entries: Mapping[str, FileEntry]  # without the listing
    paths: Mapping[str, Path]
    part_bytes: int
    _etags: dict[str, str] = field(default_factory=dict)

    def etag(self, name: str) -> str:
        """What S3 answers for this file."""
        if name not in self._etags:
            self._etags[name] = etag_of(self.paths[name], self.part_bytes)
        return self._etags[name]

    def check(self, names: Sequence[str]) -> None:
        """SourceError for a file that is not what it was when it was made."""
        for name in names:
            path, entry = self.paths[name], self.entries[name]
            if not path.is_file():
                raise not_as_made(path, "is missing")
            if path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
                raise not_as_made(path, "was changed since it was made (sha256 differs)")


def publish_url(
    place: Place,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    lock: Path,
    on_progress: OnProgress,
) -> bool:
    """Make the place hold `files` (bytes in `paths`, by name); whether anything had to be changed.

    `files` contains the listing. `lock` keeps runs on this machine from one place; one on another
    machine is noticed before the listing is written. Raises ConflictError for files of others,
    SourceError for a local file that is not what its entry says (before anything is changed), and
    what :func:`quantize.bucket.errors.translate` makes of the backend's errors.
    """
    entries = {entry.name: entry for entry in files if entry.name != LISTING}
    local = _Local(entries, paths, place.part_bytes)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock_on(lock):
        found = _find(place)
        _refuse_files_of_others(place, found)
        add = [name for name in sorted(entries) if not _holds(place, found, local, name)]
        gone = sorted((found.ours & found.files.keys()) - {*entries, LISTING, PUBLISHING})
        listing = paths[LISTING].read_bytes()
        if not (add or gone) and found.listing == listing:
            if PUBLISHING in found.files:  # a run was killed at its very end
                delete(place, PUBLISHING)
            return False
        if (add or gone) and ENTRANCE in entries and ENTRANCE not in add:
            add.append(ENTRANCE)
        local.check(add)
        notes = _begin(place, found, local, add, gone)
        _send(place, local, sorted(add, key=lambda name: (name == ENTRANCE, name)), on_progress)
        _verify(place, local, notes)
        write(place, LISTING, listing)
        if read(place, LISTING) != listing:
            raise ToolError(f"{place.url}/{LISTING} is not what was sent", TRY_AGAIN)
        delete(place, PUBLISHING)
    return True


def check_url(url: str) -> None:
    """What can be known beforehand: the backend, the credentials, the bucket, whose files it holds.

    Nothing is left there. Raises what :func:`publish_url` raises.
    """
    place = open_place(url)
    _refuse_files_of_others(place, _find(place))
    require_write(place)


def _find(place: Place) -> _Found:
    """List the place, and read what earlier runs noted there.

    Where writing is not atomic, a kill can leave half a note. It was the first thing to be
    written, so that then the listing still holds, or there was nothing.
    """
    files = list_files(place)
    recorded: dict[str, FileEntry] = {}
    unsure: frozenset[str] = frozenset()
    publishing = read(place, PUBLISHING) if PUBLISHING in files else None
    noted = _parse_notes(publishing) if publishing is not None else None
    listing = read(place, LISTING) if LISTING in files else None
    if listing is not None:
        try:
            recorded = parse_listing(listing.decode("utf-8", "replace"), f"{place.url}/{LISTING}")
        except ConflictError:
            if noted is None:
                raise
    if noted is not None:
        recorded, unsure = noted
    return _Found(files, recorded, unsure, listing, publishing)


def _parse_notes(content: bytes) -> tuple[dict[str, FileEntry], frozenset[str]] | None:
    """The files that a killed run left as they were, and those it was about to change."""
    try:
        value = json.loads(content)
        if value["schema"] != SCHEMA:
            return None
        entries = [FileEntry(**entry) for entry in value["files"]]
        return {entry.name: entry for entry in entries}, frozenset(value["changing"])
    except (ValueError, TypeError, KeyError):
        return None


def _refuse_files_of_others(place: Place, found: _Found) -> None:
    """ConflictError if the place holds anything that our own notes do not name."""
    others = sorted(found.files.keys() - found.ours)
    if others:
        shown = ", ".join(name or "it is a file" for name in others[:5])
        more = ", ..." if len(others) > 5 else ""
        raise ConflictError(
            f"{place.url} holds files that this pipeline did not publish: {shown}{more}",
            "publish to another place (a longer prefix), or move these away",
        )


def _holds(place: Place, found: _Found, local: _Local, name: str) -> bool:
    """Whether the place has our bytes under this name, as far as its checksums or a read tell."""
    remote, entry = found.files.get(name), local.entries[name]
    if remote is None or remote.bytes != entry.bytes:
        return False
    if name in found.unsure:
        if remote.etag is not None:
            return remote.etag == local.etag(name)
        return sha256(place, name, entry.bytes) == entry.sha256
    recorded = found.recorded.get(name)
    if recorded is None or recorded.sha256 != entry.sha256:
        return False
    return _arrived(place, remote, local, name)


def _arrived(place: Place, remote: RemoteFile, local: _Local, name: str) -> bool:
    """Whether a file that we know to have sent is still what we sent.

    S3's own checksum first; where it says something else (a bucket encrypted with a key of KMS
    does) the whole file; where nothing is told, its beginning and a random range.
    """
    entry = local.entries[name]
    if remote.bytes != entry.bytes:
        return False
    if remote.etag is not None:
        if remote.etag == local.etag(name):
            return True
        return sha256(place, name, entry.bytes) == entry.sha256
    somewhere = random.randrange(max(1, entry.bytes - SAMPLE_BYTES))
    with local.paths[name].open("rb") as file:
        for start in (0, somewhere):
            file.seek(start)
            mine = file.read(SAMPLE_BYTES)
            if mine and read(place, name, start, start + len(mine)) != mine:
                return False
    return True


def _begin(
    place: Place, found: _Found, local: _Local, add: Sequence[str], gone: Sequence[str]
) -> bytes:
    """Note what will change, then take away what would be untrue meanwhile; the notes' text."""
    kept = [asdict(local.entries[name]) for name in sorted(local.entries.keys() - set(add))]
    value = {"schema": SCHEMA, "files": kept, "changing": sorted({*add, *gone})}
    notes = (json.dumps(value, indent=1) + "\n").encode()
    if found.publishing != notes:
        write(place, PUBLISHING, notes)
    if found.publishing is not None:
        discard_unfinished(place)
    if LISTING in found.files:
        delete(place, LISTING)
    if ENTRANCE in found.files and ENTRANCE in add:
        delete(place, ENTRANCE)
    for name in gone:
        delete(place, name)
    return notes


def _send(place: Place, local: _Local, names: Sequence[str], on_progress: OnProgress) -> None:
    total, done = sum(local.entries[name].bytes for name in names), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, total), total)

    for name in names:
        before = done
        send(place, name, local.paths[name], advance)
        advance(before + local.entries[name].bytes - done)  # where the backend told nothing


def _verify(place: Place, local: _Local, notes: bytes) -> None:
    """Every file is there as it should be, nothing else is, and nobody else is publishing."""
    files = list_files(place)
    if PUBLISHING not in files or read(place, PUBLISHING) != notes:
        raise ConflictError(
            f"another run is publishing to {place.url}",
            "let one of them finish, then run the command again",
        )
    others = sorted(files.keys() - local.entries.keys() - {PUBLISHING})
    if others:
        raise ConflictError(
            f"{place.url} got files of others while we published: {', '.join(others[:5])}",
            "move these away and run the command again",
        )
    wrong = [
        name
        for name in local.entries
        if name not in files or not _arrived(place, files[name], local, name)
    ]
    if wrong:
        raise ToolError(f"{place.url} does not hold what was sent: {', '.join(wrong)}", TRY_AGAIN)
