"""Flat memory: freed layers go back to the system instead of fragmenting glibc's heap."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Any

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 1 << 20


def peaks() -> dict[str, int]:
    """`peak_memory_bytes`, the highest resident size, and on a GPU `peak_device_bytes`.

    The latter is what torch had allocated there at most, without what the driver takes.
    """
    import torch  # not before the thresholds are set

    found = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def return_freed_memory() -> None:
    """Serve every allocation of 1 MiB and more by mmap, so that freeing it unmaps it.

    glibc raises both thresholds by itself when a large block is freed (mallopt(3), "dynamic mmap
    threshold"); layers then come from the heap, whose top rarely becomes free, and the resident
    size creeps up by some MiB a layer. Setting a threshold turns that off. Call it before the
    first large allocation. Does nothing where the C library is not glibc.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, THRESHOLD_BYTES)


def trim() -> None:
    """Give back what is free inside the heap, too: smaller blocks leave holes between others.

    Without it the resident size still crept up by some 0.6 MiB a layer of width 512. Once a layer
    is nothing; mapping the smaller blocks one by one instead cost a fifth of all time.
    """
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _libc(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
