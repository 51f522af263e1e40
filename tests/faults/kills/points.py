"""Which calls a stage makes, and a seeded draw of the calls to kill at."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "write",
    "pwrite64",
    "writev",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "link",
    "linkat",
    "symlink",
    "ftruncate",
    "truncate",
    "fallocate",
    "sendfile",
    "copy_file_range",
    "flock",
)
"""Calls that change the disk or a lock. Opening and closing files change nothing by themselves: a
process that dies there dies between two of these."""

LINE = re.compile(r"^(\d+)\s+(\w+)\(")
KILLED = re.compile(r"^(\d+)\s+\+\+\+ killed by SIGKILL", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """The `number`-th `call` that any thread makes ends that thread's process."""

    stage: str
    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.stage}:{self.call}:{self.number}"


def why_not() -> str:
    """Why this machine cannot inject faults into system calls; empty where it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    command = [strace, "-f", "-qq", "-e", "trace=none", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"strace does not work here: {tried.stderr.strip()}" if tried.returncode else ""


def tracer(output: Path, *inject: str) -> list[str]:
    """The start of a command line: strace over all children, with these injections.

    With `--seccomp-bpf` only the traced calls cost time, but strace 6.1 then drops the signals that
    it is to inject (errors and delays it injects).
    """
    fast = [] if inject else ["--seccomp-bpf"]
    command = ["strace", "-f", *fast, "-q", "-o", str(output)]
    command += ["-e", f"trace={','.join(CALLS)}", "-e", "signal=KILL", "-s", "0"]
    for fault in inject:
        command += ["-e", f"inject={fault}"]
    return command


def killing(point: Point, output: Path) -> list[str]:
    """strace's command line for a kill."""
    return tracer(output, f"{point.call}:signal=KILL:when={point.number}")


def was_killed(output: Path) -> bool:
    """Whether strace saw a process die by SIGKILL."""
    return bool(KILLED.search(output.read_text(encoding="utf-8", errors="replace")))


def count(output: Path) -> dict[str, int]:
    """For each call the most that one thread made; strace counts by thread, too."""
    made: Counter[tuple[str, str]] = Counter()
    with output.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := LINE.match(line):
                made[found[1], found[2]] += 1
    most: dict[str, int] = {}
    for (_, call), number in made.items():
        most[call] = max(number, most.get(call, 0))
    return most


def draw(stage: str, most: Mapping[str, int], kills: int, seed: int) -> list[Point]:
    """So many different points, the calls in turn, so that rare ones (rename) are not drowned."""
    source = random.Random(f"{seed}:{stage}")
    waiting = {
        call: source.sample(range(1, number + 1), min(number, kills))
        for call, number in sorted(most.items())
    }
    points: list[Point] = []
    while len(points) < kills and any(waiting.values()):
        for call, numbers in waiting.items():
            if numbers and len(points) < kills:
                points.append(Point(stage, call, numbers.pop()))
    source.shuffle(points)
    return points
