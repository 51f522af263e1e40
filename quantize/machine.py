"""What this machine is, for records and messages."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path


def device_name(accelerator: str) -> str:
    """The GPU's name as the driver tells it, or the processor's with its core count."""
    if accelerator == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        names = [line.strip() for line in lines if line.strip()]
        return f"{len(names)} × {names[0]}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
