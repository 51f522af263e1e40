"""Stands between the pipeline and one child, so that nothing survives either of them.

Started as ``python -I -S supervise.py PARENT_PID GRACE_SECONDS LOG_BYTES COMMAND...``; standard
library only and no imports from this package, so that a start costs milliseconds.

- It leads a session of its own: a Ctrl-C at the terminal reaches the pipeline, not the child.
- When the pipeline dies, even by SIGKILL, the kernel sends SIGTERM here (PR_SET_PDEATHSIG).
- It is a child subreaper, so descendants that were detached (a server's engine process) stay below
  it and are found.
- On SIGTERM every descendant gets SIGTERM; those left after the grace period get SIGKILL, and all
  of them at once on SIGQUIT.
- What the child and its descendants print goes through here to the log (standard output, opened for
  reading, too): of more than LOG_BYTES the beginning and the newest lines are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_AT_ONCE = signal.SIGQUIT
BLOCK_BYTES = 1 << 16
DRAIN_SECONDS = 5.0


def prctl(option: int, value: int) -> bool:
    """Set an attribute of this process on Linux; elsewhere orphans stay possible."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)


def descendants(pid: int) -> list[int]:
    """All live processes below `pid`, children before grandchildren."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # the name in parentheses may hold spaces, or half a character (it is cut to 15
                # bytes): fields are counted from its end
                text = (entry / "stat").read_text(errors="replace")
                fields = text.rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(0), [])
        found += children
        queue += children
    return found


def end_all(grace_seconds: float, stop: list[int]) -> None:
    """SIGTERM to all descendants, newcomers too; SIGKILL after the grace period; to the last.

    `stop` gets the signals that come meanwhile: KILL_AT_ONCE ends the grace period.

    The process table changes while it is read, so an empty reading proves nothing. That the kernel
    knows no child of ours does: whoever loses its parent becomes our child (subreaper).
    """
    deadline = time.monotonic() + grace_seconds
    asked: set[int] = set()
    while reap({}):
        late = time.monotonic() > deadline or KILL_AT_ONCE in stop
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


class Log:
    """A file that is appended to and stays below a size: its middle is left out.

    It keeps the first quarter of `most` bytes, counted from where this process began to write, and
    then always between one and three quarters of the newest. Nobody else writes meanwhile.
    """

    def __init__(self, file: int, most: int) -> None:
        self._file, self._most, self._part = file, most, most // 4
        self._start = os.fstat(file).st_size
        self._left_out = self._mark = 0  # bytes of output, and of the line that says how many

    def write(self, block: bytes) -> None:
        """Append; a full disk costs these lines and not the process that printed them."""
        with contextlib.suppress(OSError):
            while block:
                block = block[os.write(self._file, block) :]
            end = os.fstat(self._file).st_size
            if end - self._start > self._most:
                self._shorten(end)

    def _shorten(self, end: int) -> None:
        newest = os.pread(self._file, self._part, end - self._part)
        newest = newest[newest.find(b"\n") + 1 :]
        head = self._start + self._part
        self._left_out += end - head - self._mark - len(newest)
        os.ftruncate(self._file, head)
        mark = f"\n[... {self._left_out} bytes of output are left out here ...]\n".encode()
        self._mark = len(mark)
        os.write(self._file, mark + newest)


def copy_output(source: int, log: Log) -> None:
    """Until the last process that could write has ended."""
    while block := os.read(source, BLOCK_BYTES):
        log.write(block)


def limit_core_dumps() -> None:
    """None of a model's size: a limit of one byte forbids them, also where a program gets them."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    most = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (most, hard))


def main() -> None:
    """Run the command; exit with its status, 128 + signal, or as a shell when it does not start."""
    parent, grace_seconds, log_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    command = sys.argv[4:]
    if os.getpid() != os.getsid(0):
        os.setsid()
    stop: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, KILL_AT_ONCE):
        signal.signal(number, on_signal)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before the prctl
        sys.exit(1)
    limit_core_dumps()
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            command,
            stdout=writing,
            stderr=writing,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
    os.close(writing)
    log = Log(sys.stdout.fileno(), log_bytes)
    output = threading.Thread(target=copy_output, args=(reading, log), daemon=True)
    output.start()
    ended: dict[int, int] = {}
    while child.pid not in ended and not stop:
        reap(ended)
        time.sleep(0.02)
    end_all(grace_seconds, stop)
    output.join(DRAIN_SECONDS)
    if child.pid not in ended:
        sys.exit(128 + stop[0])
    code = os.waitstatus_to_exitcode(ended[child.pid])
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
