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


def signal_all(number: signal.Signals) -> bool:
    """Send a signal to every descendant; False when there is none left."""
    pids = descendants(os.getpid())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return bool(pids)


def end_all(grace_seconds: float) -> None:
    """SIGTERM, wait, SIGKILL, until no descendant is left."""
    if not signal_all(signal.SIGTERM):
        return
    deadline = time.monotonic() + grace_seconds
    while descendants(os.getpid()):
        reap()
        if time.monotonic() > deadline:
            signal_all(signal.SIGKILL)
        time.sleep(0.05)


def reap() -> dict[int, int]:
    """Collect children that have ended, adopted ones too: pid → wait status."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


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
    status = None
    while status is None and not stop:
        status = reap().get(child.pid)
        time.sleep(0.02)
    end_all(grace_seconds)
    if status is None:
        sys.exit(128 + stop[0])
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
