"""What this machine is, for records and messages."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import psutil

from quantize import control_group


def device_name(accelerator: str) -> str:
    """The GPU's name as the driver tells it, or the processor's with its core count."""
    if accelerator == "cuda":
        return _gpus()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def cpu_has(flag: str) -> bool:
    """Whether the processor says that it has an instruction set (`avx512f`); False if unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*: (.+)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found is not None and flag in found[1].split()


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's limit if lower."""
    total = psutil.virtual_memory().total
    limit = control_group.limit_bytes()
    return total if limit is None else min(total, limit)


def gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each visible GPU; empty without nvidia-smi (some containers)."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):  # CUDA shows none
        return []
    if visible is not None:
        query.append(f"--id={visible}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            found.append((name.strip(), int(mebibytes) << 20))
    return found


def _gpus() -> str:
    """The visible GPUs' count and name; without nvidia-smi just `CUDA GPU`."""
    found = gpus()
    if not found:
        return "CUDA GPU"
    name, size = found[0]
    return f"{len(found)} × {name}, {size >> 20} MiB"
