"""Pushes: one child process for each job, forked from this warm one, so that a job costs no start.

Reads jobs as JSON lines on standard input; answers ``{"pid": ...}`` when the child has begun and
``{"status": ...}`` (exit code, or minus the signal) when it has ended. What the push said is in
the job's `result` file, what was printed or logged in its `output` file.

Runs in either major's environment: imports nothing of the tests, and of the pipeline only the push.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError
from quantize.hub import client, files, push
from quantize.hub.client import Access
from quantize.store import FileEntry

LONGEST_SLEEP_SECONDS = 0.01


def main() -> None:
    _warm_up()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(job)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def _warm_up() -> None:
    """Import what a push needs; no session is opened, because sockets must not be forked."""
    import huggingface_hub
    import huggingface_hub.errors
    import huggingface_hub.file_download
    import huggingface_hub.hf_api
    import huggingface_hub.utils.tqdm  # noqa: F401

    client.client(Access("http://127.0.0.1:1", "none"))


def _child(job: dict[str, Any]) -> None:
    """Never returns. The exit code is that of the pipeline for the same outcome."""
    code = 1
    try:
        output = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        waits = _shorten_sleeps()
        result = _push(job)
        Path(job["result"]).write_text(json.dumps({**result, "waits": waits}))
        code = result["code"]
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _shorten_sleeps() -> list[float]:
    """Waits before a retry take no time; their wanted lengths in seconds are collected."""
    waits: list[float] = []
    sleep = time.sleep

    def short(seconds: float) -> None:
        waits.append(seconds)
        sleep(min(seconds, LONGEST_SLEEP_SECONDS))

    time.sleep = short
    return waits


def _push(job: dict[str, Any]) -> dict[str, Any]:
    for name, value in job["settings"].items():  # "module.NAME": sizes and times of small models
        module = {"client": client, "files": files}[name.partition(".")[0]]
        assert hasattr(module, name.partition(".")[2]), name
        setattr(module, name.partition(".")[2], value)
    access = Access(job["endpoint"], os.environ["HF_TOKEN"])
    entries, paths = _listed(Path(job["folder"]))
    target = push.Target(**job["target"])
    try:
        pushed = push.push(access, target, entries, paths, job["message"])
    except QuantizeError as error:
        kind = type(error).__name__
        return {"code": error.exit_code, "error": kind, "text": f"{error.message}\n{error.hint}"}
    return {"code": 0, "changed": pushed.changed, "commit": pushed.commit, "text": repr(pushed)}


def _listed(folder: Path) -> tuple[list[FileEntry], dict[str, Path]]:
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    entries = [
        FileEntry(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for name, path in paths.items()
    ]
    return entries, paths


if __name__ == "__main__":
    main()
