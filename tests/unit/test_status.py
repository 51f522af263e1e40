"""`status.json` and the file for Prometheus: what a scheduler reads while a run lives and after."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from child_process import helper, wait_until
from prometheus_client.parser import text_string_to_metric_families

from quantize import status as module
from quantize.errors import GateError, Interrupted, UsageError
from quantize.metrics_file import check_name, write_metrics
from quantize.process import Process
from quantize.progress import LineView, Progress
from quantize.protocol import write_json
from quantize.status import Memory, Status, resident_bytes

FACTS = {"recipe": "tiny", "quantize": "1.0", "run": "/runs/tiny-1"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_SECONDS", 0.05)


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def progress_of(status: Status) -> Progress:
    return Progress(LineView([].append), status)


def test_it_says_where_the_run_is_from_the_start_on(tmp_path: Path) -> None:
    path, copy = tmp_path / "run" / "status.json", tmp_path / "where" / "a scheduler looks.json"
    before = time.time()
    status = Status([path, copy], FACTS)
    status.start()
    first = read(path)
    assert (first["version"], first["state"], first["recipe"]) == (1, "running", "tiny")
    assert (first["pid"], first["host"]) == (os.getpid(), platform.node())
    assert before <= first["started"] <= first["time"] <= time.time()
    assert not first.keys() & {"stage", "percent", "eta_seconds", "cost", "error", "exit_code"}
    progress = progress_of(status)
    with progress.stage("compress", 3, 9):
        assert (read(path)["stage"], read(path)["position"]) == ("compress", "3/9")  # at once
        progress.step("layers", 0, 4, "layers")
        time.sleep(0.02)
        progress.step("layers", 1, 4, "layers")
        wait_until(lambda: read(copy).get("done") == 1, "the next beat")
        said = read(copy)
        assert (said["what"], said["total"], said["percent"]) == ("layers", 4, 25)
        assert said["eta_seconds"] >= 0
        progress.step("saving", 0, 0, "MB")
        wait_until(lambda: read(path).get("what") == "saving", "the next beat")
        assert not read(path).keys() & {"percent", "eta_seconds"}  # not what an earlier step left
    with progress.stage("audit", 4, 9):
        assert "what" not in read(path)
    status.end(None)
    assert {**read(path), "time": 0} == {**read(copy), "time": 0}
    assert (read(path)["state"], read(path)["exit_code"]) == ("done", 0)


def test_it_is_written_by_the_clock_though_nothing_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    status = Status([path], FACTS)
    status.start()
    progress = progress_of(status)
    progress.step("loading", 0, 1)
    wait_until(lambda: read(path).get("what"), "the step")
    first = read(path)
    wait_until(lambda: read(path)["time"] > first["time"] + 0.1, "more beats")
    progress.step("loading", 0, 1)  # said again: no progress
    later = read(path)
    assert later["progressed"] == first["progressed"]
    assert later["elapsed_seconds"] >= first["elapsed_seconds"]
    status.end(None)
    last = path.read_text()
    time.sleep(0.2)
    assert path.read_text() == last  # nobody writes after the last word


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (Interrupted("stopped by SIGTERM", "again"), "interrupted", 75),
        (GateError("worse", "another method"), "failed", 7),
        (ValueError("a bug"), "failed", 1),
    ],
)
def test_the_last_word_says_what_went_wrong(
    error: BaseException, state: str, code: int, tmp_path: Path
) -> None:
    status = Status([tmp_path / "status.json"], FACTS)
    status.start()
    status.stage("compress", "3/9")
    status.end(error)
    found = read(tmp_path / "status.json")
    assert (found["state"], found["exit_code"], found["stage"]) == (state, code, "compress")
    assert found["error"] == {
        "kind": type(error).__name__,
        "message": str(error),
        "hint": getattr(error, "hint", ""),
    }


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    status = Status([path], FACTS)
    status.start()
    with path.open() as reader:
        status.end(None)
        assert json.load(reader)["state"] == "running"  # what was opened before it was written
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_file_that_cannot_be_written_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own = tmp_path / "status.json"
    with pytest.raises(UsageError, match="cannot write the run's status"):
        Status([own, tmp_path / "file" / "status.json"], FACTS).start()
    assert (read(own)["state"], read(own)["exit_code"]) == ("failed", 2)


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_is_full_from_the_start_is_no_mistake_of_the_user(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "status.json", tmp_path / "copy.json"]

    def refuse(path: Path, value: object, **_: object) -> None:
        if path == files[which]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_json(path, value)

    monkeypatch.setattr(module, "write_json", refuse)
    with pytest.raises(OSError, match="No space left"):
        Status(files, FACTS).start()


def test_no_beat_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes minutes while others write; the last word alone is waited for."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    status = Status([tmp_path / "status.json"], FACTS)
    status.start()
    status.stage("compress", "3/9")
    assert not synced
    status.end(None)
    assert synced


def test_the_beat_goes_on_while_measuring_takes_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "sample", lambda memory: time.sleep(600))
    path = tmp_path / "status.json"
    status = Status([path], FACTS)
    status.start()
    time.sleep(0.2)  # until it measures
    first = read(path)["time"]
    wait_until(lambda: read(path)["time"] > first + 0.1, "more beats", 5)
    status.end(None)


def test_a_disk_that_is_full_for_a_while_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status = Status([folder / "status.json"], FACTS)
    status.start()
    folder.rename(tmp_path / "away")
    status.stage("compress", "3/9")
    (tmp_path / "away").rename(folder)
    wait_until(lambda: read(folder / "status.json").get("stage") == "compress", "the next beat")
    status.end(None)


def test_cost_is_price_by_time_and_absent_without_a_price(tmp_path: Path) -> None:
    assert "cost" not in Status([], FACTS).json()
    status = Status([], FACTS, price_per_hour=7.2)
    assert status.cost(1800) == 3.6
    assert status.json()["cost"] == pytest.approx(0, abs=0.01)


def test_the_supervisors_of_tools_are_named(tmp_path: Path) -> None:
    status = Status([], FACTS)
    with Process(["sleep", "60"], log=tmp_path / "log") as process:
        assert process.pid in status.json()["supervisors"]
    assert process.pid not in status.json().get("supervisors", [])


HOLDS = "import sys; held = bytearray({size}); print(1, flush=True); sys.stdin.readline()"


def test_memory_is_that_of_the_whole_tree_and_a_peak() -> None:
    memory = Memory(gpu=False)
    memory.sample()
    before = memory.json()["processes_peak_bytes"]
    assert before > 5e6
    with helper(HOLDS.format(size=200_000_000)) as child:
        child.read()
        assert 200e6 < resident_bytes(child.pid) < 260e6
        memory._next = 0.0
        memory.sample()
    during = memory.json()["processes_peak_bytes"]
    assert 190e6 < during - before < 300e6
    memory._next = 0.0
    memory.sample()
    assert memory.json()["processes_peak_bytes"] == during


def test_memory_is_measured_so_seldom_that_it_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(gpu=False)
    monkeypatch.setattr(module, "SAMPLE_SHARE", 1e-4)
    memory.sample()
    due = memory._next
    assert due > time.monotonic() + 1
    memory.sample()
    assert memory._next == due  # not yet
    monkeypatch.setattr(module, "SAMPLE_SHARE", 1.0)
    memory._next = 0.0
    memory.sample()
    assert memory._next < time.monotonic() + 1


# --- Prometheus ----------------------------------------------------------------------------------


def samples(path: Path) -> dict[tuple[str, ...], float]:
    """(name, label values but the recipe's) → value, by Prometheus' own parser."""
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "recipe")): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_the_textfile_is_what_the_collector_reads(tmp_path: Path) -> None:
    path = tmp_path / "textfile" / "quantize.prom"
    status = Status([], FACTS, price_per_hour=3.0, also=lambda said: write_metrics(path, said))
    status.start()
    assert ("quantize_stage_progress_ratio",) not in samples(path)  # not known: no sample
    progress = progress_of(status)
    with progress.stage('measure-"candidate"\n', 6, 9):
        progress.step("windows", 16, 64)
        wait_until(lambda: ("quantize_stage_progress_ratio",) in samples(path), "a beat")
        peak = ("quantize_peak_memory_bytes", "processes")
        wait_until(lambda: peak in samples(path), "a measurement")
        found = samples(path)
        assert found["quantize_stage_progress_ratio",] == 0.25
        assert (found["quantize_run_stage_index",], found["quantize_run_stages",]) == (6, 9)
        (info,) = (key for key in found if key[0] == "quantize_run_info")
        assert info[1:] == (platform.node(), "1.0", "/runs/tiny-1", 'measure-"candidate"\n')
        assert found[peak] > 5e6
        assert found["quantize_cost_total",] >= 0
        assert found["quantize_run_state", "running"] == 1
        assert abs(found["quantize_last_update_timestamp_seconds",] - time.time()) < 20
        assert ("quantize_exit_code",) not in found
    result = {
        "stages": [
            {"id": "compress", "state": "ran", "seconds": 12.5},
            {"id": "fetch", "state": "hit", "seconds": 0.0},
        ],
        "summary": {"size": {"ratio": 0.35}, "perplexity": {"ratio": 1.012}},
    }
    status.end(GateError("worse"), result)
    found = samples(path)
    assert found["quantize_exit_code",] == 7
    assert found["quantize_run_state", "failed"] == 1
    assert found["quantize_run_state", "running"] == 0
    assert found["quantize_stage_seconds", "compress"] == 12.5
    assert ("quantize_stage_seconds", "fetch") not in found
    assert (found["quantize_perplexity_ratio",], found["quantize_size_ratio",]) == (1.012, 0.35)
    assert [entry.name for entry in path.parent.iterdir()] == ["quantize.prom"]  # nothing beside it


def test_a_name_that_the_collector_would_not_read() -> None:
    check_name(Path("a/quantize.prom"))
    with pytest.raises(UsageError, match=r"named \*\.prom alone") as caught:
        check_name(Path("a/quantize.txt"))
    assert caught.value.hint == "name it a/quantize.prom"


def test_nobody_pays_for_metrics_without_asking() -> None:
    code = "import sys, quantize.session; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
