"""Content-addressed artifacts: `<store>/<kind>/<key>/`, complete or absent.

A stage writes into `<store>/<kind>/.staging/<key>/files/` under a lock that dies with its process.
:meth:`Store.commit` hashes and syncs every file, writes `manifest.json` last, and renames the
folder into place; a reader never sees a folder without a manifest. `.staging/<key>/work/` is the
stage's scratch space: it survives a kill, and since it is keyed like the result, a later run of the
same stage may continue from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantize import stop
from quantize.errors import ResourceError, ToolError
from quantize.keys import file_sha256
from quantize.protocol import write_json

MANIFEST = "manifest.json"
KEEP_RUNS = 20
"""Run folders that a garbage collection leaves."""
VERIFY_ON_READ_BYTES = 1 << 30
"""Artifacts up to this size are hashed whole at every hit; larger ones by size, and hashed by
`store verify` and before they are published."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact, its name relative to the artifact with forward slashes."""

    name: str
    bytes: int
    sha256: str


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
        """What differs from the manifest: missing, resized, changed or added files."""
        found = []
        for entry in self.manifest.files:
            path = self.path / entry.name
            if not path.is_file():
                found.append(f"{entry.name} is missing")
            elif path.stat().st_size != entry.bytes:
                found.append(f"{entry.name} has {path.stat().st_size} bytes, not {entry.bytes}")
            elif hash_files and file_sha256(path) != entry.sha256:
                found.append(f"{entry.name} has other content (sha256 differs)")
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

    def __init__(self, root: Path) -> None:
        self.root = root

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
        except (ValueError, KeyError, TypeError):  # a damaged manifest is no manifest
            return None
        # Nor is one that belongs elsewhere: somebody copied or renamed the folder.
        return Artifact(path, manifest) if (manifest.kind, manifest.key) == (kind, key) else None

    def damage(self, artifact: Artifact) -> list[str]:
        """Check a hit before it is used: sizes always, contents of small artifacts."""
        small = artifact.manifest.total_bytes <= VERIFY_ON_READ_BYTES
        return artifact.damage(hash_files=small)

    def set_aside(self, kind: str, key: str) -> Path:
        """Move an artifact that cannot be used out of the way, for the user to look at."""
        target = self.root / ".damaged" / kind / f"{key}-{time.time_ns()}"
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
            lock = FileLock(folder.with_name(f"{folder.name}.lock"))
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                yield folder

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
        lock = FileLock(folder.with_name(f"{key}.lock"))
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
            shutil.rmtree(staging.files, ignore_errors=True)
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
        entries = []
        for name in _relative_files(staging.files):
            path = staging.files / name
            if path.is_symlink() or not path.is_file() or name == MANIFEST:
                raise ToolError(
                    f"{staging.kind} wrote {name}, which cannot be part of an artifact",
                    "this is a bug of the stage: it must write regular files of its own",
                )
            fsync(path)
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
            fsync(Path(folder))
        final = self.path(staging.kind, staging.key)
        with stop.held():  # complete or absent, and the earlier one not away without need
            if final.exists():  # damaged or stale, or it would have been found: we hold the lock
                self.set_aside(staging.kind, staging.key)
            os.rename(staging.files, final)
            fsync(final.parent)
        shutil.rmtree(staging.folder, ignore_errors=True)
        return Artifact(final, manifest)


def _relative_files(root: Path) -> list[str]:
    """Names of all files below `root`, sorted, with forward slashes; symlinks are not followed."""
    names = []
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files + links]
    return sorted(names)


def fsync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
