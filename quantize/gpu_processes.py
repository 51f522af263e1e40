"""Which processes hold memory of a GPU, and which of them a killed run left behind.

Asks `nvidia-smi --query-compute-apps=pid,used_memory,process_name --format=csv,noheader,nounits`
(MiB; `[N/A]` where the driver does not tell). In a container it may name processes of the host, or
none; what is not in our process table is nobody that we could name.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

QUERY = ("--query-compute-apps=pid,used_memory,process_name", "--format=csv,noheader,nounits")
TIMEOUT_SECONDS = 20.0
"""A GPU that has fallen off the bus makes nvidia-smi wait without end."""
SUPERVISOR = "supervise.py"


@dataclass(frozen=True)
class GpuProcess:
    """A process with memory on a GPU; `used_bytes` is None where the driver does not tell."""

    pid: int
    used_bytes: int | None
    name: str


def gpu_processes() -> list[GpuProcess]:
    """One entry a process and GPU; none where there is no nvidia-smi, or it fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *QUERY],
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [found for line in done.stdout.splitlines() if (found := _parse(line)) is not None]


def used_bytes(processes: Iterable[GpuProcess], pids: Iterable[int]) -> int:
    """GPU memory that these processes hold together, as far as the driver tells."""
    ours = set(pids)
    return sum(p.used_bytes or 0 for p in processes if p.pid in ours)


def leftovers(processes: Iterable[GpuProcess], environments: Path) -> list[str]:
    """A sentence for each process of a run that is gone: of our environments, and nobody's child.

    A server renames itself, so the files that it has mapped tell whose it is.
    """
    return [
        f"GPU memory{_amount(found)} is held by what a killed run left behind: process {found.pid} "
        f"({found.name}); end it with: kill {found.pid}"
        for found in processes
        if _uses(found.pid, environments) and not _is_supervised(found.pid)
    ]


def _parse(line: str) -> GpuProcess | None:
    pid, _, rest = line.partition(",")
    used, _, name = rest.partition(",")
    if not pid.strip().isdigit():
        return None
    mebibytes = used.strip()
    used_bytes = int(mebibytes) * 2**20 if mebibytes.isdigit() else None
    return GpuProcess(int(pid), used_bytes, name.strip())


def _amount(found: GpuProcess) -> str:
    return f" ({found.used_bytes / 1e9:.1f} GB)" if found.used_bytes is not None else ""


def _uses(pid: int, folder: Path) -> bool:
    """Whether a process runs code of a folder."""
    with contextlib.suppress(OSError, psutil.Error):  # gone, or somebody else's
        text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
        return f"{folder}/" in text or f"{folder}/" in " ".join(psutil.Process(pid).cmdline())
    return False


def _is_supervised(pid: int) -> bool:
    """Whether a supervisor is above it: then it belongs to a run, or is being ended just now."""
    with contextlib.suppress(psutil.Error):
        return any(
            any(part.endswith(SUPERVISOR) for part in parent.cmdline())
            for parent in psutil.Process(pid).parents()
        )
    return True
