"""Garbage is never collected from under a run, and a dead run keeps nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from child_process import helper

from quantize import housekeeping
from quantize.housekeeping import collect_garbage
from quantize.in_use import announced, collecting
from quantize.locks import lock_on
from quantize.plan import StageEntry
from quantize.store import KEEP_RUNS, Store

RUN = """
import sys
from pathlib import Path
from quantize.in_use import announced
root = Path(sys.argv[1])
waits = lambda: print("waits", flush=True)
sys.stdin.readline()
with announced(root, [("compress", "used")], root / ".runs" / "mine", waits):
    print("runs", flush=True)
    sys.stdin.readline()
"""


class Plan:
    """What a recipe to keep uses."""

    stages = (StageEntry("compress", "compress", "kept", {}, {}),)


class Session:
    plan = Plan()

    @classmethod
    def open(cls, *_: object, **__: object) -> Session:
        return cls()


def make(store: Store, key: str) -> Path:
    with store.staging("compress", key) as staging:
        (staging.files / "weights").write_text(key)
        made = store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})
        return made.path


def test_a_run_that_ends_while_it_is_looked_at(tmp_path: Path) -> None:
    """Its list is gone and its lock is still held."""
    runs = tmp_path / ".locks" / "runs"
    runs.mkdir(parents=True)
    (runs / "a.json").symlink_to("gone")
    with lock_on(runs / "a.lock"), collecting(tmp_path) as in_use:
        assert not in_use.artifacts


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(housekeeping, "Session", Session)
    store = Store(tmp_path / "store")
    for key in ("kept", "used", "unused"):
        make(store, key)
    return store


def keys(store: Store) -> set[str]:
    return {artifact.manifest.key for artifact in store.artifacts()}


def test_what_a_run_uses_is_kept_until_it_dies(store: Store) -> None:
    with helper(RUN, store.root) as run:
        run.say("begin")
        assert run.read() == "runs"
        list(collect_garbage(store.root, ["recipe"], dry_run=False))
        assert keys(store) == {"kept", "used"}
        run.kill()
    list(collect_garbage(store.root, ["recipe"], dry_run=False))
    assert keys(store) == {"kept"}
    assert list((store.root / ".locks" / "runs").iterdir()) == []


def test_a_finished_run_leaves_nothing(store: Store) -> None:
    with announced(store.root, [("compress", "used")], store.root / ".runs" / "mine"):
        with collecting(store.root) as found:
            pass
        assert found.artifacts == {("compress", "used")}
    assert list((store.root / ".locks" / "runs").iterdir()) == []


def test_a_run_that_begins_during_a_collection_waits(store: Store) -> None:
    with helper(RUN, store.root) as run:
        with collecting(store.root) as found:
            run.say("begin")
            assert run.read() == "waits"
            time.sleep(0.2)
            assert found.artifacts == frozenset()
            assert list((store.root / ".locks" / "runs").iterdir()) == []
        assert run.read() == "runs"


def test_the_logs_of_a_run_under_way_are_kept_however_old_they_look(store: Store) -> None:
    runs = store.root / ".runs"
    for number in range(KEEP_RUNS + 2):
        (runs / f"run-{number}").mkdir(parents=True)
    (runs / "mine").mkdir()
    os.utime(runs / "mine", (0, 0))  # begun while the clock was wrong
    with helper(RUN, store.root) as run:
        run.say("begin")
        assert run.read() == "runs"
        list(collect_garbage(store.root, (), dry_run=False))
        assert (runs / "mine").is_dir()
        run.kill()
    list(collect_garbage(store.root, (), dry_run=False))
    assert not (runs / "mine").exists()
