"""Runs workers and servers inside their environments, for the stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantize import errors
from quantize.environments import Environments
from quantize.errors import ResourceError, ToolError, TransientError
from quantize.process import Process
from quantize.progress import Progress
from quantize.protocol import Request, load_result, write_json

SIGKILLED = (128 + 9, -9)
"""How a tool's end by SIGKILL looks from its supervisor, and when that is killed, too."""
DYING_SECONDS = 5.0
"""A server that breaks off its answers is given this long to be gone, and its log complete."""


@dataclass
class Runner:
    """What a stage may start, and where the logs of one run lie."""

    environments: Environments
    logs: Path
    progress: Progress
    tool_seconds: dict[str, float] = field(default_factory=dict)  # spent waiting for tools

    def python(self, environment: str) -> Path:
        """The environment's interpreter, installing the environment on first use."""
        started = time.monotonic()
        path = self.environments.install(environment, self.progress, self.logs / "environments.log")
        self._spent(f"install:{environment}", started)
        return path

    def worker(
        self,
        environment: str,
        name: str,
        body: dict[str, Any],
        *,
        work: Path,
        label: str,
        env: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run `quantize.workers.<name>` and return its result's body.

        `work` survives a kill and is the worker's own; `label` names the log file. A failure that
        the worker foresaw is raised as the error it names, any other as :class:`ToolError`.
        """
        python = self.python(environment)
        request_file, result_file = work / f"{label}.request.json", work / f"{label}.result.json"
        events_file = work / f"{label}.events.jsonl"
        for stale in (result_file, events_file):
            stale.unlink(missing_ok=True)
        request = Request(name, body, str(work), str(events_file))
        write_json(request_file, asdict(request))
        command = [str(python), "-P", "-m", f"quantize.workers.{name}"]
        command += [str(request_file), str(result_file)]
        started = time.monotonic()
        with self.process(command, label, env=env) as process:
            tail = _Tail(events_file, self.progress)
            code = process.wait(tail.read)
        self._spent(label, started)
        if not result_file.exists():
            raise _without_result(label, code, process)
        result = load_result(result_file)
        if not result.ok:
            kind = errors.KINDS.get(result.kind, ToolError)
            hint = result.hint or f"the whole log is {process.log}"
            raise kind(f"{label}: {result.message}", hint)
        return result.body

    @contextmanager
    def process(
        self,
        command: list[str],
        label: str,
        *,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Process]:
        """Start a supervised process of an environment; ended when the block is left."""
        paths = {"PYTHONPATH": str(self.environments.package_path())}
        with Process(
            command, log=self.logs / f"{label}.log", env={**paths, **(env or {})}
        ) as process:
            yield process

    @contextmanager
    def tool(self, label: str) -> Iterator[None]:
        """Count the time inside as a tool's, unless a worker inside already counts it."""
        started, counted = time.monotonic(), sum(self.tool_seconds.values())
        try:
            yield
        finally:
            inside = sum(self.tool_seconds.values()) - counted
            self._spent(label, started + inside)

    def wait_until(
        self,
        process: Process,
        ready: Callable[[], bool],
        what: str,
        seconds: float,
        explain: Callable[[str], str | None],
    ) -> float:
        """Wait for `ready`, and return after how many seconds it was.

        The process's death, or `seconds` without it, is an error; `explain` knows remedies by log.
        """
        started = time.monotonic()
        while not ready():
            waited = time.monotonic() - started
            if (code := process.poll()) is not None:
                raise _ended(what, code, process, explain)
            if waited > seconds:
                raise ResourceError(
                    f"{what}: not ready after {seconds:.0f} s:\n{process.tail()}",
                    f"the whole log is {process.log}",
                )
            self.progress.step(f"{what}: starting", round(waited), 0, "s")
            time.sleep(0.2)
        self._spent(what, started)
        return time.monotonic() - started

    @contextmanager
    def blaming(
        self, process: Process, what: str, explain: Callable[[str], str | None]
    ) -> Iterator[None]:
        """A failure inside whose cause is that `process` dies is raised as what its log says."""
        try:
            yield
        except (TransientError, ToolError) as error:
            deadline = time.monotonic() + DYING_SECONDS
            while time.monotonic() < deadline:
                if (code := process.poll()) is not None:
                    end = _ended(what, code, process, explain)
                    raise type(end)(f"{error.message}\n{end.message}", end.hint) from error
                time.sleep(0.1)
            raise

    def _spent(self, what: str, started: float) -> None:
        seconds = time.monotonic() - started
        self.tool_seconds[what] = self.tool_seconds.get(what, 0.0) + seconds


class _Tail:
    """Reads the complete new lines of an events file and hands them to the progress."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress, self._offset = path, progress, 0

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            block = file.read()
        complete = block[: block.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            self._progress.event(json.loads(line))


def _ended(
    what: str, code: int, process: Process, explain: Callable[[str], str | None]
) -> errors.QuantizeError:
    """The error for a server that ended, with the remedy where `explain` knows one."""
    error = _without_result(what, code, process)
    remedy = explain(process.output())
    return ResourceError(error.message, f"{remedy}; {error.hint}") if remedy else error


def _without_result(what: str, code: int, process: Process) -> errors.QuantizeError:
    """The error for a process that ended without saying why."""
    where = f"the whole log is {process.log}"
    if code in SIGKILLED:
        return ResourceError(
            f"{what} was killed (SIGKILL), most likely for using too much memory",
            f"use a machine with more memory, or fewer or shorter samples; {where}",
        )
    return ToolError(f"{what} ended with exit code {code}:\n{process.tail()}", where)
