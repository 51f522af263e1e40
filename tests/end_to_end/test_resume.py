"""Killed at any stage, the same command goes on: nothing finished is repeated, nothing survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import Work, environment

pytestmark = pytest.mark.end_to_end

STAGES = ["calibrate", "compress", "measure-baseline", "measure-candidate"]


def start(work: Work, store: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The GPTQ recipe without tasks, so that most of the time is spent between kills."""
    command = work.command("run", "tiny-llama-gptq", "--store", str(store), *arguments)
    command += ["--set", "evaluate.suite=smoke", "--set", f"publish.folder={store}-out"]
    # What is killed and resumed here is the work; how good GPTQ is on 16 windows is not the point.
    command += ["--set", "evaluate.noise=false", "--set", "evaluate.gate.inconclusive=pass"]
    return subprocess.Popen(
        command,
        cwd=work.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def current_stage(store: Path) -> str:
    """Stage of the newest run, from its status.json."""
    files = sorted((store / ".runs").glob("*/status.json"), key=lambda path: path.stat().st_mtime)
    return str(json.loads(files[-1].read_text()).get("stage", "")) if files else ""


def wait_for_stage(process: subprocess.Popen[bytes], store: Path, stage: str) -> None:
    deadline = time.monotonic() + 300
    while current_stage(store) != stage:
        assert process.poll() is None, f"the run ended before {stage}"
        assert time.monotonic() < deadline, f"{stage} was never reached"
        time.sleep(0.05)


def below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=25)
    assert not alive, f"survivors: {[p.cmdline() for p in alive if p.is_running()]}"


def test_kill_9_at_each_stage(work: Work, tmp_path: Path) -> None:
    store = tmp_path / "store"
    seen: dict[str, float] = {}
    for stage in STAGES:
        process = start(work, store)
        wait_for_stage(process, store, stage)
        time.sleep(3.0 if stage.startswith("measure") else 1.0)
        children = below(process)
        process.kill()
        process.wait()
        assert children, "a stage that starts nothing was killed"
        assert_gone(children)
        # what was finished before this kill was not made again after the last one
        made = {str(p.parent): p.stat().st_mtime for p in store.glob("*/*/manifest.json")}
        assert all(made.get(folder) == when for folder, when in seen.items())
        seen = made
    assert start(work, store).wait() == 0
    made = {str(p.parent): p.stat().st_mtime for p in store.glob("*/*/manifest.json")}
    assert all(made[folder] == when for folder, when in seen.items())

    # the same weights as an undisturbed run's, and the same key
    clean = tmp_path / "clean"
    assert start(work, clean, "--until", "compress").wait() == 0
    assert compressed(store) == compressed(clean)
    assert not list((store / "compress" / ".staging").glob("*/files"))


def compressed(store: Path) -> dict[str, str]:
    (manifest,) = store.glob("compress/*/manifest.json")
    files = json.loads(manifest.read_text())["files"]
    # compress.json has timings, the rest is the checkpoint
    named = {f["name"]: f["sha256"] for f in files if f["name"].startswith("model/")}
    return {"key": manifest.parent.name, **named}


def test_interrupt_ends_with_75_and_leaves_nothing(work: Work, tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = start(work, store)
    wait_for_stage(process, store, "compress")
    time.sleep(1.0)
    children = below(process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 75
    assert_gone(children)
    (result,) = store.glob(".runs/*/result.json")
    value = json.loads(result.read_text())
    assert value["exit_code"] == 75
    assert [stage["id"] for stage in value["stages"]] == ["fetch", "calibrate"]


def test_a_server_that_dies_in_a_task_costs_that_task(work: Work, tmp_path: Path) -> None:
    """The message names the server, and what was measured before is not measured again."""
    store = tmp_path / "store"
    command = work.command("run", "tiny-llama-fp8", "--store", str(store))
    command += ["--until", "measure-baseline", "--quick"]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=work.folder, env=environment(), stdout=subprocess.DEVNULL, stderr=err
        )
    deadline = time.monotonic() + 300
    while not (asking := named(process, "quantize.workers.evaluate")):
        assert process.poll() is None, (tmp_path / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    for server in named(process, "vllm.entrypoints"):
        server.kill()
    code = process.wait(timeout=120)
    said = (tmp_path / "err").read_text()
    assert code in (4, 75), said
    assert "vLLM server" in said
    assert "Traceback" not in said
    assert_gone(asking)
    (part,) = store.glob("measure/.staging/*/*/part-perplexity.json")
    seconds = json.loads(part.read_text())["seconds"]

    assert subprocess.run(command, cwd=work.folder, env=environment(), check=False).returncode == 0
    (record,) = store.glob("measure/*/record.json")
    measured = json.loads(record.read_text())
    assert measured["seconds"]["perplexity"] == round(seconds, 2)
    assert {task["name"] for task in measured["tasks"]} == {"valley_mc", "valley_qa"}


def named(process: subprocess.Popen[bytes], words: str) -> list[psutil.Process]:
    """Living descendants with these words on their command line."""
    found = []
    for child in below(process) if process.poll() is None else []:
        try:
            if words in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found
