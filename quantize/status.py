"""`status.json`: where a run is, for schedulers; rewritten every few seconds while it lives.

A thread writes it by the clock, so an old `time` means that the process is gone, or its machine.
Whether the work goes on is another question: `progressed` says when something was last reported,
and the deadlines of :mod:`quantize.liveness` end what hangs. docs/unattended.md has every key.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from quantize import control_group, stop
from quantize.disk import FULL
from quantize.errors import Interrupted, Said, UsageError
from quantize.gpu_processes import gpu_processes, used_bytes
from quantize.protocol import write_json

VERSION = 1
STATUS_SECONDS = 2.0
SAMPLE_SHARE = 0.02
"""Memory is measured so seldom that it takes at most this share of a processor's time."""
GPU_SECONDS = 10.0


@dataclass
class Memory:
    """What this process and all below it hold, and the most they held when it was looked at."""

    gpu: bool
    _peak: dict[str, int] = field(default_factory=dict)
    _next: float = 0.0
    _next_gpu: float = 0.0

    def sample(self) -> None:
        """Measure what is due."""
        now = time.monotonic()
        if now < self._next:
            return
        pids = [os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))]
        self._note("processes_peak_bytes", sum(map(resident_bytes, pids)))
        took = time.monotonic() - now
        self._next = time.monotonic() + took / SAMPLE_SHARE
        if self.gpu and now >= self._next_gpu:
            self._next_gpu = now + GPU_SECONDS
            self._note("gpu_peak_bytes", used_bytes(gpu_processes(), pids))

    def json(self) -> dict[str, int]:
        """What is known: peaks of the processes, of their GPU memory, of the control group."""
        found = dict(self._peak)
        for name, value in (
            ("group_peak_bytes", control_group.peak_bytes()),
            ("group_limit_bytes", control_group.limit_bytes()),
        ):
            if value is not None:
                found[name] = value
        return found

    def _note(self, name: str, value: int) -> None:
        self._peak[name] = max(value, self._peak.get(name, 0))


def resident_bytes(pid: int) -> int:
    """A process's share of memory (PSS: pages in common are divided), or all its pages (RSS)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


class Status:
    """What is known of a run, and the files that say it. Any thread may tell."""

    def __init__(
        self,
        files: Sequence[Path],
        facts: dict[str, Any],
        *,
        price_per_hour: float | None = None,
        gpu: bool = False,
        also: Callable[[dict[str, Any]], None] = lambda _status: None,
    ) -> None:
        """`facts` are told as they are; `also` is called with everything that is written."""
        self.memory = Memory(gpu)
        self._files, self._also, self._price = tuple(files), also, price_per_hour
        self._started, self._began = time.time(), time.monotonic()
        self._facts = {
            "version": VERSION,
            "state": "running",
            **facts,
            "pid": os.getpid(),
            "host": platform.node(),
            "started": self._started,
        }
        self._stage: dict[str, Any] = {}
        self._step: dict[str, Any] = {}
        self._end: dict[str, Any] = {}
        self._progressed = self._started
        self._lock = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """Write the first status, which shows whether the files can be written, and go on.

        The first file lies with the run's other files: where that cannot be written they cannot,
        and it is an OSError. Of the others it is a UsageError, unless their disk is full.
        """
        try:
            self._write_first()
        except (OSError, UsageError) as error:
            self.end(error)  # what could be written does not say for ever that it is running
            raise
        for work in (self._beat, self._measure):
            threading.Thread(target=work, daemon=True).start()

    def _write_first(self) -> None:
        status = self.json()
        for path in self._files[:1]:
            _write_at(path, status)
        try:
            for path in self._files[1:]:
                _write_at(path, status)
            self._also(status)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise UsageError(
                f"cannot write the run's status: {error}", "name other --status and --metrics files"
            ) from error

    def stage(self, stage_id: str, position: str) -> None:
        """Another stage has begun."""
        self._step = {}
        self._stage = {"stage": stage_id, "position": position, "stage_started": time.time()}
        self._progressed = time.time()
        self.write()

    def step(self, step: dict[str, Any]) -> None:
        """Work goes on inside the stage; written with the next beat."""
        if step != self._step:
            self._progressed = time.time()
        self._step = step

    def end(self, error: BaseException | None, result: dict[str, Any] | None = None) -> None:
        """The last status; a run that was stopped or failed says in which stage and why."""
        self._over.set()
        end: dict[str, Any] = {"state": state_of(error), "exit_code": exit_code_of(error)}
        if error is not None:
            end["error"] = describe(error)
        with self._lock:
            self._end = end
            self._write(result or {})

    def json(self) -> dict[str, Any]:
        """Everything that is known now; what is not known is absent."""
        elapsed = time.monotonic() - self._began
        found = {**self._facts, "time": time.time(), "elapsed_seconds": round(elapsed, 1)}
        found["progressed"] = self._progressed
        found |= self._stage | self._step | {"memory": self.memory.json()}
        if tools := stop.children():
            found["supervisors"] = sorted(tools)
        if self._price is not None:
            found["cost"] = self.cost(elapsed)
        return found | self._end

    def cost(self, seconds: float) -> float:
        """Price of the machine an hour x hours, in the price's currency; needs a price."""
        assert self._price is not None
        return round(self._price * seconds / 3600, 4)

    def write(self) -> None:
        """Rewrite the files, unless the last word was said."""
        with self._lock:
            if not self._end:
                self._write({})

    def _write(self, result: dict[str, Any]) -> None:
        """A disk that is full now may not be so with the next beat."""
        status = self.json()
        for path in self._files:
            with contextlib.suppress(OSError):  # the last word is worth waiting for
                write_json(path, status, durable=bool(self._end))
        with contextlib.suppress(OSError):
            self._also({**status, "result": result})

    def _beat(self) -> None:
        """Nothing but this: a status that is late is that of a dead run."""
        while not self._over.wait(STATUS_SECONDS):
            with contextlib.suppress(OSError):
                self.write()

    def _measure(self) -> None:
        """Beside the beat, since a GPU's driver may keep nvidia-smi waiting."""
        while not self._over.is_set():
            with contextlib.suppress(psutil.Error, OSError):
                self.memory.sample()
            self._over.wait(STATUS_SECONDS)


def _write_at(path: Path, status: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, status, durable=False)


def describe(error: BaseException) -> dict[str, str]:
    """An error as `status.json` and `result.json` have it."""
    hint = error.hint if isinstance(error, Said) else ""
    return {"kind": type(error).__name__, "message": str(error), "hint": hint}


def state_of(error: BaseException | None) -> str:
    """`done`, `interrupted` or `failed`."""
    if error is None:
        return "done"
    return "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def exit_code_of(error: BaseException | None) -> int:
    """What the command line will exit with."""
    if error is None:
        return 0
    return error.exit_code if isinstance(error, Said) else 1
