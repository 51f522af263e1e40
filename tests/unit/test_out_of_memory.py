"""Want of memory is named as such, where something says so, and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from child_process import ROOT, helper

from quantize import control_group
from quantize.control_group import Kills, own_group
from quantize.machine import memory_bytes
from quantize.out_of_memory import explain_end, of_sigkill

NOW = control_group.kills()


# --- what the kernel's files say ------------------------------------------------------------------


def test_version_2(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\n")
    (tmp_path / "memory.max").write_text("17179869184\n")
    (tmp_path / "memory.peak").write_text("12345\n")
    assert control_group.kills(tmp_path).group == 2
    assert control_group.limit_bytes(tmp_path) == 16 * 2**30
    assert control_group.peak_bytes(tmp_path) == 12345
    (tmp_path / "memory.max").write_text("max\n")
    assert control_group.limit_bytes(tmp_path) is None


def test_the_limit_of_a_group_around_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm limits the job's group; the process is two groups below it."""
    ours = tmp_path / "job" / "step" / "task"
    ours.mkdir(parents=True)
    (ours / "memory.max").write_text("max\n")
    (ours.parent / "memory.max").write_text("9000\n")
    (tmp_path / "job" / "memory.max").write_text("7000\n")
    assert control_group.limit_bytes(ours) == 7000
    (ours / "memory.max").write_text("5000\n")
    assert control_group.limit_bytes(ours) == 5000
    monkeypatch.setattr(control_group, "own_group", lambda: ours)
    assert memory_bytes() == 5000


def test_version_1(tmp_path: Path) -> None:
    text = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
    (tmp_path / "memory.oom_control").write_text(text)
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.max_usage_in_bytes").write_text("777\n")
    assert control_group.kills(tmp_path).group == 5
    assert control_group.limit_bytes(tmp_path) is None
    assert control_group.peak_bytes(tmp_path) == 777
    (tmp_path / "memory.limit_in_bytes").write_text("1000\n")
    assert control_group.limit_bytes(tmp_path) == 1000


def test_nothing_is_known_where_nothing_is_said(tmp_path: Path) -> None:
    assert control_group.kills(tmp_path).group is None
    assert control_group.limit_bytes(tmp_path) is None
    assert control_group.peak_bytes(tmp_path) is None


# --- what is said of an end -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "GPU memory"),
        ("RuntimeError: CUDA error: out of memory", "GPU memory"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "an allocation failed"),
        ("Traceback\nMemoryError", "an allocation failed"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate", "an allocation failed"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "failed"),
    ],
)
def test_the_words_of_the_tools(output: str, words: str) -> None:
    said = explain_end(1, output, NOW, 3_000_000_000)
    assert said is not None
    assert words in said
    assert said.endswith("its processes held up to 3.0 GB")


@pytest.mark.parametrize("output", ["", "KeyError: 'MemoryErrors'", "no MemoryError here: fine"])
def test_other_ends_are_not_blamed_on_memory(output: str) -> None:
    assert explain_end(1, output, control_group.kills(), 0) is None


def test_a_sigkill_is_said_as_far_as_it_is_known() -> None:
    assert of_sigkill(Kills(None, None), 0) == "perhaps for using too much memory"
    assert "the kernel counts no kill for memory: by somebody else" in of_sigkill(NOW, 0)
    assert explain_end(137, "", control_group.kills(), 0) is None
    machine = control_group.kills().machine
    if machine is not None:
        earlier = Kills(None, machine - 1)
        said = "out of memory: the kernel's OOM killer was at work on this machine"
        assert explain_end(137, "", earlier, 0) == said
        assert "an allocation failed" in str(explain_end(1, "MemoryError", earlier, 0))


# --- real ends ------------------------------------------------------------------------------------

WORKER = """
import resource, sys
from quantize.protocol import worker_main
def run(request, events):
    if request.body["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (request.body["limit"],) * 2)
    held = []
    while True:
        held.append(bytearray(b"x" * 10_000_000))
worker_main(run)
"""
RUN = """
import sys
from pathlib import Path
from quantize.environments import Environments
from quantize.errors import QuantizeError
from quantize.progress import LineView, Progress
from quantize.runner import Runner
folder = Path(sys.argv[1])
environments = Environments("cpu", folder / "cache", {"tool": folder / "python"})
runner = Runner(environments, folder / "logs", Progress(LineView([].append)))
sys.stdin.readline()
try:
    body = {"limit": int(sys.argv[2])}
    runner.worker("tool", "toy", body, work=folder, label="job")
except QuantizeError as error:
    print(type(error).__name__, error.message.replace(chr(10), " "), flush=True)
"""


def prepare(folder: Path) -> None:
    (folder / "worker.py").write_text(WORKER)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -P {folder / "worker.py"} "$4" "$5"\n')
    python.chmod(0o755)


def test_an_allocation_that_fails(tmp_path: Path) -> None:
    prepare(tmp_path)
    with helper(RUN, tmp_path, 400_000_000) as run:
        run.say()
        assert run.read().startswith("ResourceError job: out of memory: MemoryError")


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path]:
    """A control group below ours with a memory limit; skipped where none can be made."""
    ours = own_group()
    if ours is None:
        pytest.skip("no memory control group")
    group = ours / f"quantize-test-{os.getpid()}"
    version_1 = (ours / "memory.limit_in_bytes").exists()
    limit = "memory.limit_in_bytes" if version_1 else "memory.max"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        try:
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"control groups cannot be limited here: {error}")
        yield group
    finally:
        group.rmdir()


def test_the_kernel_kills_for_memory(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert ROOT.is_dir()
    with limited_group(300_000_000) as group:
        with helper(RUN, tmp_path, 0) as run:
            (group / "cgroup.procs").write_text(str(run.pid))
            run.say()
            said = run.read()
            run.end()
        kills = control_group.kills(group).group
    assert said.startswith("ResourceError job was killed (SIGKILL), out of memory: the kernel's")
    assert "counts a kill in this control group (limit 0.3 GB)" in said
    assert kills == 1
