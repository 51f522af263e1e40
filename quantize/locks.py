"""Locks that die with their process."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock


def lock_on(path: Path) -> FileLock:
    """A lock by flock, which the kernel drops with the process that holds it, however it ends.

    A file system without flock is refused (ENOSYS, see :mod:`quantize.disk`): filelock would fall
    back to a file that stays when its maker is killed.
    """
    return FileLock(path, fallback_to_soft=False)
