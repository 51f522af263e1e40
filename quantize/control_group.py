"""What the kernel says about memory: limits, peaks, and whom it killed for it.

Control groups of version 2 (`memory.max`, `memory.peak`, `memory.events`) and 1
(`memory.limit_in_bytes`, `memory.max_usage_in_bytes`, `memory.oom_control`), see the kernel's
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; `/proc/vmstat` for the machine.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class Kills:
    """Processes that the kernel has killed for memory so far; None where it does not say."""

    group: int | None  # in our control group
    machine: int | None


def kills(group: Path | None = None) -> Kills:
    """The counters as they stand; only their growth means something."""
    folder = group or own_group()
    counters = [folder / "memory.events", folder / "memory.oom_control"] if folder else []
    found = [_counter(path, "oom_kill") for path in counters]
    known = [value for value in found if value is not None]
    return Kills(known[0] if known else None, _counter(Path("/proc/vmstat"), "oom_kill"))


def limit_bytes(group: Path | None = None) -> int | None:
    """The lowest memory limit of the control group and of those around it; None without one.

    A scheduler limits the job; the process is in a group below it, which has none of its own.
    """
    folder = group or own_group()
    around = [folder, *folder.parents] if folder is not None else []
    found = [_number(one, "memory.max", "memory.limit_in_bytes") for one in around]
    return min((one for one in found if one is not None and one < NO_LIMIT_BYTES), default=None)


def peak_bytes(group: Path | None = None) -> int | None:
    """The most memory that the control group has used since it exists, page cache included."""
    return _number(group, "memory.peak", "memory.max_usage_in_bytes")


def own_group() -> Path | None:
    """The folder of this process's memory control group, or None without one.

    In a container the path in /proc may be the host's, and the mount begins at our own group.
    """
    memberships = Path("/proc/self/cgroup")
    lines = memberships.read_text().splitlines() if memberships.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount = {"": ROOT, "memory": ROOT / "memory"}.get(controllers)
        if mount is None:
            continue
        for folder in (mount / path.lstrip("/"), mount):
            if (folder / "memory.events").is_file() or (folder / "memory.oom_control").is_file():
                return folder
    return None


def _number(group: Path | None, *names: str) -> int | None:
    folder = group or own_group()
    if folder is None:
        return None
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # absent, or the word "max"
            return int((folder / name).read_text())
    return None


def _counter(path: Path, name: str) -> int | None:
    """The number on the line that begins with this name."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None
