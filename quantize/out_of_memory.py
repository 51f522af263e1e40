"""Whether a process ended for want of memory, said as far as it is known and no further."""

from __future__ import annotations

import re

from quantize import control_group
from quantize.control_group import Kills

SIGKILLED = (128 + 9, -9)
"""How a tool's end by SIGKILL looks from its supervisor, and when that is killed, too."""

GPU_WORDS = re.compile(r"CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation")
HOST_WORDS = re.compile(
    r"std::bad_alloc|^MemoryError\b|can't allocate memory|Cannot allocate memory"
    r"|numpy\S*\._ArrayMemoryError",
    re.MULTILINE,
)
"""The words of torch, of C++, Python, NumPy and the C library when an allocation fails."""

MORE = "use a machine with more memory, or fewer or shorter samples"


def explain_end(code: int, output: str, before: Kills, peak_bytes: int) -> str | None:
    """Why a process that ended with `code` ran out of memory, or None if nothing says so.

    `before` are the kernel's counts when it began. The machine's comes last: others raise it, too.
    """
    now = control_group.kills()
    held = f"; its processes held up to {peak_bytes / 1e9:.1f} GB" if peak_bytes else ""
    if GPU_WORDS.search(output):
        return f"out of GPU memory (its log says so){held}"
    if code != 0 and _grown(before.group, now.group):
        limit = control_group.limit_bytes()
        most = f" (limit {limit / 1e9:.1f} GB)" if limit is not None else ""
        who = f"the kernel's OOM killer counts a kill in this control group{most}"
        return f"out of memory: {who}{held}"
    if HOST_WORDS.search(output):
        return f"out of memory: an allocation failed (its log says so){held}"
    if code != 0 and _grown(before.machine, now.machine):
        return f"out of memory: the kernel's OOM killer was at work on this machine{held}"
    return None


def of_sigkill(before: Kills, peak_bytes: int) -> str:
    """What can be said of a SIGKILL whose cause the kernel's counters do not show."""
    held = f"; its processes held up to {peak_bytes / 1e9:.1f} GB" if peak_bytes else ""
    if before.group is None and before.machine is None:
        return f"perhaps for using too much memory{held}"
    return (
        "and the kernel counts no kill for memory: by somebody else (a scheduler, a daemon that "
        f"watches memory, a person){held}"
    )


def _grown(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now > before
