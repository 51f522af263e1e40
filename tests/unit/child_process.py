"""Real Python processes for tests of what happens between processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Poll; a generous limit, since a loaded machine is no failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be collected."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Helper:
    """A Python process that runs `code` and talks over its standard streams, line by line."""

    def __init__(self, code: str, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            start_new_session=True,  # a process group of its own, like a job at a terminal
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def read(self) -> str:
        """The next line it prints; an AssertionError when it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()} and said nothing"
        return line.strip()

    def say(self, line: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL to it alone, not to what it started."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """Wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout=30)


@contextmanager
def helper(code: str, *arguments: object, env: Mapping[str, str] | None = None) -> Iterator[Helper]:
    """A helper that is gone, with its process group, when the block is left."""
    started = Helper(code, *arguments, env=env)
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.process.wait()
        for stream in (started.process.stdin, started.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
