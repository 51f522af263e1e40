"""Who holds a GPU's memory, by a program that answers as nvidia-smi does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from child_process import helper, wait_until

from quantize import gpu_processes as module
from quantize.gpu_processes import GpuProcess, gpu_processes, leftovers, used_bytes
from quantize.process import Process
from quantize.status import Memory

Says = Callable[[str], None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Put a script of this name first on the path; what it is told is its body."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def says(body: str) -> None:
        script = folder / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{body}\n')
        script.chmod(0o755)

    return says


def test_what_it_says_is_read(nvidia_smi: Says, tmp_path: Path) -> None:
    nvidia_smi(
        "echo '4711, 20480, /opt/env/bin/python'; echo '12, [N/A], VLLM::EngineCore, x'; echo"
    )
    assert gpu_processes() == [
        GpuProcess(4711, 20480 * 2**20, "/opt/env/bin/python"),
        GpuProcess(12, None, "VLLM::EngineCore, x"),
    ]
    asked = (tmp_path / "asked").read_text()
    assert "--query-compute-apps=pid,used_memory,process_name" in asked
    assert "--format=csv,noheader,nounits" in asked


@pytest.mark.parametrize(
    "body",
    [
        "exit 9",
        "echo 'No running processes found'",
        "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9",
    ],
)
def test_what_says_nothing_is_nobody(body: str, nvidia_smi: Says) -> None:
    nvidia_smi(body)
    assert gpu_processes() == []


def test_one_that_hangs_is_not_waited_for(
    nvidia_smi: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.3)
    nvidia_smi("exec sleep 60")
    began = time.monotonic()
    assert gpu_processes() == []
    assert time.monotonic() - began < 10


def test_none_where_there_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_processes() == []


def test_memory_of_our_own_processes_is_summed(nvidia_smi: Says) -> None:
    found = [
        GpuProcess(os.getpid(), 5, "a"),
        GpuProcess(os.getpid(), 6, "a"),
        GpuProcess(1, 7, "b"),
    ]
    assert used_bytes(found, [os.getpid(), 99]) == 11
    nvidia_smi(f"echo '{os.getpid()}, 3, python'; echo '1, 9, init'")
    memory = Memory(gpu=True)
    memory.sample()
    assert memory.json()["gpu_peak_bytes"] == 3 * 2**20


# A server renames itself: what it was started as is not on its command line any more.
HOLDS = """
import mmap, sys, time
file = open(sys.argv[1], "rb")
held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("holds", flush=True)
time.sleep(600)
"""


def test_a_leftover_of_a_killed_run_is_named(tmp_path: Path) -> None:
    environments = tmp_path / "environments"
    library = environments / "vllm-0" / "lib" / "libtorch.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"code")
    foreign = tmp_path / "other.so"
    foreign.write_bytes(b"code")
    with helper(HOLDS, library) as ours, helper(HOLDS, foreign) as others:
        ours.read()
        others.read()
        found = [
            GpuProcess(ours.pid, 20_000_000_000, "VLLM::EngineCore"),
            GpuProcess(others.pid, 5, "a game"),
            GpuProcess(2**22 + 1, 5, "of the host's process table"),
        ]
        (said,) = leftovers(found, environments)
        assert said == (
            "GPU memory (20.0 GB) is held by what a killed run left behind: process "
            f"{ours.pid} (VLLM::EngineCore); end it with: kill {ours.pid}"
        )


def test_a_process_of_a_run_that_lives_is_no_leftover(tmp_path: Path) -> None:
    library = tmp_path / "environments" / "libtorch.so"
    library.parent.mkdir()
    library.write_bytes(b"code")
    log = tmp_path / "log"
    with Process([sys.executable, "-c", HOLDS, str(library)], log=log) as process:
        wait_until(lambda: "holds" in log.read_text(), "it to map the file")
        (child,) = psutil.Process(process.pid).children()
        found = [GpuProcess(child.pid, None, "python")]
        assert leftovers(found, library.parent) == []
