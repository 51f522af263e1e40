"""sha256 of files, remembered between runs so that a large checkpoint is read only once."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.keys import digest, file_sha256
from quantize.protocol import write_json

Stamp = list[int]
"""Size, mtime, ctime (ns) and inode of a file: another one for every change of its contents."""


class HashCache:
    """sha256 by (path, size, mtime, ctime, inode), as git's index keeps them.

    It saves hashing and decides nothing: keys are made of contents. A file that was written less
    than `settle_seconds` ago is not remembered, because a second write within the clock's
    resolution would look the same.
    """

    def __init__(
        self,
        path: Path,
        *,
        settle_seconds: float = 2.0,
        on_hashed: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path = path
        self.settle_seconds = settle_seconds
        self.on_hashed = on_hashed
        self.changed = False

    @functools.cached_property
    def entries(self) -> dict[str, list[Any]]:
        """What is remembered, read when it is first asked for: most commands hash nothing."""
        with suppress(OSError, ValueError):  # without a readable cache everything is hashed
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(entries, dict):
                return entries
        return {}

    def sha256(self, file: Path) -> str:
        """sha256 of a file, hashed only when the cache does not know it."""
        return self.sha256_all([file])[0]

    def tree(self, root: Path, names: list[str]) -> str:
        """As :func:`quantize.keys.tree_sha256`: one digest of names and contents."""
        return digest(
            dict(zip(names, self.sha256_all([root / name for name in names]), strict=True))
        )

    def unknown_bytes(self, files: Iterable[Path]) -> int:
        """Bytes that would have to be read to hash `files`."""
        unknown = 0
        for file in files:
            stamp = stamp_of(file)
            if self._known(file, stamp) is None:
                unknown += stamp[0]
        return unknown

    def save(self) -> None:
        """Write the cache, if it changed, without the files that are gone."""
        if not self.changed:
            return
        kept = {name: entry for name, entry in self.entries.items() if Path(name).exists()}
        with suppress(OSError):  # a read-only home costs hashing next time, nothing else
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, kept, durable=False)
            self.changed = False
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Temporary files of processes that were killed while they saved."""
        processes = Path("/proc")
        for path in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            if (processes / "self").exists() and not (processes / path.suffixes[-2][1:]).exists():
                path.unlink(missing_ok=True)

    def sha256_all(self, files: list[Path]) -> list[str]:
        """sha256 of each file; several are hashed at once, which a fast disk needs."""
        stamps = [stamp_of(file) for file in files]
        found = [self._known(file, stamp) for file, stamp in zip(files, stamps, strict=True)]
        missing = [index for index, sha in enumerate(found) if sha is None]
        total, done = sum(stamps[index][0] for index in missing), 0
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            jobs = {pool.submit(_read_sha256, files[index]): index for index in missing}
            try:
                for job in concurrent.futures.as_completed(jobs):
                    index = jobs[job]
                    found[index] = job.result()
                    self.remember(files[index], stamps[index], job.result())
                    done += stamps[index][0]
                    if self.on_hashed is not None:
                        self.on_hashed(done, total)
            except BaseException:  # also when interrupted: what waits is not read any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [sha for sha in found if sha is not None]

    def _known(self, file: Path, stamp: Stamp) -> str | None:
        entry = self.entries.get(str(file.absolute()))
        if isinstance(entry, list) and len(entry) == 5 and entry[:4] == stamp:
            return str(entry[4])
        return None

    def remember(self, file: Path, stamp: Stamp, sha: str) -> None:
        """Keep what a file's contents hash to, if it still is what it was at `stamp`."""
        newest_ns = max(stamp[1], stamp[2])
        settled = time.time_ns() - newest_ns > self.settle_seconds * 1e9
        if settled and stamp_of(file) == stamp:
            self.entries[str(file.absolute())] = [*stamp, sha]
            self.changed = True


def stamp_of(file: Path) -> Stamp:
    """A file's stamp; SourceError where there is none.

    A link's target counts: Hub caches are folders of links.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> SourceError:
    return SourceError(f"cannot read {file}: {error.strerror}", "check that it exists for you")
