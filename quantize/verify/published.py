"""What lies at a published place: a folder, a repository of the Hub at one commit, or a URL.

Nothing of it is trusted: names must stay inside the folder, links are not followed, and documents
larger than :data:`DOCUMENT_BYTES` are not read.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import SourceError, UsageError
from quantize.keys import file_sha256
from quantize.listing import LISTING, is_inside, read_listing
from quantize.store import FileEntry

DOCUMENT_BYTES = 256 << 20
"""Largest card, record, statement, listing or signature that is read."""

NOT_OURS = (".git", ".cache", ".gitattributes", ".gitignore", "LICENSE")
"""At the top of a published place: what git, the Hub and its client put there."""

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class Published:
    """A published place as it was read."""

    place: str  # as a person calls it
    listing: Mapping[str, FileEntry]  # what it says of itself
    found: Mapping[str, FileEntry]  # what is there; listed files with their sha256, others ""
    links: tuple[str, ...]  # not followed
    folder: Path  # holds the files named in `readable`
    readable: frozenset[str]
    commit: str | None = None  # of a repository

    def text(self, name: str) -> str:
        """A document as text; a ValueError where it is not there, too large, or not UTF-8."""
        if name not in self.readable:
            raise ValueError(f"{name} is missing")
        path = self.folder / name
        if path.stat().st_size > DOCUMENT_BYTES:
            raise ValueError(f"{name} is larger than {DOCUMENT_BYTES >> 20} MiB")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8") from error


@contextmanager
def read_published(
    place: str, revision: str | None, *, full: bool, on_progress: OnProgress
) -> Iterator[Published]:
    """What lies in a folder, a repository or at a URL; documents can be read inside the block.

    Large files of a repository are compared by the Hub's own sha256, those at a URL by reading
    them; with `full` they are downloaded. Raises UsageError where `place` is none of these,
    SourceError without a sound listing, and what :mod:`quantize.hub` and :mod:`quantize.bucket`
    raise.
    """
    folder = Path(place).expanduser()
    if "://" in place:
        if revision is not None:
            raise UsageError(f"--revision is for a repository; {place} is a URL", "leave it out")
        with tempfile.TemporaryDirectory(prefix="quantize-verify-") as work:
            yield _read_url(place.rstrip("/"), Path(work), full, on_progress)
    elif folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision is for a repository; {place} is a folder", "leave it out")
        yield _read_folder(folder, place, on_progress)
    elif folder.exists():
        raise UsageError(f"{place} is a file", "name the folder that holds it, or a repository")
    elif REPOSITORY.fullmatch(place):
        with tempfile.TemporaryDirectory(prefix="quantize-verify-") as work:
            yield _read_repository(place, revision, Path(work), full, on_progress)
    else:
        raise UsageError(
            f"{place} is neither a folder nor the name of a repository",
            "name a folder that exists, a repository as owner/name, or a URL (s3://...)",
        )


def is_ours(name: str) -> bool:
    """Whether a file is one that publishing puts there, or would be if it were listed."""
    return name.partition("/")[0] not in NOT_OURS


def _read_folder(folder: Path, place: str, on_progress: OnProgress) -> Published:
    names, links = _walk(folder)
    listing = _listing(folder, place, LISTING in names)
    found, total, done = {}, sum(path.stat().st_size for path in names.values()), 0
    for name, path in names.items():
        size = path.stat().st_size
        sha256 = file_sha256(path) if name in listing or name == LISTING else ""
        found[name] = FileEntry(name, size, sha256)
        done += size
        on_progress(done, total)
    return Published(place, listing, found, links, folder, frozenset(found))


def _walk(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Regular files by name, sorted, and the names of links and of what is neither."""
    files, links = {}, []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                links.append(relative)
            elif path.is_file():
                files[relative] = path
    return dict(sorted(files.items())), tuple(sorted(links))


@dataclass(frozen=True)
class _Remote:
    """Files that are elsewhere: their sizes, and how one is brought here or hashed there."""

    place: str
    sizes: Mapping[str, int]
    bring: Callable[[str, Path], None]  # into a folder, under its name
    sha256: Callable[[str], str | None]  # None: it must be brought here to be hashed
    commit: str | None = None


def _read_repository(
    repo: str, revision: str | None, work: Path, full: bool, on_progress: OnProgress
) -> Published:
    from quantize.hub import repository as hub

    access = hub.access_from_environment()
    commit = hub.resolve_revision(access, repo, revision)
    files = hub.list_files(access, repo, commit)
    remote = _Remote(
        f"{repo} at {commit}",
        {name: file.bytes for name, file in files.items()},
        lambda name, folder: hub.download_files(access, repo, commit, {name: files[name]}, folder),
        lambda name: files[name].sha256,
        commit,
    )
    return _read_remote(remote, work / "files", full, on_progress)


def _read_url(url: str, work: Path, full: bool, on_progress: OnProgress) -> Published:
    """Every listed file is read whole: a bucket knows no sha256."""
    from quantize.bucket import client as bucket

    place = bucket.open_place(url)
    sizes = {name: file.bytes for name, file in bucket.list_files(place).items()}
    remote = _Remote(
        url,
        sizes,
        lambda name, folder: bucket.fetch(place, name, folder / name),
        lambda name: bucket.sha256(place, name, sizes[name]),
    )
    return _read_remote(remote, work / "files", full, on_progress)


def _read_remote(remote: _Remote, folder: Path, full: bool, on_progress: OnProgress) -> Published:
    """Documents, and with `full` everything that is listed, are brought into `folder`."""
    sizes = {name: size for name, size in remote.sizes.items() if is_inside(name)}
    if LISTING in sizes:
        remote.bring(LISTING, folder)
    listing = _listing(folder, remote.place, LISTING in sizes)
    wanted = sorted(listing.keys() & sizes.keys())
    found = {name: FileEntry(name, size, "") for name, size in sizes.items()}
    total, done, readable = sum(sizes[name] for name in wanted), 0, {LISTING}
    for name in wanted:
        sha256 = None if full or _is_document(name) else remote.sha256(name)
        if sha256 is None:
            remote.bring(name, folder)
            sha256 = file_sha256(folder / name)
            readable.add(name)
        found[name] = FileEntry(name, sizes[name], sha256)
        done += sizes[name]
        on_progress(done, total)
    return Published(remote.place, listing, found, (), folder, frozenset(readable), remote.commit)


def _is_document(name: str) -> bool:
    return name == "README.md" or name.startswith(("quantize/", ".eval_results/"))


def _listing(folder: Path, place: str, there: bool) -> dict[str, FileEntry]:
    if not there:
        raise SourceError(
            f"{place} has no {LISTING}: this program did not publish it, or the listing is gone",
            "name a folder or a repository that `quantize run` published",
        )
    path = folder / LISTING
    try:
        if path.stat().st_size > DOCUMENT_BYTES:
            raise ValueError(f"it is larger than {DOCUMENT_BYTES >> 20} MiB")
        return read_listing(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise SourceError(
            f"{LISTING} of {place} is not a sound listing: {error}",
            "get the files again; where they are as published, do not use them",
        ) from error
