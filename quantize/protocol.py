"""What crosses an environment: one JSON request file in, one JSON result file out.

Standard library only: this module is imported inside every environment. A worker is started as

    <env>/bin/python -P -m quantize.workers.<name> request.json result.json

It reads a :class:`Request`, appends :class:`Event` lines to ``request.events`` while it works, and
writes a :class:`Result` (complete or absent: temporary file, fsync, rename). Standard output is for
people; nothing parses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantize.disk import fault

VERSION = 1
MANY_EVENTS = 10_000

RESERVE_BYTES = 16 << 10
"""Kept free for a result that says that the disk is full."""


@dataclass(frozen=True)
class Request:
    """One job for a worker.

    `body` is the worker's own part: JSON values only, documented in the worker's module.
    `work` is a folder that survives a kill and belongs to this job's key alone.
    """

    worker: str
    body: dict[str, Any]
    work: str
    events: str
    version: int = VERSION


@dataclass(frozen=True)
class Result:
    """What a worker did: `body` when `ok`, otherwise an error of :mod:`quantize.errors` by name."""

    ok: bool
    body: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    message: str = ""
    hint: str = ""
    version: int = VERSION


class WorkerError(Exception):
    """A foreseen failure inside a worker; `kind` names a class of :mod:`quantize.errors`."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.hint = kind, message, hint


def write_atomic(
    path: str | Path, text: str, errors: str = "strict", *, durable: bool = True
) -> None:
    """Write `text` to `path` so that a kill at any moment leaves the old file or the new one.

    A loss of power may leave neither of a file that need not be `durable`. It is not waited for:
    a sync takes what others write to the disk with it, which may be minutes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # on a full disk every file counts
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: object, *, durable: bool = True) -> None:
    """:func:`write_atomic` for a JSON value; NaN and infinities are refused.

    Half a character (a lone surrogate), which no UTF-8 can hold, becomes JSON's escape of it.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text, errors="backslashreplace", durable=durable)


class Events:
    """Appends progress events, one JSON object a line, for :mod:`quantize.progress` to show."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._emitted = 0
        self._last = 0.0

    def emit(self, kind: str, **values: Any) -> None:
        """Append one event; a short write of a line is atomic under O_APPEND on a local disk."""
        if self._is_too_much():
            return
        line = json.dumps({"time": time.time(), "kind": kind, **values}, ensure_ascii=False) + "\n"
        with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)

    def _is_too_much(self) -> bool:
        """After many events one a second is kept, so that the file stays small for days."""
        self._emitted += 1
        now = time.monotonic()
        if self._emitted > MANY_EVENTS and now - self._last < 1.0:
            return True
        self._last = now
        return False

    def progress(self, what: str, done: float, total: float, unit: str = "") -> None:
        """`done` of `total` `unit`s of `what` are finished."""
        self.emit("progress", what=what, done=done, total=total, unit=unit)

    def note(self, text: str) -> None:
        """A sentence for the log, worth a person's attention."""
        self.emit("note", text=text)


def load_request(path: str | Path) -> Request:
    """Read a request; a version or a key that this code does not know is an error."""
    value = json.loads(Path(path).read_text(encoding="utf-8"))
    if value.get("version") != VERSION:
        raise WorkerError("ToolError", f"request version {value.get('version')}, need {VERSION}")
    return Request(**value)


def load_result(path: str | Path) -> Result:
    """Read a result written by :func:`worker_main`."""
    return Result(**json.loads(Path(path).read_text(encoding="utf-8")))


def _failed(error: Exception) -> Result:
    """The disk's refusals and exhausted memory, torch's too, are the machine's; no others are."""
    if (refused := fault(error)) is not None:
        return Result(ok=False, kind=refused.kind, message=refused.message, hint=refused.hint)
    message = f"{type(error).__name__}: {error}"
    if _is_out_of_memory(error):
        return Result(ok=False, kind="ResourceError", message=f"out of memory: {message}")
    return Result(ok=False, kind="ToolError", message=message)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, NumPy's (a MemoryError), torch's on a GPU, and torch's on a CPU by its words."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def reserve(result_path: str | Path) -> Path:
    """The file of `RESERVE_BYTES` beside a result, which whoever starts a worker writes before."""
    return Path(f"{result_path}.reserve")


def _written(result: Result, path: str) -> Result:
    """Write a result; on a full disk in the place of the reserve, one that says so."""
    try:
        write_json(path, asdict(result))
    except OSError as error:
        reserve(path).unlink(missing_ok=True)
        result = _failed(error) if result.ok else result
        write_json(path, asdict(result))
    return result


def worker_main(run: Callable[[Request, Events], dict[str, Any]]) -> None:
    """The whole life of a worker process: read, run, write; exit 0 only when it worked."""
    request_path, result_path = sys.argv[1:3]
    try:
        request = load_request(request_path)
        body = run(request, Events(request.events))
        result = Result(ok=True, body=body)
    except WorkerError as error:
        result = Result(ok=False, kind=error.kind, message=error.message, hint=error.hint)
    except Exception as error:  # the log file has the traceback; the result has one line
        traceback.print_exc()
        result = _failed(error)
    result = _written(result, result_path)
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries leave threads and atexit hooks behind that can hang; the result is on disk.
    os._exit(0 if result.ok else 1)
