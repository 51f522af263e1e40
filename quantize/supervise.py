"""Stands between the pipeline and one child, so that nothing survives either of them.

Started as ``python -I -S supervise.py PARENT_PID GRACE_SECONDS COMMAND...``; standard library only
and no imports from this package, so that a start costs milliseconds.

- It leads a session of its own: a Ctrl-C at the terminal reaches the pipeline, not the child.
- When the pipeline dies, even by SIGKILL, the kernel sends SIGTERM here (PR_SET_PDEATHSIG).
- It is a child subreaper, so descendants that were detached (a server's engine process) stay below
  it and are found.
- On SIGTERM every descendant gets SIGTERM; those left after the grace period get SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process on Linux; elsewhere orphans stay possible."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """All live processes below `pid`, children before grandchildren."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # the name in parentheses may hold spaces: fields are counted from its end
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(0), [])
        found += children
        queue += children
    return found


def end_all(grace_seconds: float) -> None:
    """SIGTERM to all descendants, newcomers too; SIGKILL after the grace period; to the last.

    The process table changes while it is read, so an empty reading proves nothing. That the kernel
    knows no child of ours does: whoever loses its parent becomes our child (subreaper).
    """
    deadline = time.monotonic() + grace_seconds
    asked: set[int] = set()
    while reap({}):
        late = time.monotonic() > deadline
        for pid in descendants(os.getpid()):
            if late or pid not in asked:
                asked.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.02)


def reap(ended: dict[int, int]) -> bool:
    """Collect children that have ended, adopted ones too, as pid → wait status; is any left?"""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        ended[pid] = status


def main() -> None:
    """Run the command; exit with its status, 128 + signal, or as a shell when it does not start."""
    parent, grace_seconds, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if os.getpid() != os.getsid(0):
        os.setsid()
    stop: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before the prctl
        sys.exit(1)
    try:
        child = subprocess.Popen(
            command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
    ended: dict[int, int] = {}
    while child.pid not in ended and not stop:
        reap(ended)
        time.sleep(0.02)
    end_all(grace_seconds)
    if child.pid not in ended:
        sys.exit(128 + stop[0])
    code = os.waitstatus_to_exitcode(ended[child.pid])
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
