"""A tool's log stays below a size: its beginning and its newest lines are kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest
from child_process import wait_until

from quantize import process as module
from quantize.process import Process
from quantize.supervise import Log

MARK = re.compile(r"\n\[\.\.\. (\d+) bytes of output are left out here \.\.\.\]\n")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "LOG_BYTES", 40_000)
    return 40_000


def run(script: str, log: Path) -> str:
    with Process(["sh", "-c", script], log=log) as process:
        assert process.wait() == 0
        return process.output()


@pytest.mark.usefixtures("small")
def test_the_beginning_and_the_newest_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    text = run("seq 100000", log)
    whole = sum(len(f"{n}\n") for n in range(1, 100_001))
    assert log.stat().st_size < 40_000
    assert text.startswith("1\n2\n3\n")
    assert text.endswith("99999\n100000\n")
    (left_out,) = MARK.findall(text)
    assert whole == len(MARK.sub("", text)) + int(left_out)  # what is not there is counted
    newest = MARK.split(text)[2].split()
    assert newest == [str(n) for n in range(int(newest[0]), 100_001)]  # whole lines, none missing
    assert len(newest) > 1000


@pytest.mark.usefixtures("small")
def test_every_process_of_a_log_has_its_own_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run("seq 1000; echo end of the first", log).endswith("end of the first\n")
    second = run("seq 20000", log)
    assert second.startswith("1\n2\n")
    assert log.read_text().count("end of the first\n") == 1


def test_a_short_log_is_whole(tmp_path: Path) -> None:
    assert run("seq 1000", tmp_path / "log").split() == [str(n) for n in range(1, 1001)]


def test_a_long_line_does_not_break_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("a+b") as file:
        log = Log(file.fileno(), 1000)
        for _ in range(100):
            log.write(b"x" * 700)
        assert os.fstat(file.fileno()).st_size <= 1000 + 700
    assert (tmp_path / "log").read_bytes().startswith(b"x" * 250)


def test_a_full_disk_costs_lines_and_not_the_tool(tmp_path: Path) -> None:
    with Path("/dev/full").open("a+b", buffering=0) as file:
        Log(file.fileno(), 1000).write(b"lost\n")


def test_a_supervisor_that_dies_does_not_leave_the_tool_waiting(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Process(["sh", "-c", "trap '' TERM; while true; do seq 10000; done"], log=log) as process:
        wait_until(lambda: log.stat().st_size > 100_000, "output")
        children = psutil.Process(process.pid).children(recursive=True)
        psutil.Process(process.pid).kill()
        assert process.wait() == -9
    _, living = psutil.wait_procs(children, timeout=10)
    assert not [p for p in living if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("small")
def test_what_is_printed_last_is_there(tmp_path: Path) -> None:
    for number in range(20):
        assert run(f"echo {number}", tmp_path / str(number)) == f"{number}\n"


def test_no_core_is_dumped(tmp_path: Path) -> None:
    """One of a server is as large as its model."""
    assert run("ulimit -c", tmp_path / "log") == "0\n"  # sh counts in blocks: one byte is none
