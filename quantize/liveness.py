"""Finds what hangs: by a deadline on progress, never on total time.

A tool makes progress when it reports something: an event, a line in its log, an answer. Between two
reports it shows life by processor time or by reading and writing. So there are two deadlines: a
short one for a tool that reports nothing and does nothing (a deadlock, a lost connection, a stopped
process), and a long one for a tool that reports nothing although it computes (an endless loop; but
also a very large layer on a slow machine, which must not be ended).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from quantize.errors import TransientError
from quantize.process import Process
from quantize.supervise import descendants

LOOK_SECONDS = 1.0
LONGEST_LOOK_SECONDS = 10.0
"""More between two looks was no time of the tool's: we were stopped, or the machine was frozen."""
IDLE_SHARE = 0.03
"""Of one processor: an idle vLLM 0.32 on a CPU was seen to use 1.5% (its worker polls)."""
IDLE_BYTES = 1 << 16
"""Read and written within the short deadline: less is a wake-up of a thread, and no work."""


@dataclass(frozen=True)
class Patience:
    """Seconds without progress after which a tool is taken for hung."""

    idle_seconds: float = 300.0  # and without processor time or input and output
    silent_seconds: float = 7200.0  # although it computes


DEFAULT_PATIENCE = Patience()


@dataclass
class Vitals:
    """What the processes below some supervisors have used; they come and go."""

    peak_bytes: int = 0  # resident, the most of all together at one look
    _seen: dict[int, tuple[float, int]] = field(default_factory=dict)

    def gained(self, pids: Sequence[int]) -> tuple[float, int]:
        """Processor seconds and bytes read and written since the last look."""
        seen: dict[int, tuple[float, int]] = {}
        seconds, count, resident = 0.0, 0, 0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                now = _used(process)
                resident += process.memory_info().rss
                before = self._seen.get(pid, (0.0, 0))
                seconds += max(now[0] - before[0], 0.0)
                count += max(now[1] - before[1], 0)
                seen[pid] = now
        self._seen = seen
        self.peak_bytes = max(self.peak_bytes, resident)
        return seconds, count


def _used(process: psutil.Process) -> tuple[float, int]:
    """Processor seconds; bytes through system calls, and through page faults and writeback."""
    times = process.cpu_times()
    count = 0
    with contextlib.suppress(psutil.Error, AttributeError):
        io = process.io_counters()
        count = io.read_chars + io.write_chars + io.read_bytes + io.write_bytes
    return times.user + times.system, count


class Watch:
    """When the processes of one tool last made progress, and last showed life."""

    def __init__(self, processes: Sequence[Process], patience: Patience) -> None:
        self.vitals = Vitals()
        self._processes, self._patience = tuple(processes), patience
        self._looked = time.monotonic()
        self._silent = self._idle = 0.0  # seconds watched without progress, and without life
        self._used = (0.0, 0)  # since it last showed life

    def progressed(self) -> None:
        """Something was reported."""
        self._silent = self._idle = 0.0

    def look(self) -> str | None:
        """Why it is taken for hung, or None; measures once a second."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < min(LOOK_SECONDS, self._patience.idle_seconds / 10):
            return None
        self._looked = now
        passed = min(passed, LONGEST_LOOK_SECONDS)
        self._silent += passed
        self._idle += passed
        pids = [pid for process in self._processes for pid in descendants(process.pid)]
        self._count(*self.vitals.gained(pids))
        if self._idle > self._patience.idle_seconds:
            return f"no progress for {self._silent:.0f} s, and {_state(pids)}"
        if self._silent > self._patience.silent_seconds:
            return (
                f"no progress for {self._silent:.0f} s, though it used the processor all the time"
            )
        return None

    def _count(self, seconds: float, count: int) -> None:
        self._used = (self._used[0] + seconds, self._used[1] + count)
        enough = self._patience.idle_seconds * IDLE_SHARE
        if self._used[0] >= enough or self._used[1] >= IDLE_BYTES:
            self._used, self._idle = (0.0, 0), 0.0


def _state(pids: Sequence[int]) -> str:
    """What idle processes do, as far as it can be seen."""
    states = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            states.add(psutil.Process(pid).status())
    if psutil.STATUS_STOPPED in states or psutil.STATUS_TRACING_STOP in states:
        return "a process of it is stopped (SIGSTOP, or a debugger)"
    if psutil.STATUS_DISK_SLEEP in states:
        return "a process of it waits for a disk or a network file system"
    return "neither processor time nor input and output since then"


def end_hung(process: Process, what: str, why: str) -> TransientError:
    """Let it write down where it hangs, kill it, and say so; the error is to be raised."""
    error = TransientError(
        f"{what} hung and was ended: {why}",
        "run the same command again, finished parts are kept; where its Python threads stood is "
        f"at the end of {process.log}",
    )
    process.kill(error.message)
    return error


def guard(
    process: Process, what: str, patience: Patience, progress: Callable[[], object]
) -> Callable[[], None]:
    """A tick for :meth:`Process.wait` that raises when `progress()` does not change any more."""
    watch, last = Watch([process], patience), progress()

    def tick() -> None:
        nonlocal last
        if (now := progress()) != last:
            last = now
            watch.progressed()
        if (why := watch.look()) is not None:
            raise end_hung(process, what, why)

    return tick
