"""SIGKILL at random moments: what the streaming engine repeats, and whether the bytes are the same.

Runs in the llmcompressor environment, from the repository's root:
`python -m tests.end_to_end.engine_kill ARCHITECTURE FOLDER KILLS OUTPUT.json [METHOD]`.

Half as many kills again go to runs that keep hidden states in memory, as on a GPU, and have them on
disk a few times in a run; they are held against the same undisturbed run.

The parent imports everything and never starts a thread; each run of the worker is a fork of it, so
that a run costs what it computes and no imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A forked child must not find its parent's threads missing.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "1")

from quantize.engine import boundaries
from quantize.protocol import Events, Request
from quantize.workers import stream
from tests.end_to_end import engine_models

SEED = 11
CALIBRATION = (32, 256)  # sequences, tokens
JOURNAL = Path("work", "stream", "journal.jsonl")


def main() -> None:
    architecture, folder = sys.argv[1], Path(sys.argv[2])
    kills, output = int(sys.argv[3]), Path(sys.argv[4])
    method = sys.argv[5] if len(sys.argv) > 5 else "awq+gptq"
    if not (folder / "model").exists():
        wait(prepare(architecture, folder))
    body = {
        "model": str(folder / "model"),
        "tokens": str(folder / "tokens.npz"),
        "method": method,
        "scheme": "W4A16_ASYM",
        "group_size": 128,
        "ignore": ["lm_head"],
        "overrides": [],
        "kv_cache": None,
        "dampening": 0.01,
        "activation_order": "static",
        "copy": ["tokenizer.json"],
    }
    wait(start(body, folder / "first"))  # reads the files into the page cache
    started = time.monotonic()
    clean = folder / "clean"
    wait(start(body, clean))
    seconds = time.monotonic() - started
    expected = contents(clean)
    random_moments = random.Random(SEED)

    def killed(times: int) -> list[dict[str, Any]]:
        moments = (seconds * random_moments.random() for _ in range(times))
        return [killed_once(body, folder / "killed", after, expected) for after in moments]

    layers = sum(entry["part"] != "outside" for entry in journal(clean)[1:])
    found = {"seconds": seconds, "layers": layers, "kills": killed(kills)}
    boundaries.fits = lambda *_: True
    boundaries.KEEP_SECONDS = seconds / 3
    found["held"] = killed(kills // 2)
    output.write_text(json.dumps(found))


def killed_once(
    body: dict[str, Any], place: Path, after: float, expected: dict[str, bytes]
) -> dict[str, Any]:
    """Start, kill after so many seconds, start again until the end; what came of it."""
    shutil.rmtree(place, ignore_errors=True)
    process = start(body, place)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    journalled = journal(place)
    begun = progress(place)
    shards = {
        entry["shard"]: (place / "work" / "stream" / entry["shard"]).stat()
        for entry in journalled[1:]
    }
    (place / "events.jsonl").unlink(missing_ok=True)
    wait(start(body, place))
    again = progress(place)
    finished = sum(entry["part"] != "outside" for entry in journalled[1:])
    # Layers that the first run began (or was about to) and the second run as well.
    repeated = {int(done) for done in begun} & {int(done) for done in again}
    return {
        "after": after,
        "killed": os.WIFSIGNALED(status),
        "journalled": finished,
        "started_at": min(again, default=None),
        "repeated": len(repeated),
        "rewritten": [
            name
            for name, stat in shards.items()
            if _identity(place / "work" / "stream" / name) != (stat.st_ino, stat.st_mtime_ns)
        ],
        "identical": contents(place) == expected,
    }


def prepare(architecture: str, folder: Path) -> int:
    """Build the model in a process of its own, for torch starts threads; its id."""

    def build() -> None:
        engine_models.build(architecture, folder / "model")
        engine_models.write_tokens(folder / "tokens.npz", *CALIBRATION)

    return forked(build)


def start(body: dict[str, Any], place: Path) -> int:
    """The worker in a forked process; its id."""
    for name in ("work", "files/model"):
        (place / name).mkdir(parents=True, exist_ok=True)
    request = body | {"output": str(place / "files" / "model")}
    events = place / "events.jsonl"
    job = Request("stream", request, str(place / "work"), str(events))
    return forked(lambda: stream.run(job, Events(events)))


def forked(function: Callable[[], object]) -> int:
    """A copy of this process that calls the function and ends; its id."""
    process = os.fork()
    if process:
        return process
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(process: int) -> None:
    """The run must succeed."""
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"the worker ended with status {status}")


def journal(place: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal: what it belongs to, then a finished part each."""
    path = place / JOURNAL
    text = path.read_text() if path.is_file() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in lines] or [{}]


def progress(place: Path) -> list[float]:
    """Layers done, a fraction counts, at each progress event."""
    path = place / "events.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    events = [json.loads(line) for line in lines]
    return [event["done"] for event in events if event["done"] < event["total"]]


def contents(place: Path) -> dict[str, bytes]:
    """Every file that the stage would keep, but no seconds: they are not in these files."""
    files = place / "files"
    return {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


if __name__ == "__main__":
    main()
