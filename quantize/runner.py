"""Runs workers and servers inside their environments, for the stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantize import control_group, disk, errors, stop
from quantize.control_group import Kills
from quantize.environments import Environments
from quantize.errors import ResourceError, ToolError, TransientError
from quantize.liveness import DEFAULT_PATIENCE, Patience, Watch, end_hung
from quantize.out_of_memory import MORE, SIGKILLED, explain_end, of_sigkill
from quantize.process import Process
from quantize.progress import Progress
from quantize.protocol import RESERVE_BYTES, Request, load_result, reserve, write_json

EVENTS_BYTES = 1 << 20
LAST_CHARACTERS = 20_000
"""Of a log: what it said long before its end was not the reason."""
DYING_SECONDS = 5.0
"""A server that breaks off its answers is given this long to be gone, and its log complete."""


Explain = Callable[[str], tuple[str, str] | None]
"""Of a server's log the line that tells why it ended, and the remedy; None if it is not known."""


@dataclass
class Runner:
    """What a stage may start, and where the logs of one run lie."""

    environments: Environments
    logs: Path
    progress: Progress
    tool_seconds: dict[str, float] = field(default_factory=dict)  # spent waiting for tools
    patience: Patience = DEFAULT_PATIENCE

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
        server: Process | None = None,
    ) -> dict[str, Any]:
        """Run `quantize.workers.<name>` and return its result's body.

        `work` survives a kill and is the worker's own; `label` names the log file. A failure that
        the worker foresaw is raised as the error it names, any other as :class:`ToolError`. While
        `server` works the worker may wait for it.
        """
        python = self.python(environment)
        request_file, result_file = work / f"{label}.request.json", work / f"{label}.result.json"
        events_file = work / f"{label}.events.jsonl"
        for stale in (result_file, events_file):
            stale.unlink(missing_ok=True)
        request = Request(name, body, str(work), str(events_file))
        write_json(request_file, asdict(request))
        kept_free = reserve(result_file)
        kept_free.write_bytes(bytes(RESERVE_BYTES))
        command = [str(python), "-P", "-m", f"quantize.workers.{name}"]
        command += [str(request_file), str(result_file)]
        started = time.monotonic()
        kills = control_group.kills()
        with self.process(command, label, env=env) as process:
            tail = _Tail(events_file, self.progress)
            watch = Watch([process, *([server] if server else [])], self.patience)

            def tick() -> None:
                if tail.read():
                    watch.progressed()
                if (why := watch.look()) is not None:
                    if server is not None:  # which of them waits for the other is not known
                        end_hung(server, "the server", f"{label} got no further with it")
                    raise end_hung(process, label, f"{why}{tail.last}")

            code = process.wait(tick)
            while tail.read():
                continue
        self._spent(label, started)
        kept_free.unlink(missing_ok=True)
        if not result_file.exists():
            peak = watch.vitals.peak_bytes
            raise _without_result(label, code, process, kills, peak, process.tail())
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
        patience: Patience,
        explain: Explain,
    ) -> float:
        """Wait for `ready`, and return after how many seconds it was.

        The process's death is an error, and that it hangs: its progress is what it logs.
        """
        started, kills = time.monotonic(), control_group.kills()
        watch, logged = Watch([process], patience), 0
        while not ready():
            stop.check()
            if (code := process.poll()) is not None:
                raise _ended(what, code, process, explain, kills, watch.vitals.peak_bytes)
            if (now := process.log.stat().st_size) != logged:
                logged = now
                watch.progressed()
            if (why := watch.look()) is not None:
                tail = process.tail()
                hung = end_hung(process, f"{what}, while it started,", why)
                raise TransientError(f"{hung.message}:\n{tail}", hung.hint)
            self.progress.step(f"{what}: starting", round(time.monotonic() - started), 0, "s")
            time.sleep(0.2)
        self._spent(what, started)
        return time.monotonic() - started

    @contextmanager
    def blaming(self, process: Process, what: str, explain: Explain) -> Iterator[None]:
        """A failure inside whose cause is that `process` dies is raised as what its log says."""
        kills = control_group.kills()
        try:
            yield
        except (TransientError, ToolError) as error:
            deadline = time.monotonic() + DYING_SECONDS
            while time.monotonic() < deadline:
                code = process.poll()
                if code is not None or process.hung:
                    end = _ended(what, code or 0, process, explain, kills, 0)
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
        self.last = ""  # what the last event said, for a message

    def read(self) -> bool:
        """Whether there was something new; of a long backlog a part at a time."""
        if not self._path.exists():
            return False
        with self._path.open("rb") as file:
            file.seek(self._offset)
            block = file.read(EVENTS_BYTES)
        complete = block[: block.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            with suppress(ValueError):  # torn by a full disk, and the next one appended to it
                event = json.loads(line)
                self._progress.event(event)
                if event["kind"] == "progress":
                    self.last = f" (last: {event['what']} {event['done']:g}/{event['total']:g})"
        return bool(complete)


def _ended(
    what: str,
    code: int,
    process: Process,
    explain: Explain,
    kills: Kills,
    peak_bytes: int,
) -> errors.QuantizeError:
    """The error for a server that ended, with the remedy where `explain` knows one."""
    if process.hung:
        return TransientError(process.hung, f"run the same command again; {_where(process)}")
    found = explain(process.output())
    if found is None:
        return _without_result(what, code, process, kills, peak_bytes, process.tail())
    line, remedy = found
    error = _without_result(what, code, process, kills, peak_bytes, line)
    return ResourceError(error.message, f"{remedy}; {_where(process)}")


def _without_result(
    what: str, code: int, process: Process, kills: Kills, peak_bytes: int, last: str
) -> errors.QuantizeError:
    """The error for a process that ended without saying why; `last` is shown of its log."""
    where = _where(process)
    memory = explain_end(code, process.output()[-LAST_CHARACTERS:], kills, peak_bytes)
    tail = f":\n{last}" if last.strip() else ""
    if memory is not None:
        how = "was killed (SIGKILL)" if code in SIGKILLED else f"ended with exit code {code}"
        return ResourceError(f"{what} {how}, {memory}{tail}", f"{MORE}; {where}")
    if code in SIGKILLED:
        cause = of_sigkill(kills, peak_bytes)
        return ResourceError(f"{what} was killed (SIGKILL), {cause}", f"{MORE}; {where}")
    message = f"{what} ended with exit code {code}{tail or ':'}"
    if (number := disk.spoken(process.tail())) is not None:
        return ResourceError(message, f"{disk.HINTS[number]}; {where}")
    return ToolError(message, where)


def _where(process: Process) -> str:
    return f"the whole log is {process.log}"
