"""What hangs is found by its progress, in real processes that hang in different ways."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_process import alive

from quantize.environments import Environments
from quantize.errors import ToolError, TransientError
from quantize.liveness import Patience, Watch
from quantize.measure.client import Client, VllmClient
from quantize.measure.watching import ServerWatch
from quantize.process import Process
from quantize.progress import LineView, Progress
from quantize.runner import Runner

SERVER = Path(__file__).parent / "model_server.py"

WORKER = '''
import os, signal, subprocess, sys, threading, time
from quantize.protocol import worker_main

def sleep_for_ever(events):
    threading.Event().wait()

def stopped(events):
    os.kill(os.getpid(), signal.SIGSTOP)

def deadlock(events):
    """A child fills a pipe that nobody reads; we wait for its end."""
    child = subprocess.Popen(["sh", "-c", "yes | head -c 1000000"], stdout=subprocess.PIPE)
    child.wait()

def endless_loop(events):
    while True:
        pass

def computes(events):
    end = time.monotonic() + 8
    while time.monotonic() < end:
        sum(range(10000))

def writes(events):
    with open(os.environ["SCRATCH"], "wb") as file:
        for _ in range(40):
            time.sleep(0.2)
            file.write(bytes(100_000))

def reports(events):
    for done in range(40):
        time.sleep(0.2)
        events.progress("layers", done, 40)

def run(request, events):
    events.progress("layers", 3, 32, "layers")
    globals()[request.body["do"]](events)
    return {}
worker_main(run)
'''


def runner(folder: Path, patience: Patience) -> Runner:
    (folder / "worker.py").write_text(WORKER)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -P {folder / "worker.py"} "$4" "$5"\n')
    python.chmod(0o755)
    (folder / "work").mkdir()
    environments = Environments("cpu", folder / "cache", {"tool": python})
    progress = Progress(LineView([].append))
    return Runner(environments, folder / "logs", progress, patience=patience)


def work(folder: Path, do: str, patience: Patience) -> dict[str, Any]:
    return runner(folder, patience).worker(
        "tool",
        "toy",
        {"do": do},
        work=folder / "work",
        label="job",
        env={"SCRATCH": str(folder / "scratch")},
    )


@pytest.mark.parametrize(
    ("do", "patience", "words"),
    [
        ("sleep_for_ever", Patience(2, 600), "neither processor time nor input and output"),
        ("stopped", Patience(2, 600), "stopped \\(SIGSTOP"),
        ("deadlock", Patience(2, 600), "neither processor time"),
        ("endless_loop", Patience(600, 3), "though it used the processor"),
    ],
)
def test_a_worker_that_hangs(do: str, patience: Patience, words: str, tmp_path: Path) -> None:
    began, others = time.monotonic(), set(psutil.Process().children(recursive=True))
    with pytest.raises(TransientError, match=words) as caught:
        work(tmp_path, do, patience)
    assert time.monotonic() - began < 15
    assert caught.value.exit_code == 75
    assert caught.value.message.startswith("job hung and was ended: no progress for ")
    assert caught.value.message.endswith(" (last: layers 3/32)")
    log = tmp_path / "logs" / "job.log"
    assert str(log) in caught.value.hint
    if do != "stopped":  # it cannot say where
        assert f"in {do}" in log.read_text()
    assert not set(psutil.Process().children(recursive=True)) - others


@pytest.mark.parametrize(
    ("do", "patience"),
    [
        ("computes", Patience(4, 600)),
        ("writes", Patience(4, 600)),
        ("reports", Patience(3, 4)),
    ],
)
def test_who_works_is_left_alone(do: str, patience: Patience, tmp_path: Path) -> None:
    assert work(tmp_path, do, patience) == {}


def test_time_in_which_we_were_stopped_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Process(["sleep", "60"], log=tmp_path / "log") as process:
        watch = Watch([process], Patience(idle_seconds=100))
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
        assert watch.look() is None


def test_the_peak_is_of_all_processes_together(tmp_path: Path) -> None:
    code = "import time; held = bytearray(100_000_000); print(1, flush=True); time.sleep(60)"
    script = f'{sys.executable} -c "{code}" & {sys.executable} -c "{code}"'
    with Process(["sh", "-c", script], log=tmp_path / "log") as process:
        watch = Watch([process], Patience(idle_seconds=1))
        while process.output().count("1") < 2:
            time.sleep(0.05)
        time.sleep(0.2)
        watch.look()
        assert 200e6 < watch.vitals.peak_bytes < 300e6


# --- servers -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(
    folder: Path, fault: str, patience: Patience, unhealthy_seconds: float = 600.0
) -> Iterator[tuple[Client, Process]]:
    """The toy model as a process, watched as the measurement does."""
    run, port = runner(folder, Patience()), free_port()
    command = [sys.executable, str(SERVER), str(port), fault]
    with run.process(command, "server") as process:
        client = VllmClient(f"http://127.0.0.1:{port}", "model")
        while b"line" not in process.log.read_bytes():
            time.sleep(0.05)
        time.sleep(0.2)
        try:
            with (
                run.blaming(process, "toy server", lambda _log: None),
                ServerWatch(process, client, "toy server", patience, unhealthy_seconds),
            ):
                yield client, process
        finally:
            client.close()


def ask(client: Client) -> None:
    """Many at once, as perplexity does."""
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(client.score, [1, 4, 5], 1) for _ in range(8)]:
            future.result()


IMPATIENT = Patience(2, 600)


@pytest.mark.parametrize(
    ("fault", "patience", "unhealthy_seconds", "words"),
    [
        ("mute", IMPATIENT, 600.0, "neither processor time nor input and output"),
        ("half", IMPATIENT, 600.0, "neither processor time"),
        ("deaf", Patience(600, 600), 2.0, "has not answered /health for"),
        ("spin", Patience(600, 3), 600.0, "though it used the processor"),
    ],
)
def test_a_server_that_hangs(
    fault: str, patience: Patience, unhealthy_seconds: float, words: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with (
        pytest.raises(TransientError, match=words) as caught,
        served(tmp_path, fault, patience, unhealthy_seconds) as (client, process),
    ):
        ask(client)
    assert time.monotonic() - began < 20
    assert type(caught.value) is TransientError
    assert "toy server hung and was ended" in caught.value.message
    assert str(process.log) in caught.value.hint
    assert "serve_forever" in process.output()  # where it stood
    assert not alive(process.pid)


def test_a_stopped_server_is_found(tmp_path: Path) -> None:
    with (
        pytest.raises(TransientError, match="stopped \\(SIGSTOP"),
        served(tmp_path, "", IMPATIENT) as (client, process),
    ):
        ask(client)
        for child in psutil.Process(process.pid).children():
            child.suspend()
        ask(client)
    assert not alive(process.pid)


def test_a_server_that_nobody_asks_is_not_late(tmp_path: Path) -> None:
    with served(tmp_path, "", Patience(1, 1)) as (client, process):
        ask(client)
        time.sleep(3)
        ask(client)
        assert process.poll() is None


ASKS: dict[str, Callable[[Client], Any]] = {
    "score": lambda client: client.score([1, 4], 1),
    "complete": lambda client: client.complete("a", 1),
    "chat": lambda client: client.chat([{"role": "user", "content": "a"}], 1),
    "tokenize": lambda client: client.tokenize("a", special=False),
    "version": lambda client: client.version(),
    "length": lambda client: client.max_model_len(),
}


@pytest.mark.parametrize("fault", ["not json", "a list", "other json"])
def test_a_server_that_answers_something_else(fault: str, tmp_path: Path) -> None:
    with served(tmp_path, fault, IMPATIENT) as (client, _):
        for name, question in ASKS.items():
            with pytest.raises(ToolError, match=r"^/\S+ answered (with what is no|in a form)"):
                question(client)
                pytest.fail(f"{name} took it for an answer")


@pytest.mark.parametrize(("fault", "seconds"), [("half", 0.5), ("mute", 0.5)])
def test_a_client_by_itself_gives_up_too(fault: str, seconds: float, tmp_path: Path) -> None:
    with served(tmp_path, fault, Patience()) as (client, _):
        impatient = VllmClient(client.base_url, "model", timeout=seconds)
        with pytest.raises(TransientError, match="stopped answering at /v1/completions: ReadTime"):
            impatient.score([1, 4], 1)
        impatient.close()
