"""Which runs are under way on a store, so that a garbage collection takes nothing from them.

A run holds a lock on a file of its own in `<store>/.locks/runs/`; the file says which artifacts the
run will read and where its logs are. The kernel drops the lock with the process, so a file whose
lock is free is a dead run's. A run announces itself, and a collection looks and removes, under one
more lock: a run that begins during a collection waits, and then sees what is left.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from quantize.locks import lock_on
from quantize.protocol import write_json


@dataclass(frozen=True)
class InUse:
    """What runs under way need: artifacts as (kind, key), and their own folders."""

    artifacts: frozenset[tuple[str, str]]
    folders: frozenset[Path]


@contextlib.contextmanager
def announced(
    root: Path,
    artifacts: Iterable[tuple[str, str]],
    folder: Path,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keep these artifacts and the run's folder from being collected until the block is left."""
    path = _folder(root) / f"{secrets.token_hex(8)}.json"
    lock = lock_on(path.with_suffix(".lock"))
    with _gate(root, on_wait):
        used = {"artifacts": [list(pair) for pair in artifacts], "folder": str(folder)}
        write_json(path, used, durable=False)
        lock.acquire()
    try:
        yield
    finally:
        _forget(path, lock)


@contextlib.contextmanager
def collecting(root: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[InUse]:
    """What is in use; no run begins until the block is left."""
    with _gate(root, on_wait):
        yield _in_use(root)


def _in_use(root: Path) -> InUse:
    artifacts: set[tuple[str, str]] = set()
    folders: set[Path] = set()
    for path in sorted(_folder(root).glob("*.json")):
        lock = lock_on(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:  # it lives, or ends this moment
            with contextlib.suppress(FileNotFoundError):
                value = json.loads(path.read_text(encoding="utf-8"))
                artifacts |= {(kind, key) for kind, key in value["artifacts"]}
                folders.add(Path(value["folder"]))
        else:
            _forget(path, lock)
    return InUse(frozenset(artifacts), frozenset(folders))


def _forget(path: Path, lock: FileLock) -> None:
    """Remove both files while the lock is held: nobody else has these names."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@contextlib.contextmanager
def _gate(root: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    _folder(root).mkdir(parents=True, exist_ok=True)
    lock = lock_on(root / ".locks" / "collection.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _folder(root: Path) -> Path:
    return root / ".locks" / "runs"
