"""Signals: a resumable point, exit code 75, in bounded time, wherever the run is."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from child_process import ROOT, Helper, alive, helper, wait_until

# What every program of these tests begins with: a command that ends as `quantize run` does.
HEAD = """
import ctypes, hashlib, os, sys, time
from pathlib import Path
from quantize import process, stop
from quantize.errors import Interrupted
from quantize.process import Process
from quantize.stop import handle_signals
folder = Path(sys.argv[1])
process.GRACE_SECONDS = 1.5
stop.EXIT_SECONDS = 4.0
def say(*words): print(*words, flush=True)
def child(script, name="child"):
    return Process(["sh", "-c", script], log=folder / name)
def stuck():  # in C code that no signal ends and that lets other threads run
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
def run(work):
    try:
        with handle_signals():
            work()
    except Interrupted as error:
        say(error.message)
        sys.exit(error.exit_code)
"""
DEAF = "trap '' TERM INT; echo $$; while true; do sleep 0.1; done"
SIGNALS = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"]


def program(work: str) -> str:
    return (
        f"{HEAD}\ndef work():\n"
        + "".join(f"    {line}\n" for line in work.splitlines())
        + ("run(work)\n")
    )


def pid_in(log: Path) -> int:
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"), f"a line in {log}")
    return int(log.read_text().split()[0])


def send(run: Helper, name: str = "SIGTERM") -> float:
    run.process.send_signal(getattr(signal, name))
    return time.monotonic()


def send_and_go_on(run: Helper) -> None:
    """A signal, and when it has arrived the word that the program waits for."""
    send(run)
    time.sleep(0.2)
    run.say()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_the_run_with_75_and_its_children(name: str, tmp_path: Path) -> None:
    work = "with child('echo $$; exec sleep 60') as p:\n    say('in')\n    p.wait()"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        pid = pid_in(tmp_path / "child")
        send(run, name)
        assert run.read() == f"stopped by {name}; what was finished is kept"
        assert run.end() == 75
        assert not alive(pid)


def test_deaf_children_are_ended_side_by_side(tmp_path: Path) -> None:
    """Two grace periods one after the other would be more than a scheduler gives."""
    work = f"with child({DEAF!r}, 'a'), child({DEAF!r}, 'b') as p:\n    say('in')\n    p.wait()"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        pids = [pid_in(tmp_path / name) for name in "ab"]
        began = send(run)
        assert run.end() == 75
        assert 1.5 < time.monotonic() - began < 2.9
        assert not any(map(alive, pids))


@pytest.mark.parametrize("where", ["p.wait()", "stuck()"])
def test_a_second_signal_ends_at_once(where: str, tmp_path: Path) -> None:
    work = f"stop.EXIT_SECONDS = 600\nwith child({DEAF!r}) as p:\n    say('in')\n    {where}"
    head = program(work).replace("GRACE_SECONDS = 1.5", "GRACE_SECONDS = 600")
    with helper(head, tmp_path) as run:
        assert run.read() == "in"
        pid = pid_in(tmp_path / "child")
        send(run)
        time.sleep(0.5)
        assert run.process.poll() is None
        assert alive(pid)
        began = send(run, "SIGUSR1")
        assert run.end() == 75
        assert time.monotonic() - began < 2
        assert not alive(pid)


def test_a_run_that_is_stuck_ends_all_the_same(tmp_path: Path) -> None:
    """And says so: its last words are written from another thread."""
    words = "stop.on_forced_end(lambda error: (folder / 'words').write_text(error.message))"
    work = f"{words}\nwith child({DEAF!r}):\n    say('in')\n    stuck()"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        pid = pid_in(tmp_path / "child")
        began = send(run)
        assert run.end() == 75
        assert 4 <= time.monotonic() - began < 7
        assert not alive(pid)
    assert (tmp_path / "words").read_text() == "stopped by SIGTERM; what was finished is kept"


def test_last_words_that_hang_hold_nothing(tmp_path: Path) -> None:
    work = "stop.on_forced_end(lambda error: time.sleep(600))\nsay('in')\nstuck()"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        send(run)
        time.sleep(0.5)
        began = send(run, "SIGINT")
        assert run.end() == 75
        assert time.monotonic() - began < 4


HELD = """
with stop.held():
    say("held")
    sys.stdin.readline()
    say("whole")
say("not reached")
"""
SWALLOWED = """
class Hungry:
    def __del__(self):
        say("in a destructor")
        time.sleep(60)
hungry = Hungry()
del hungry
say("swallowed")
stop.check()
say("not reached")
"""
TAKEN = """
say("waiting")
try:
    time.sleep(60)
except Exception:
    say("taken for a failure")
"""
ENDING = f"""
with child({DEAF!r}) as p:
    say("in")
    sys.stdin.readline()
    say("leaving")
say("not reached")
"""
CHILD_LATER = f"""
with stop.held():
    say("held")
    sys.stdin.readline()
    p = child({DEAF!r})
    p.end()
    say(p.poll())
"""


def test_what_is_held_is_whole(tmp_path: Path) -> None:
    with helper(program(HELD), tmp_path) as run:
        assert run.read() == "held"
        send_and_go_on(run)
        assert [run.read(), run.read()] == [
            "whole",
            "stopped by SIGTERM; what was finished is kept",
        ]
        assert run.end() == 75


def test_a_raise_that_python_swallowed_is_made_up_for(tmp_path: Path) -> None:
    with helper(program(SWALLOWED), tmp_path) as run:
        assert run.read() == "in a destructor"
        send(run)
        assert [run.read(), run.read()][0] == "swallowed"
        assert run.end() == 75


def test_nobody_takes_it_for_a_failure_of_his_own(tmp_path: Path) -> None:
    with helper(program(TAKEN), tmp_path) as run:
        assert run.read() == "waiting"
        send(run)
        assert run.read().startswith("stopped by SIGTERM")
        assert run.end() == 75


def test_a_signal_while_a_child_is_being_ended(tmp_path: Path) -> None:
    with helper(program(ENDING), tmp_path) as run:
        assert run.read() == "in"
        pid = pid_in(tmp_path / "child")
        run.say()
        assert run.read() == "leaving"
        time.sleep(0.3)
        send(run)
        assert run.read().startswith("stopped by SIGTERM")
        assert run.end() == 75
        assert not alive(pid)


def test_a_child_that_starts_after_the_signal_is_ended_at_once(tmp_path: Path) -> None:
    with helper(program(CHILD_LATER), tmp_path) as run:
        assert run.read() == "held"
        send_and_go_on(run)
        assert run.read() in ("143", "-15")  # as its supervisor had begun, or not yet
        assert run.end() == 75


def test_what_is_decided_stays_so(tmp_path: Path) -> None:
    work = "stop.decide(0)\nsay('in')\nsys.stdin.readline()\nsay('done')"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        send_and_go_on(run)
        assert run.read() == "done"
        assert run.end() == 0


def test_a_signal_that_is_sent_twice_is_one(tmp_path: Path) -> None:
    with helper(program(HELD), tmp_path) as run:
        assert run.read() == "held"
        for _ in range(3):
            send(run)
            time.sleep(0.02)
        time.sleep(0.2)
        run.say()
        assert run.read() == "whole"
        assert run.read().startswith("stopped by SIGTERM")
        assert run.end() == 75


def test_what_is_written_has_its_code_however_it_ends(tmp_path: Path) -> None:
    words = "stop.on_forced_end(lambda error: (folder / 'words').write_text(error.message))"
    work = f"{words}\nstop.decide(3)\nstop.said()\nsay('in')\nstuck()"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        send(run)
        time.sleep(0.5)
        send(run)
        assert run.end() == 3
    assert not (tmp_path / "words").exists()


def test_what_is_decided_but_not_written_is_interrupted(tmp_path: Path) -> None:
    words = "stop.on_forced_end(lambda error: (folder / 'words').write_text(error.message))"
    with helper(program(f"{words}\nstop.decide(3)\nsay('in')\nstuck()"), tmp_path) as run:
        assert run.read() == "in"
        send(run)
        time.sleep(0.5)
        send(run)
        assert run.end() == 75
    assert (tmp_path / "words").exists()


def test_signals_count_again_for_what_follows_a_result(tmp_path: Path) -> None:
    work = "stop.decide(0)\nsay('in')\nsys.stdin.readline()\nstop.go_on()\nsay('not reached')"
    with helper(program(work), tmp_path) as run:
        assert run.read() == "in"
        send_and_go_on(run)
        assert run.read().startswith("stopped by SIGTERM")
        assert run.end() == 75


@pytest.mark.parametrize(("work", "code"), [("stop.decide(3); stop.said()", 3), ("pass", 75)])
def test_between_the_end_of_a_run_and_that_of_the_process(
    work: str, code: int, tmp_path: Path
) -> None:
    outside = (
        "from quantize import __main__, cli\n"
        "def command():\n"
        f"    with handle_signals():\n        {work}\n"
        "    say('over')\n    time.sleep(60)\n"
        "cli.main = command\n__main__.start()\n"
    )
    with helper(HEAD + outside, tmp_path) as run:
        assert run.read() == "over"
        send(run)
        assert run.end() == code


def test_nohup_is_respected(tmp_path: Path) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with helper(ignoring + program("say('in')\nsys.stdin.readline()\nsay('on')"), tmp_path) as run:
        assert run.read() == "in"
        send(run, "SIGHUP")
        time.sleep(0.2)
        run.say()
        assert run.read() == "on"
        assert run.end() == 0


def test_a_terminal_that_is_closed_is_no_failure(tmp_path: Path) -> None:
    """What is written to it then fails: an exit code of its own, and the last words are lost."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program("say('in')\ntime.sleep(60)"), str(tmp_path)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        os.close(slave)
        assert os.read(master, 100).strip() == b"in"
        os.close(master)  # the kernel sends SIGHUP
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
        process.wait()


def test_a_reader_that_is_gone_is_no_failure(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "quantize", "run", "tiny-llama-fp8", "--until", "fetch"]
    try:
        done = subprocess.run(
            [*command, "--store", str(tmp_path / "store")],
            stdout=writing,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_killed_supervisor_leaves_nothing_to_a_run(tmp_path: Path) -> None:
    """What left its session, too: the kernel hands it to the run."""
    work = (
        "with child('setsid sh -c \"echo \\\\$\\\\$; exec sleep 60\" & sleep 60') as p:\n"
        "    say(p.pid)\n    p.wait()\n    sys.stdin.readline()\nsay('left')"
    )
    with helper(program(work), tmp_path) as run:
        supervisor = int(run.read())
        pid = pid_in(tmp_path / "child")
        os.kill(supervisor, signal.SIGKILL)
        run.say()
        assert run.read() == "left"
        assert not alive(pid)
