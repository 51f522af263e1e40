"""Content-addressed artifacts: `<store>/<kind>/<key>/`, complete or absent.

A stage writes into `<store>/<kind>/.staging/<key>/files/` under a lock that dies with its process.
:meth:`Store.commit` hashes and syncs every file, writes `manifest.json` last, and renames the
folder into place; a reader never sees a folder without a manifest. `.staging/<key>/work/` is the
stage's scratch space: it survives a kill, and since it is keyed like the result, a later run of the
same stage may continue from it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from quantize import stop
from quantize.disk import UNREADABLE
from quantize.errors import QuantizeError, ResourceError, ToolError
from quantize.hash_cache import HashCache, Stamp, stamp_of
from quantize.keys import file_sha256
from quantize.locks import lock_on
from quantize.protocol import write_json

MANIFEST = "manifest.json"
KEEP_RUNS = 20
"""Run folders that a garbage collection leaves."""
VERIFY_ON_READ_BYTES = 1 << 30
"""Artifacts up to this size are hashed whole at every hit; of larger ones the files that changed,
by size, times or inode, since they were last hashed. See docs/adr/0025."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact, its name relative to the artifact with forward slashes."""

    name: str
    bytes: int
    sha256: str

    def difference(self, folder: Path, *, hash_files: bool) -> str | None:
        """How the file below `folder` differs from this; None if it does not. May be an OSError."""
        path = folder / self.name
        if not path.is_file():
            return f"{self.name} is missing"
        if path.stat().st_size != self.bytes:
            return f"{self.name} has {path.stat().st_size} bytes, not {self.bytes}"
        if hash_files and file_sha256(path) != self.sha256:
            return _other_content(self.name)
        return None


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of an artifact; `manifest.json`, written last."""

    kind: str
    key: str
    key_inputs: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    recipe: str  # name of the recipe that first made it
    created: str  # UTC, ISO 8601; for people, no decision reads it
    seconds: Mapping[str, float]  # wall time by part; `total`, and `own` without the tools' part
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    schema: int = 1

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read `manifest.json`."""
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != 1:
            raise ValueError(f"{path}: schema {value['schema']}, need 1")
        value["files"] = tuple(FileEntry(**file) for file in value["files"])
        value["notes"] = tuple(value["notes"])
        return cls(**value)


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of one of the manifest's files; a KeyError if the manifest does not name it."""
        if not any(entry.name == name for entry in self.manifest.files):
            raise KeyError(name)
        return self.path / name

    def json(self, name: str) -> Any:
        """The value of a JSON file of the artifact."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def damage(self, *, hash_files: bool) -> list[str]:
        """What differs from the manifest: missing, resized, changed, lost or added files."""
        found = []
        for entry in self.manifest.files:
            try:
                if said := entry.difference(self.path, hash_files=hash_files):
                    found.append(said)
            except OSError as error:
                found.append(_lost(entry.name, error))
        known = {entry.name for entry in self.manifest.files} | {MANIFEST}
        found += [f"{name} was added" for name in _relative_files(self.path) if name not in known]
        return found


@dataclass(frozen=True)
class Staging:
    """Where a stage works: `files` becomes the artifact, `work` is scratch that survives a kill."""

    kind: str
    key: str
    folder: Path

    @property
    def files(self) -> Path:
        """Becomes the artifact. Emptied when the stage starts."""
        return self.folder / "files"

    @property
    def work(self) -> Path:
        """Scratch; deleted after the commit."""
        return self.folder / "work"


class Store:
    """The artifacts below one folder, which may be shared by many processes and machines."""

    def __init__(self, root: Path, hashes: HashCache | None = None) -> None:
        self.root = root
        self.hashes = hashes

    def path(self, kind: str, key: str) -> Path:
        """Where the artifact is, or would be."""
        return self.root / kind / key

    def get(self, kind: str, key: str) -> Artifact | None:
        """The artifact if it is complete; contents are not looked at."""
        path = self.path(kind, key)
        try:
            manifest = Manifest.load(path / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            return None  # its bytes are lost
        except (ValueError, KeyError, TypeError):  # a damaged manifest is no manifest
            return None
        # Nor is one that belongs elsewhere: somebody copied or renamed the folder.
        return Artifact(path, manifest) if (manifest.kind, manifest.key) == (kind, key) else None

    def damage(self, artifact: Artifact) -> list[str]:
        """Check a hit before it is used: names, sizes and contents.

        A large artifact's file that is the same by :data:`Stamp` as when it was last hashed is not
        read again, where this store was given a cache of hashes.
        """
        if self.hashes is None or artifact.manifest.total_bytes <= VERIFY_ON_READ_BYTES:
            return artifact.damage(hash_files=True)
        if found := artifact.damage(hash_files=False):
            return found
        entries = artifact.manifest.files
        try:
            digests = self.hashes.sha256_all([artifact.path / entry.name for entry in entries])
        except QuantizeError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            return [_lost(error.message, error.__cause__)]
        self.hashes.save()
        return [
            _other_content(entry.name)
            for entry, sha256 in zip(entries, digests, strict=True)
            if sha256 != entry.sha256
        ]

    def set_aside(self, kind: str, key: str) -> Path:
        """Move an artifact that cannot be used out of the way, for the user to look at."""
        target = self.root / ".damaged" / kind / f"{key}-{uuid.uuid4().hex[:12]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.path(kind, key), target)
        return target

    def artifacts(self) -> Iterator[Artifact]:
        """Every complete artifact."""
        if not self.root.is_dir():
            return
        for kind in sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != "."):
            for folder in sorted(p for p in kind.iterdir() if p.name[0] != "."):
                artifact = self.get(kind.name, folder.name)
                if artifact is not None:
                    yield artifact

    def unreadable(self) -> Iterator[Path]:
        """Folders in an artifact's place that have no manifest of this kind, key and schema."""
        if self.root.is_dir():
            for kind in sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != "."):
                for folder in sorted(p for p in kind.iterdir() if p.name[0] != "."):
                    if folder.is_dir() and self.get(kind.name, folder.name) is None:
                        yield folder

    def manifests(self, kind: str) -> Iterator[Manifest]:
        """The manifests of every complete artifact of one kind."""
        folder = self.root / kind
        if folder.is_dir():
            for path in sorted(p for p in folder.iterdir() if p.name[0] != "."):
                artifact = self.get(kind, path.name)
                if artifact is not None:
                    yield artifact.manifest

    def leftovers(self) -> Iterator[Path]:
        """Artifacts that were set aside, and scratch folders whose run is gone.

        A scratch folder's lock is held until the next is asked for, so that it can be removed.
        """
        yield from sorted(p for p in (self.root / ".damaged").glob("*/*") if p.is_dir())
        for folder in sorted(p for p in self.root.glob("*/.staging/*") if p.is_dir()):
            lock = lock_on(folder.with_name(f"{folder.name}.lock"))
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                yield folder

    def drop_scratch(self, kind: str, key: str) -> None:
        """Remove what a run left that was killed after its commit; nobody goes on from it."""
        folder = self.root / kind / ".staging" / key
        if folder.exists():
            lock = lock_on(folder.with_name(f"{key}.lock"))
            with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)

    def old_runs(self) -> list[Path]:
        """Run folders (logs, `status.json`, `result.json`) but the newest ones."""
        runs = sorted((self.root / ".runs").glob("*/"), key=lambda path: path.stat().st_mtime)
        return runs[:-KEEP_RUNS]

    @contextlib.contextmanager
    def staging(
        self,
        kind: str,
        key: str,
        wait_seconds: float = 6 * 3600,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Iterator[Staging]:
        """Hold the stage's lock; another run of the same stage waits and then finds the result.

        `on_wait` is called once before a wait. The scratch space goes when the block ends well.
        """
        folder = self.root / kind / ".staging" / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_on(folder.with_name(f"{key}.lock"))
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire(timeout=wait_seconds)
        except Timeout as error:
            raise ResourceError(
                f"another run has held {kind} {key[:12]} for {wait_seconds / 3600:.0f} h",
                "end the other run, or wait for it",
            ) from error
        try:
            staging = Staging(kind, key, folder)
            if staging.files.exists():
                shutil.rmtree(staging.files)
            staging.files.mkdir(parents=True)
            staging.work.mkdir(exist_ok=True)
            yield staging
            # Committed, or another run's result was found: nothing will continue from here.
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()

    def commit(
        self,
        staging: Staging,
        *,
        key_inputs: Mapping[str, Any],
        recipe: str,
        seconds: Mapping[str, float],
        versions: Mapping[str, str],
        notes: tuple[str, ...] = (),
    ) -> Artifact:
        """Sync, hash, write the manifest, rename into place, drop the scratch folder.

        An artifact stands alone: anything but regular files and folders in it is a ToolError.
        """
        entries: list[FileEntry] = []
        stamps: list[Stamp] = []
        for name in _relative_files(staging.files):
            path = staging.files / name
            if path.is_symlink() or not path.is_file() or name == MANIFEST:
                raise ToolError(
                    f"{staging.kind} wrote {name}, which cannot be part of an artifact",
                    "this is a bug of the stage: it must write regular files of its own",
                )
            _sync(path, staging)
            stamps.append(stamp_of(path))
            entries.append(FileEntry(name, path.stat().st_size, file_sha256(path)))
        manifest = Manifest(
            kind=staging.kind,
            key=staging.key,
            key_inputs=key_inputs,
            files=tuple(entries),
            recipe=recipe,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=seconds,
            versions=versions,
            notes=notes,
        )
        write_json(staging.files / MANIFEST, asdict(manifest))
        for folder, _, _ in os.walk(staging.files):
            _sync(Path(folder), staging)
        final = self.path(staging.kind, staging.key)
        with stop.held():  # complete or absent, and the earlier one not away without need
            if final.exists():  # damaged or stale, or it would have been found: we hold the lock
                self.set_aside(staging.kind, staging.key)
            os.rename(staging.files, final)
            fsync(final.parent)
        shutil.rmtree(staging.folder, ignore_errors=True)
        artifact = Artifact(final, manifest)
        self._remember(artifact, stamps)
        return artifact

    def _remember(self, artifact: Artifact, stamps: list[Stamp]) -> None:
        """A large artifact was hashed just now: the next hit need not."""
        if self.hashes is None or artifact.manifest.total_bytes <= VERIFY_ON_READ_BYTES:
            return
        for entry, stamp in zip(artifact.manifest.files, stamps, strict=True):
            self.hashes.remember(artifact.path / entry.name, stamp, entry.sha256)
        self.hashes.save()


def _relative_files(root: Path) -> list[str]:
    """Names of all files below `root`, sorted, with forward slashes; symlinks are not followed."""
    names = []
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files + links]
    return sorted(names)


def _other_content(name: str) -> str:
    return f"{name} has other content (sha256 differs)"


def _lost(name: str, error: OSError) -> str:
    """The damage of a file whose bytes the disk does not give; any other error is raised."""
    if error.errno not in UNREADABLE:
        raise error
    return f"{name} cannot be read: {error.strerror}"


def _sync(path: Path, staging: Staging) -> None:
    """As :func:`fsync`; when the disk refuses, nothing that the stage wrote is trusted again.

    After a failed fsync the kernel calls the lost pages clean, and the next fsync succeeds (Rebello
    et al., Can Applications Recover from fsync Failures?, USENIX ATC 2020). So the scratch goes.
    """
    try:
        fsync(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            shutil.rmtree(staging.folder, ignore_errors=True)
        raise


def fsync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
