"""Real processes: how they end, what they are given, and that nothing survives."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from child_process import alive, helper, wait_until

from quantize import process as module
from quantize import supervise
from quantize.process import SECRETS, TAIL_LINES, Process

# A Python start costs more than a shell's, and the shell has traps.
SLEEP = "sleep 60"


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


FILE = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}


def run(command: list[str], log: Path, **env: str) -> tuple[int, str]:
    with Process(command, log=log, env=env) as process:
        return process.wait(), process.output()


def pids(log: Path, count: int) -> list[int]:
    """Process ids that a child wrote to its log, one a line, once all of them are there."""
    wait_until(lambda: log.read_text().count("\n") >= count, f"{count} lines in {log}")
    return [int(line) for line in log.read_text().split()[:count]]


def assert_gone(*found: int) -> None:
    """SIGKILL is sent, not awaited: on a busy machine a process takes a moment to go."""
    wait_until(lambda: not any(map(alive, found)), f"{found} to be gone", 5)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "child.log"


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 75", 75),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
        ("kill -SEGV $$", 128 + 11),
        ("kill -INT $$", 128 + 2),
    ],
)
def test_exit_codes(script: str, code: int, log: Path) -> None:
    assert run(shell(script), log)[0] == code


def test_a_program_that_is_not_there(log: Path, tmp_path: Path) -> None:
    missing = tmp_path / "python"
    code, output = run([str(missing)], log)
    assert (code, output) == (127, f"cannot start {missing}: No such file or directory\n")
    missing.write_text("not a program")
    code, output = run([str(missing)], log)
    assert (code, output) == (126, f"cannot start {missing}: Permission denied\n")


def test_output_is_this_process_own_and_its_tail(log: Path) -> None:
    lines = TAIL_LINES + 5
    assert run(shell("echo earlier"), log) == (0, "earlier\n")
    with Process(shell(f"seq {lines}; echo error >&2"), log=log) as process:
        process.wait()
        assert process.output().splitlines() == [*map(str, range(1, lines + 1)), "error"]
        tail = process.tail().splitlines()
    assert len(tail) == TAIL_LINES
    assert tail[-2:] == [str(lines), "error"]
    assert log.read_text().startswith("earlier\n1\n")


def test_output_that_is_not_utf8_is_shown(log: Path) -> None:
    assert run(shell(r"printf 'a\377b'"), log) == (0, "a\ufffdb")


def test_nobody_types(log: Path) -> None:
    assert run(["cat"], log) == (0, "")


def test_ticks_until_after_the_end(log: Path) -> None:
    seen: list[str] = []
    with Process(shell("echo first; sleep 0.2; echo last"), log=log) as process:
        assert process.poll() is None
        process.wait(lambda: seen.append(process.output()))
        assert process.poll() == 0
    assert "first\n" in seen
    assert seen[-1] == "first\nlast\n"


def test_secrets_and_our_python_stay_here(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"}
    for name in SECRETS | ours:
        monkeypatch.setenv(name, "do-not-tell")
    monkeypatch.setenv("ORDINARY", "passed on")
    _, output = run(["env"], log)
    given = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    assert "do-not-tell" not in output
    assert given["ORDINARY"] == "passed on"
    assert not given.keys() & (SECRETS | ours)
    _, output = run(["env"], log, HF_TOKEN="for this stage", PYTHONPATH="/worker")
    assert "HF_TOKEN=for this stage\n" in output
    assert "PYTHONPATH=/worker\n" in output


def test_the_token_is_handed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert module.hub_token() == {"HF_TOKEN": "secret"} | FILE
    for unset in ("", None):
        monkeypatch.delenv("HF_TOKEN") if unset is None else monkeypatch.setenv("HF_TOKEN", unset)
        assert module.hub_token() == FILE


def test_leaving_the_block_asks_the_child_to_end(log: Path) -> None:
    script = f"trap 'echo asked; exit 3' TERM; echo $$; {SLEEP} & wait"
    with Process(shell(script), log=log) as process:
        (pid,) = pids(log, 1)
    assert_gone(pid)
    assert process.poll() == 128 + signal.SIGTERM
    assert "asked" in process.output()


@pytest.mark.usefixtures("short_grace")
def test_a_child_that_will_not_end_is_killed(log: Path) -> None:
    script = "trap 'echo ignored' TERM; echo $$; while true; do sleep 0.05; done"
    with Process(shell(script), log=log) as process:
        (pid,) = pids(log, 1)
    assert_gone(pid)
    assert "ignored" in process.output()


@pytest.mark.usefixtures("short_grace")
def test_a_stopped_child_is_killed(log: Path) -> None:
    with Process(shell(f"echo $$; kill -STOP $$; {SLEEP}"), log=log):
        (pid,) = pids(log, 1)
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it to stop")
    assert_gone(pid)


DETACHED = {
    "in the background": f"{SLEEP} & echo $!",
    "in a session of its own": f"setsid sh -c 'echo $$; exec {SLEEP}' &",
    "by two forks": f"(setsid sh -c 'echo $$; exec {SLEEP}' &) &",
    "deaf to hangups": f"nohup sh -c 'echo $$; exec {SLEEP}' 2>/dev/null &",
}


@pytest.mark.parametrize("how", DETACHED)
def test_what_the_child_left_behind_ends_with_it(how: str, log: Path) -> None:
    with Process(shell(f"{DETACHED[how]}\n sleep 0.2; exit 4"), log=log) as process:
        (pid,) = pids(log, 1)
        assert process.wait() == 4
        assert_gone(pid)


@pytest.mark.parametrize("how", DETACHED)
def test_a_failure_in_the_block_ends_everything(how: str, log: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Process(shell(f"echo $$; {DETACHED[how]}\n {SLEEP}"), log=log),
    ):
        found = pids(log, 2)
        raise ZeroDivisionError
    assert_gone(*found)


@pytest.mark.usefixtures("short_grace")
def test_what_is_started_while_it_ends_is_ended_too(log: Path) -> None:
    last_words = f'setsid sh -c "trap : TERM; echo \\$\\$; while true; do {SLEEP}; done" & exit 1'
    with Process(shell(f"trap '{last_words}' TERM; echo $$; {SLEEP} & wait"), log=log) as process:
        pids(log, 1)
    assert_gone(*pids(log, 2))
    assert process.poll() == 128 + signal.SIGTERM


def test_a_child_whose_name_is_no_text_is_ended(log: Path, short_grace: None) -> None:
    """The kernel cuts names to 15 bytes, which may be half a character; it was found by nobody."""
    code = (
        "import ctypes, os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "ctypes.CDLL(None).prctl(15, b'\\xc3'); print(os.getpid(), flush=True); signal.pause()"
    )
    with Process([sys.executable, "-c", code], log=log) as process:
        [pid] = pids(log, 1)
        assert pid in supervise.descendants(process.pid)
    assert_gone(pid)


def test_adopted_children_do_not_stay_as_zombies(log: Path) -> None:
    orphans = "for i in 1 2 3 4 5; do (true &) ; done; echo $$; exec " + SLEEP
    with Process(shell(orphans), log=log) as process:
        pids(log, 1)
        supervisor = psutil.Process(process.pid)
        wait_until(lambda: len(supervisor.children()) == 1, "the orphans to be collected")


PIPELINE = """
import signal, sys
from pathlib import Path
from quantize.process import Process
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
with Process(["sh", "-c", sys.argv[2]], log=Path(sys.argv[1])) as process:
    print(process.pid, flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


@pytest.mark.parametrize("how", DETACHED)
def test_nothing_survives_kill_9_of_the_pipeline(how: str, log: Path) -> None:
    script = f"echo $$; {DETACHED[how]}\n {SLEEP}"
    with helper(PIPELINE, log, script) as pipeline:
        supervisor = int(pipeline.read())
        found = pids(log, 2)
        assert all(alive(pid) for pid in found)
        pipeline.kill()
        wait_until(lambda: not any(alive(pid) for pid in (supervisor, *found)), "them to end")


def test_a_child_dies_with_its_supervisor(log: Path) -> None:
    script = f"trap '' TERM; {DETACHED['in the background']}\n echo $$; exec {SLEEP}"
    with Process(shell(script), log=log) as process:
        grandchild, child = pids(log, 2)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(child), "the child to die")
        assert process.wait() == -signal.SIGKILL
        assert alive(grandchild)  # nobody is left to end it but the pipeline
    wait_until(lambda: not alive(grandchild), "the grandchild to die")


def test_ctrl_c_at_the_terminal_is_for_the_pipeline_alone(log: Path) -> None:
    script = "trap 'echo interrupted' INT; echo $$; while true; do sleep 0.05; done"
    with helper(PIPELINE, log, script) as pipeline:
        supervisor = int(pipeline.read())
        (pid,) = pids(log, 1)
        os.killpg(pipeline.pid, signal.SIGINT)  # what the terminal does
        assert pipeline.read() == "interrupted"
        assert alive(pid)
        assert os.getpgid(supervisor) != os.getpgid(pipeline.pid)
        pipeline.say()
        assert pipeline.read() == "left"
        assert_gone(pid, supervisor)
    assert "interrupted" not in log.read_text()


def test_ending_twice_and_ending_what_has_ended(log: Path) -> None:
    process = Process(shell("exit 5"), log=log)
    assert process.wait() == 5
    process.end()
    process.end()
    assert process.poll() == 5


def test_a_supervisor_without_its_pipeline_starts_nothing(log: Path, tmp_path: Path) -> None:
    """The pipeline died while the supervisor started: its parent is another process."""
    mark = tmp_path / "started"
    supervisor = [sys.executable, "-I", "-S", supervise.__file__]
    assert run([*supervisor, "1", "1", "1000", "touch", str(mark)], log)[0] == 1
    assert not mark.exists()
