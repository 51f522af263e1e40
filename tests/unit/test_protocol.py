"""Workers, run for real: one request file in, one result file out, and every way to fail.

The worker here is a program of the test's own that ends in the real :func:`worker_main`. It gets
there through a stand-in for an environment's interpreter, the one seam where a process starts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child_process import alive, wait_until

from quantize import runner as runner_module
from quantize.environments import Environments
from quantize.errors import (
    Interrupted,
    QuantizeError,
    ResourceError,
    SourceError,
    ToolError,
    TransientError,
)
from quantize.liveness import DEFAULT_PATIENCE, Patience
from quantize.progress import LineView, Progress
from quantize.protocol import (
    MANY_EVENTS,
    VERSION,
    Events,
    Request,
    WorkerError,
    load_request,
    load_result,
    write_atomic,
    write_json,
)
from quantize.runner import Runner

WORKER = '''
import errno, os, signal, sys, time
from quantize.protocol import WorkerError, worker_main

class OutOfMemoryError(RuntimeError):
    """Named like torch's."""

def run(request, events):
    body = request.body
    match body["do"]:
        case "answer":
            return {"worker": request.worker, "got": body["what"], "work": request.work,
                    "token": os.environ.get("HF_TOKEN"), "pid": os.getpid()}
        case "progress":
            for done in range(3):
                events.progress("layers", done, 3, "layers")
            events.note("two rows were dropped")
            return {}
        case "foreseen":
            raise WorkerError(body["kind"], "the rows are empty", body["hint"])
        case "unforeseen":
            {}["missing"]
        case "memory":
            raise MemoryError
        case "gpu memory":
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "cpu memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        case "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "full disk":
            replace = os.replace
            def refused(source, target):
                if os.path.exists(sys.argv[2] + ".reserve"):
                    raise OSError(errno.ENOSPC, "No space left on device", target)
                replace(source, target)
            os.replace = refused
            if body["error"]:
                raise OSError(errno.ENOSPC, "No space left on device", "weights")
            return {}
        case "exit":
            print("last words", flush=True)
            sys.exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "not json":
            return {"score": float("nan")}
        case "hang at exit":
            import atexit, threading
            atexit.register(time.sleep, 60)
            threading.Thread(target=time.sleep, args=(60,)).start()
            return {}

worker_main(run)
'''


class Lines(LineView):
    """Lines that stay and steps, as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        super().__init__(self.lines.append)

    def step(self, what: str, done: float, total: float, unit: str, eta_seconds: float) -> None:
        self.lines.append(f"{what} {done:g}/{total:g} {unit}")


class Bench:
    """A runner whose one environment, `tool`, runs the worker above."""

    def __init__(self, folder: Path) -> None:
        (folder / "worker.py").write_text(WORKER)
        python = folder / "bin" / "python"
        python.parent.mkdir()
        # python -P -m quantize.workers.NAME REQUEST RESULT
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -P {folder / "worker.py"} "$4" "$5"\n')
        python.chmod(0o755)
        self.view = Lines()
        self.work = folder / "work"
        self.work.mkdir()
        environments = Environments("cpu", folder / "cache", {"tool": python})
        self.runner = Runner(environments, folder / "logs", Progress(self.view))

    def run(self, do: str, env: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        return self.runner.worker(
            "tool", "toy", {"do": do, **body}, work=self.work, label="job", env=env
        )

    @property
    def log(self) -> str:
        return (self.runner.logs / "job.log").read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_request_goes_in_and_a_result_comes_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    what = {"unicode": "ü\u2028", "nested": [1, 2.5, None, {"a": True}]}
    result = bench.run("answer", what=what)
    pid = result.pop("pid")
    assert result == {"worker": "toy", "got": what, "work": str(bench.work), "token": None}
    assert not alive(pid)
    assert bench.run("answer", {"HF_TOKEN": "for it"}, what=1)["token"] == "for it"
    request = load_request(bench.work / "job.request.json")
    assert request == Request(
        "toy", {"do": "answer", "what": 1}, str(bench.work), str(bench.work / "job.events.jsonl")
    )


def test_progress_reaches_the_view(bench: Bench) -> None:
    bench.run("progress")
    expected = ["layers 0/3 layers", "layers 1/3 layers", "layers 2/3 layers"]
    assert bench.view.lines == [*expected, "      two rows were dropped"]
    bench.view.lines.clear()
    bench.run("progress")  # the first run's events are not shown again
    assert len(bench.view.lines) == 4


@pytest.mark.parametrize(
    ("do", "error", "message", "hint"),
    [
        ("unforeseen", ToolError, r"^job: KeyError: 'missing'$", "the whole log is"),
        ("memory", ResourceError, r"^job: out of memory: MemoryError: $", "the whole log is"),
        ("gpu memory", ResourceError, r"^job: out of memory: OutOfMemoryError: CUDA out", "log"),
        ("cpu memory", ResourceError, r"^job: out of memory: RuntimeError: .*can't alloc", "log"),
        ("disk", ResourceError, r"^job: the disk is full: .*No space left on device", "store gc"),
        ("exit", ToolError, r"^job ended with exit code 3:\nlast words$", "the whole log is"),
        ("killed", ResourceError, r"^job was killed \(SIGKILL\).*memory", "more memory"),
        ("crash", ToolError, r"^job ended with exit code 139:\n", "the whole log is"),
        ("not json", ToolError, r"(?s)^job ended with exit code 1:\n.*not JSON compliant", "log"),
    ],
)
def test_failures(
    do: str, error: type[QuantizeError], message: str, hint: str, bench: Bench
) -> None:
    with pytest.raises(QuantizeError, match=message) as caught:
        bench.run(do)
    assert type(caught.value) is error
    assert hint in caught.value.hint
    assert do == "disk" or str(bench.runner.logs / "job.log") in caught.value.hint


@pytest.mark.parametrize("error", [False, True])
def test_a_disk_without_room_for_the_result(error: bool, bench: Bench) -> None:
    """The place is kept beforehand: without it the message would be the log's end, a traceback."""
    with pytest.raises(ResourceError, match=r"^job: the disk is full: ") as caught:
        bench.run("full disk", error=error)
    assert "Traceback" not in caught.value.message
    assert ("weights" in caught.value.message) is error
    assert not list(bench.work.glob("*.reserve"))
    bench.run("progress")
    assert not list(bench.work.glob("*.reserve"))


def test_a_traceback_goes_to_the_log_and_not_to_the_message(bench: Bench) -> None:
    with pytest.raises(ToolError) as caught:
        bench.run("unforeseen")
    assert "Traceback" in bench.log
    assert "Traceback" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("SourceError", SourceError),
        ("ResourceError", ResourceError),
        ("TransientError", TransientError),
        ("Nonsense", ToolError),
    ],
)
def test_a_foreseen_failure_is_the_error_it_names(
    kind: str, error: type[QuantizeError], bench: Bench
) -> None:
    with pytest.raises(QuantizeError) as caught:
        bench.run("foreseen", kind=kind, hint="give it rows")
    assert type(caught.value) is error
    assert (caught.value.message, caught.value.hint) == ("job: the rows are empty", "give it rows")
    with pytest.raises(error) as caught:
        bench.run("foreseen", kind=kind, hint="")
    assert "the whole log is" in caught.value.hint


def test_an_earlier_result_is_not_taken_for_this_one(bench: Bench) -> None:
    bench.run("answer", what=1)
    with pytest.raises(ResourceError, match="was killed"):
        bench.run("killed")


def test_threads_and_exit_hooks_do_not_hold_a_worker(bench: Bench) -> None:
    started = time.monotonic()
    assert bench.run("hang at exit") == {}
    assert time.monotonic() - started < 50


def test_another_version_of_the_protocol_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    write_json(path, {"worker": "a", "body": {}, "work": "", "events": "", "version": VERSION + 1})
    with pytest.raises(WorkerError, match="version"):
        load_request(path)
    value = {"worker": "a", "body": {}, "work": "", "events": "", "version": VERSION, "more": 1}
    write_json(path, value)
    with pytest.raises(TypeError, match="more"):
        load_request(path)


# --- time, and processes that stay ---------------------------------------------------------------


def test_tools_time_is_counted_once(bench: Bench) -> None:
    started = time.monotonic()
    with bench.runner.tool("server"):
        bench.run("answer", what=1)
        time.sleep(0.05)
    with bench.runner.tool("server"):
        time.sleep(0.05)
    elapsed = time.monotonic() - started
    seconds = bench.runner.tool_seconds
    assert set(seconds) == {"install:tool", "job", "server"}
    assert seconds["server"] >= 0.1
    assert seconds["job"] > 0
    assert sum(seconds.values()) <= elapsed


def server(bench: Bench, script: str) -> Any:
    return bench.runner.process(["sh", "-c", script], "server")


def explain(log: str) -> tuple[str, str] | None:
    return ("too much", "lower it") if "too much" in log else None


def test_waiting_for_a_server(bench: Bench, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with server(bench, f"sleep 0.1; touch {ready}; sleep 60") as process:
        seconds = bench.runner.wait_until(
            process, ready.exists, "toy server", DEFAULT_PATIENCE, explain
        )
        assert process.poll() is None
    assert seconds > 0
    assert bench.runner.tool_seconds["toy server"] >= seconds - 0.01
    assert process.poll() is not None
    assert bench.view.lines[0] == "toy server: starting 0/0 s"


@pytest.mark.parametrize(
    ("script", "error", "message", "hint"),
    [
        ("echo no; exit 3", ToolError, "toy server ended with exit code 3:\nno", "the whole log"),
        ("echo too much; exit 3", ResourceError, "exit code 3:\ntoo much", "lower it; the whole"),
        ("echo a; echo too much; echo z; exit 3", ResourceError, r"3:\ntoo much\Z", "lower it"),
        ("kill -9 $$", ResourceError, "was killed", "memory"),
    ],
)
def test_a_server_that_ends_instead(
    script: str, error: type[QuantizeError], message: str, hint: str, bench: Bench
) -> None:
    with server(bench, script) as process, pytest.raises(QuantizeError, match=message) as caught:
        bench.runner.wait_until(process, lambda: False, "toy server", DEFAULT_PATIENCE, explain)
    assert type(caught.value) is error
    assert hint in caught.value.hint


def test_a_server_that_never_answers_is_given_up_and_ended(bench: Bench) -> None:
    with (
        pytest.raises(
            TransientError, match=r"toy server, while it started, hung .*:\nloading"
        ) as caught,
        server(bench, "echo loading; sleep 60") as process,
    ):
        wait_until(lambda: process.output() == "loading\n", "it to start")
        bench.runner.wait_until(
            process, lambda: False, "toy server", Patience(idle_seconds=0.5), explain
        )
    assert process.poll() is not None
    assert str(process.log) in caught.value.hint


@pytest.mark.parametrize("failure", [TransientError("broke off"), ToolError("answered 500")])
def test_a_failure_is_blamed_on_the_server_that_dies(failure: QuantizeError, bench: Bench) -> None:
    with (
        pytest.raises(ResourceError) as caught,
        server(bench, "sleep 0.1; echo too much; exit 3") as process,
        bench.runner.blaming(process, "toy server", explain),
    ):
        raise failure  # the connection breaks before the process is gone
    expected = f"{failure.message}\ntoy server ended with exit code 3:\ntoo much"
    assert caught.value.message == expected
    assert caught.value.hint.startswith("lower it; ")


def test_a_failure_is_its_own_when_the_server_lives(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "DYING_SECONDS", 0.1)
    failure = TransientError("broke off")
    with (
        pytest.raises(TransientError) as caught,
        server(bench, "sleep 60") as process,
        bench.runner.blaming(process, "toy server", explain),
    ):
        raise failure
    assert caught.value is failure


@pytest.mark.parametrize("failure", [Interrupted("stopped"), SourceError("refused"), ValueError()])
def test_other_failures_are_nobody_elses(failure: BaseException, bench: Bench) -> None:
    with (
        pytest.raises(type(failure)) as caught,
        server(bench, "exit 3") as process,
        bench.runner.blaming(process, "toy server", explain),
    ):
        process.wait()
        raise failure
    assert caught.value is failure


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied around every call that reaches the disk; each copy is a kill."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "result.json"
    write_json(path, {"old": 1})
    seen: list[dict[str, Any]] = []

    def copied(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            for moment in (0, 1):
                target = tmp_path / f"copy-{len(seen)}"
                shutil.copytree(folder, target)
                seen.append(json.loads((target / path.name).read_text()))
                if moment == 0:
                    result = call(*args)
            return result

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, copied(getattr(os, name)))
        write_json(path, {"new": "x" * 100_000})
    assert [list(value) for value in seen] == [["old"], ["old"], ["old"], ["new"]]
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": "ü"})
    for value in (float("nan"), {"a": float("inf")}):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, value)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "ü"}
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_keeps_the_text(tmp_path: Path) -> None:
    text = "a\r\n\u2028ü\n"
    write_atomic(tmp_path / "a", text)
    assert (tmp_path / "a").read_bytes().decode() == text


def test_events_are_lines(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    events.progress("a", 1, 2)
    events.note("line\nbreak")
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert {key: first[key] for key in ("kind", "what", "done", "total", "unit")} == {
        "kind": "progress", "what": "a", "done": 1, "total": 2, "unit": ""
    }  # fmt: skip
    assert (second["kind"], second["text"]) == ("note", "line\nbreak")
    assert first["time"] <= second["time"]


def test_a_million_events_are_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = Events(path)
    for done in range(3 * MANY_EVENTS):
        events.progress("rows", done, 3 * MANY_EVENTS)
    assert MANY_EVENTS <= path.read_text().count("\n") < MANY_EVENTS + 20


def test_a_result_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"ok": True, "answer": 1})
    with pytest.raises(TypeError, match="answer"):
        load_result(tmp_path / "result.json")
