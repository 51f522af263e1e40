"""The store against a model of it: any sequence of commits, damage, hits, repairs and collections.

The model knows what was committed last under each key, and whether somebody has touched it since.
Whatever happens: a hit that is sound has the bytes that were committed last; what was touched is
found; and an artifact that was not touched is never lost.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from child_process import Helper
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quantize import store as module
from quantize.cli import main
from quantize.errors import SourceError
from quantize.hash_cache import HashCache
from quantize.store import MANIFEST, Store

KIND = "compress"
keys = st.sampled_from("abc")
contents = st.binary(min_size=1, max_size=24)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 1
    path.write_bytes(bytes(raw))


def truncate(path: Path, at: int) -> None:
    os.truncate(path, at % path.stat().st_size)


def remove(path: Path, at: int) -> None:
    path.unlink()


def add(path: Path, at: int) -> None:
    (path.parent / f"extra-{at}").write_bytes(b"")


def empty_manifest(path: Path, at: int) -> None:
    (path.parent / MANIFEST).write_bytes(b"")


def cut_manifest(path: Path, at: int) -> None:
    truncate(path.parent / MANIFEST, at)


def other_schema(path: Path, at: int) -> None:
    manifest = path.parent / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 2}))


def no_manifest(path: Path, at: int) -> None:
    (path.parent / MANIFEST).unlink()


def renamed_folder(path: Path, at: int) -> None:
    other = path.parent.with_name(f"{path.parent.name}-moved-{at}")
    if not other.exists():
        path.parent.rename(other)


DAMAGES: list[Callable[[Path, int], None]] = [
    flip,
    truncate,
    remove,
    add,
    empty_manifest,
    cut_manifest,
    other_schema,
    no_manifest,
    renamed_folder,
]


class Model(RuleBasedStateMachine):
    """One store, opened anew now and then, with and without a memory of what was hashed."""

    @initialize(large=st.booleans())
    def begin(self, large: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.limit = module.VERIFY_ON_READ_BYTES
        module.VERIFY_ON_READ_BYTES = 0 if large else self.limit
        self.committed: dict[str, bytes] = {}
        self.touched: set[str] = set()
        self.open()

    def teardown(self) -> None:
        module.VERIFY_ON_READ_BYTES = self.limit
        shutil.rmtree(self.folder)

    @rule()
    def open(self) -> None:
        """The next process."""
        hashes = HashCache(self.folder / "hashes.json", settle_seconds=-1e9)
        self.store = Store(self.folder / "store", hashes)

    def sound(self, key: str) -> bool:
        artifact = self.store.get(KIND, key)
        return artifact is not None and not self.store.damage(artifact)

    @rule(key=keys, content=contents)
    def run_stage(self, key: str, content: bytes) -> None:
        """As the executor: a sound hit is used, anything else is made anew."""
        with self.store.staging(KIND, key) as staging:
            if self.sound(key):
                assert key not in self.touched
                return
            (staging.files / "weights").write_bytes(content)
            self.store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})
        self.committed[key] = content
        self.touched.discard(key)

    @rule(key=keys, content=contents)
    def killed_before_the_commit(self, key: str, content: bytes) -> None:
        class Killed(Exception): ...

        with pytest.raises(Killed), self.store.staging(KIND, key) as staging:
            (staging.files / "weights").write_bytes(content)
            raise Killed

    @rule(key=keys, damage=st.sampled_from(DAMAGES), at=st.integers(0, 40))
    def damage(self, key: str, damage: Callable[[Path, int], None], at: int) -> None:
        path = self.store.path(KIND, key) / "weights"
        if key in self.committed and key not in self.touched:
            damage(path, at)
            self.touched.add(key)

    @rule(key=keys, seconds=st.integers(-(10**9), 10**9))
    def set_the_clock(self, key: str, seconds: int) -> None:
        """The file's times are what a wrong clock would have written: no damage."""
        path = self.store.path(KIND, key) / "weights"
        if path.is_file():
            os.utime(path, (10**9 + seconds, 10**9 + seconds))

    @rule()
    def collect_garbage(self) -> None:
        for path in self.store.leftovers():
            shutil.rmtree(path)

    @invariant()
    def what_was_committed_is_there_and_what_was_touched_is_known(self) -> None:
        if not hasattr(self, "committed"):
            return
        for key, content in self.committed.items():
            assert self.sound(key) == (key not in self.touched), key
            if key not in self.touched:
                assert (self.store.path(KIND, key) / "weights").read_bytes() == content


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


# --- several processes that die -----------------------------------------------------------------

RACER = """
import sys, time
from pathlib import Path
from quantize.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for round in range(10 ** 6):
    for key in "abcdef":
        with store.staging("compress", key) as staging:
            artifact = store.get("compress", key)
            if artifact is None or store.damage(artifact):
                for number in range(4):
                    (staging.files / f"part-{number}").write_text(key * 1000)
                store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})
"""


def test_processes_that_are_killed_at_random_never_corrupt_each_other(tmp_path: Path) -> None:
    """Two race, one dies and is replaced, someone damages; every look finds whole or absent."""
    store, chance = Store(tmp_path), random.Random(5)
    racers = [Helper(RACER, tmp_path) for _ in range(2)]
    try:
        for racer in racers:
            racer.read()
        for _ in range(25):
            time.sleep(chance.uniform(0.0, 0.08))
            victim = chance.randrange(2)
            racers[victim].kill()
            for artifact in store.artifacts():
                for entry in artifact.manifest.files:
                    path = artifact.path / entry.name
                    if path.exists():  # it may be set aside this moment, by the other one
                        assert path.read_text() == artifact.manifest.key * 1000
            shutil.rmtree(store.path("compress", chance.choice("abcdef")), ignore_errors=True)
            racers[victim] = Helper(RACER, tmp_path)
            racers[victim].read()
    finally:
        for racer in racers:
            racer.kill()
    for key in "abcdef":
        with store.staging("compress", key, wait_seconds=5):  # no lock outlives its process
            pass
    assert all(not artifact.damage(hash_files=True) for artifact in store.artifacts())


# --- a disk that fails --------------------------------------------------------------------------


def make(store: Store) -> Path:
    with store.staging(KIND, "a") as staging:
        (staging.files / "weights").write_bytes(b"weights")
        return store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={}).path


@pytest.mark.parametrize("large", [True, False])
def test_bytes_that_the_disk_has_lost_are_damage(
    large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERIFY_ON_READ_BYTES", 0 if large else 1 << 30)
    hashes = HashCache(tmp_path / "hashes.json")
    store = Store(tmp_path / "store", hashes)
    make(store)
    artifact = store.get(KIND, "a")
    assert artifact is not None

    def lost(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(module, "file_sha256", lost)
    monkeypatch.setattr("quantize.hash_cache.file_sha256", lost)
    (problem,) = store.damage(artifact)
    assert "cannot be read" in problem
    assert "weights" in problem

    def forbidden(path: Path) -> str:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(module, "file_sha256", forbidden)
    monkeypatch.setattr("quantize.hash_cache.file_sha256", forbidden)
    with pytest.raises((OSError, SourceError), match=r"Permission denied|cannot read"):
        store.damage(artifact)


def test_after_a_failed_sync_nothing_that_was_written_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with pytest.raises(OSError, match="Input/output"), store.staging(KIND, "a") as staging:
        (staging.work / "layer-0").write_text("in the page cache only")
        (staging.files / "weights").write_text("too")
        with monkeypatch.context() as patch:
            patch.setattr(module, "fsync", refuse)
            store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})
    assert store.get(KIND, "a") is None
    with store.staging(KIND, "a") as staging:
        assert list(staging.work.iterdir()) == []


def test_a_scratch_folder_that_cannot_be_emptied_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    folder = tmp_path / KIND / ".staging" / "a" / "files"
    folder.mkdir(parents=True)
    (folder / "old").write_text("of another run")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError), store.staging(KIND, "a"):
        raise AssertionError("it began")
    monkeypatch.undo()
    with store.staging(KIND, "a", wait_seconds=1):
        pass


def test_scratch_of_a_run_that_was_killed_after_its_commit_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store)
    scratch = tmp_path / KIND / ".staging" / "a" / "work"
    scratch.mkdir(parents=True)
    (scratch / "hidden-3.bin").write_bytes(bytes(1000))
    store.drop_scratch(KIND, "a")
    assert not scratch.parent.exists()
    with store.staging(KIND, "a") as staging:
        store.drop_scratch(KIND, "a")  # another run works there
        assert staging.work.is_dir()


@pytest.mark.parametrize("spoil", [empty_manifest, cut_manifest, other_schema, no_manifest])
def test_a_folder_without_a_readable_manifest_is_named_by_verify(
    spoil: Callable[[Path, int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    path = make(store)
    assert list(store.unreadable()) == []
    spoil(path / "weights", 7)
    assert list(store.unreadable()) == [path]
    with pytest.raises(SystemExit) as caught:
        main.main(["store", "verify", "--store", str(tmp_path)])
    assert caught.value.code == 3
    assert f"{path}: no readable manifest" in capsys.readouterr().out
