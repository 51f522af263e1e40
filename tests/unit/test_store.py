"""Complete or absent, whatever dies when; damage is noticed; locks die with their run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from child_process import alive, helper, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import store as module
from quantize.errors import ResourceError, ToolError
from quantize.hash_cache import HashCache
from quantize.housekeeping import collect_garbage
from quantize.store import KEEP_RUNS, MANIFEST, Artifact, Staging, Store

KIND, KEY = "compress", "c0ffee"
TREE = {"model/config.json": b"{}", "model/weights.bin": b"\x00\x01\x02\x03", "compress.json": b"1"}


def write(folder: Path, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(artifact: Artifact) -> dict[str, bytes]:
    return {entry.name: artifact.file(entry.name).read_bytes() for entry in artifact.manifest.files}


def commit(store: Store, staging: Staging) -> Artifact:
    return store.commit(
        staging,
        key_inputs={"stage": KIND, "inputs": {}},
        recipe="r",
        seconds={"total": 1.0},
        versions={"tool": "1.2"},
        notes=("a note",),
    )


def make(store: Store, tree: dict[str, bytes] = TREE, key: str = KEY) -> Artifact:
    with store.staging(KIND, key) as staging:
        write(staging.files, tree)
        return commit(store, staging)


def staged(store: Store, key: str = KEY) -> Path:
    return store.root / KIND / ".staging" / key


def test_what_is_committed_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(KIND, KEY) is None
    made = make(store)
    found = store.get(KIND, KEY)
    assert found is not None
    assert found.manifest.files == made.manifest.files
    assert found.manifest == module.Manifest.load(found.path / MANIFEST)
    assert found.manifest.notes == ("a note",)
    assert found.manifest.total_bytes == 7
    assert read(found) == TREE
    assert found.json("compress.json") == 1
    with pytest.raises(KeyError):
        found.file("model/other.bin")
    assert not staged(store).exists()


segment = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..", MANIFEST))
name = st.lists(segment, min_size=1, max_size=3).map("/".join)


def is_tree(names: set[str]) -> bool:
    """No name is a file here and a folder there."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    return not folders & names


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(name, st.binary(max_size=40), max_size=6).filter(lambda t: is_tree(set(t))))
def test_any_tree_round_trips(tree: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        make(store, tree)
        found = store.get(KIND, KEY)
        assert found is not None
        assert read(found) == tree
        assert found.damage(hash_files=True) == []


# --- complete or absent -------------------------------------------------------------------------


def no_manifest(store: Store) -> None:
    write(store.path(KIND, KEY), {"model/half": b"half"})


def flipped(store: Store) -> None:
    made = make(store)
    made.file("model/weights.bin").write_bytes(b"\x00\x01\x02\xff")


@pytest.mark.parametrize("before", [lambda store: None, no_manifest, flipped])
def test_killed_between_any_two_steps_of_a_commit(
    before: Callable[[Store], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is copied around every call that reaches the disk; each copy is a kill."""
    store = Store(tmp_path / "store")
    before(store)
    copies: list[Path] = []

    def copied(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for moment in ("before", "after"):
                target = tmp_path / f"{len(copies)}-{moment}-{call.__name__}"
                copies.append(target)
                shutil.copytree(store.root, target, symlinks=True)
                if moment == "before":
                    result = call(*args, **kwargs)
            return result

        return wrapper

    with store.staging(KIND, KEY) as staging:
        write(staging.files, TREE)
        (staging.work / "progress").write_text("half way")
        with monkeypatch.context() as patch:
            for function in ("fsync", "rename", "replace"):
                patch.setattr(os, function, copied(getattr(os, function)))
            commit(store, staging)
    assert len(copies) > 12
    complete = 0
    for copy in copies:
        killed = Store(copy)
        found = killed.get(KIND, KEY)
        if found is not None and not found.damage(hash_files=True):
            assert read(found) == TREE
            complete += 1
        else:
            # the next run starts with empty files and the scratch space of the last one
            with killed.staging(KIND, KEY) as staging:
                assert list(staging.files.iterdir()) == []
                assert (staging.work / "progress").read_text() == "half way"
                write(staging.files, TREE)
                commit(killed, staging)
            again = killed.get(KIND, KEY)
            assert again is not None
            assert again.damage(hash_files=True) == []
            assert read(again) == TREE
    assert 0 < complete < len(copies)


def entry_without_size(manifest: dict[str, Any]) -> None:
    del manifest["files"][0]["bytes"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("schema"),
        lambda manifest: manifest.update(schema=2),
        lambda manifest: manifest.update(files=7),
        lambda manifest: manifest.update(unknown=1),
        lambda manifest: manifest.update(key="another"),
        lambda manifest: manifest.update(kind="fetch"),
        entry_without_size,
    ],
)
def test_a_manifest_of_another_kind_is_no_hit(
    spoil: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    path = make(store).path / MANIFEST
    value = json.loads(path.read_text())
    spoil(value)
    path.write_text(json.dumps(value))
    assert store.get(KIND, KEY) is None
    assert list(store.artifacts()) == []
    assert list(store.manifests(KIND)) == []
    assert read(make(store)) == TREE  # and is made again


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"5", b"{}", b"\xff\xfe", b'{"files": '])
def test_a_spoilt_manifest_is_no_hit(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    (make(store).path / MANIFEST).write_bytes(content)
    assert store.get(KIND, KEY) is None


def test_a_cut_manifest_is_no_hit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = make(store).path / MANIFEST
    text = path.read_bytes().rstrip()
    for length in range(0, len(text), 7):
        path.write_bytes(text[:length])
        assert store.get(KIND, KEY) is None


def test_a_copied_folder_is_no_hit_under_the_other_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shutil.copytree(make(store).path, store.path(KIND, "other"))
    assert store.get(KIND, "other") is None
    assert [artifact.manifest.key for artifact in store.artifacts()] == [KEY]


def test_stray_files_beside_artifacts_do_no_harm(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / KIND / "notes.txt").write_text("mine")
    (tmp_path / KIND / "empty").mkdir()
    assert [artifact.path for artifact in store.artifacts()] == [made.path]
    assert [manifest.key for manifest in store.manifests(KIND)] == [KEY]
    assert store.get(KIND, "notes.txt") is None
    assert list(Store(tmp_path / "nowhere").artifacts()) == []


def test_failed_work_is_scratch_for_the_next_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.staging(KIND, KEY) as staging:
        write(staging.files, {"half": b"1"})
        (staging.work / "layer-3").write_text("done")
        raise ZeroDivisionError
    assert store.get(KIND, KEY) is None
    with store.staging(KIND, KEY) as staging:
        assert list(staging.files.iterdir()) == []
        assert (staging.work / "layer-3").read_text() == "done"


def test_a_second_commit_keeps_the_first_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store, {"a": b"1"})
    make(store, {"a": b"2"})
    found = store.get(KIND, KEY)
    assert found is not None
    assert read(found) == {"a": b"2"}
    (aside,) = store.leftovers()
    assert (aside / "a").read_bytes() == b"1"
    assert [artifact.path for artifact in store.artifacts()] == [found.path]


def link(files: Path) -> None:
    (files / "a").symlink_to("/etc/hostname")


def linked_folder(files: Path) -> None:
    (files / "a").symlink_to(files.parent / "work")


def dangling(files: Path) -> None:
    (files / "a").symlink_to("nowhere")


def fifo(files: Path) -> None:
    os.mkfifo(files / "a")


def own_manifest(files: Path) -> None:
    (files / MANIFEST).write_text("{}")


@pytest.mark.parametrize("spoil", [link, linked_folder, dangling, fifo, own_manifest])
def test_an_artifact_consists_of_regular_files(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(ToolError, match="cannot be part"), store.staging(KIND, KEY) as staging:
        write(staging.files, TREE)
        spoil(staging.files)
        commit(store, staging)
    assert store.get(KIND, KEY) is None


# --- damage -------------------------------------------------------------------------------------

WEIGHTS = "model/weights.bin"


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty_folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def add(path: Path) -> None:
    path.with_name("extra.bin").write_bytes(b"")


def add_link(path: Path) -> None:
    path.with_name("extra").symlink_to(path.parent)


DAMAGES = [
    (remove, "model/weights.bin is missing"),
    (flip, "model/weights.bin has other content"),
    (truncate, "model/weights.bin has 3 bytes, not 4"),
    (empty_folder_instead, "model/weights.bin is missing"),
    (add, "model/extra.bin was added"),
    (add_link, "model/extra was added"),
]


@pytest.mark.parametrize(("spoil", "expected"), DAMAGES)
def test_damage_is_found(spoil: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = make(store)
    assert store.damage(artifact) == []
    spoil(artifact.file(WEIGHTS))
    (problem,) = store.damage(artifact)
    assert problem.startswith(expected)


class Hashed(HashCache):
    """Counts the bytes that are read."""

    def __init__(self, path: Path, settle_seconds: float = -1e9) -> None:
        self.read_bytes: list[int] = []
        super().__init__(
            path,
            settle_seconds=settle_seconds,
            on_hashed=lambda done, total: self.read_bytes.append(done),
        )


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERIFY_ON_READ_BYTES", 6)  # the tree has 7


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("spoil", "expected"), DAMAGES)
def test_damage_of_a_large_artifact_is_found(
    spoil: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", Hashed(tmp_path / "hashes.json"))
    artifact = make(store)
    assert store.damage(artifact) == []
    spoil(artifact.file(WEIGHTS))
    (problem,) = store.damage(artifact)
    assert problem.startswith(expected)
    again = Store(tmp_path / "store", Hashed(tmp_path / "hashes.json"))  # the next process
    assert again.damage(artifact) == [problem]


@pytest.mark.usefixtures("large")
def test_a_large_artifact_is_read_once(tmp_path: Path) -> None:
    hashes = Hashed(tmp_path / "hashes.json")
    store = Store(tmp_path / "store", hashes)
    artifact = make(store)
    assert store.damage(artifact) == []
    assert hashes.read_bytes == []  # the commit has read it
    (tmp_path / "hashes.json").unlink()
    hashes = Hashed(tmp_path / "hashes.json")
    assert Store(store.root, hashes).damage(artifact) == []
    assert max(hashes.read_bytes) == artifact.manifest.total_bytes
    hashes = Hashed(tmp_path / "hashes.json")
    assert Store(store.root, hashes).damage(artifact) == []
    assert hashes.read_bytes == []


@pytest.mark.usefixtures("large")
def test_what_was_written_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    hashes = Hashed(tmp_path / "hashes.json", settle_seconds=3600)
    store = Store(tmp_path / "store", hashes)
    artifact = make(store)
    for _ in range(2):
        hashes.read_bytes.clear()
        assert store.damage(artifact) == []
        assert max(hashes.read_bytes) == artifact.manifest.total_bytes


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("shift", [-(10**9), 10**9])  # seconds, before 1995 and after 2058
def test_a_flip_is_found_whatever_the_clock_and_the_files_times_say(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times can be set back to what they were, but for ctime, which is the kernel's."""
    store = Store(tmp_path / "store", Hashed(tmp_path / "hashes.json"))
    artifact = make(store)
    path = artifact.file(WEIGHTS)
    before = path.stat()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + shift * 10**9)
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.damage(artifact)


def test_every_byte_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = make(store, {"weights": bytes(range(64))})
    path = artifact.file("weights")
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 128]) + good[position + 1 :])
        assert store.damage(artifact), position
    path.write_bytes(good)
    assert store.damage(artifact) == []


def test_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store)
    aside = store.set_aside(KIND, KEY)
    assert store.get(KIND, KEY) is None
    assert not made.path.exists()
    assert (aside / WEIGHTS).read_bytes() == TREE[WEIGHTS]
    assert list(store.leftovers()) == [aside]
    make(store)
    assert store.set_aside(KIND, KEY) != aside


# --- many processes -----------------------------------------------------------------------------

HOLD = """
import subprocess, sys
from pathlib import Path
from quantize.store import Store
store = Store(Path(sys.argv[1]))
with store.staging("compress", "c0ffee") as staging:
    (staging.files / "half").write_text("half")
    (staging.work / "progress").write_text("layer 3")
    child = subprocess.Popen(["sleep", "60"])  # outlives a SIGKILL of its parent
    print(child.pid, flush=True)
    sys.stdin.readline()
    child.kill()
    store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})
print("committed", flush=True)
"""


def test_the_second_process_waits_and_finds_the_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with helper(HOLD, tmp_path) as holder:
        holder.read()
        waited: list[bool] = []

        def on_wait() -> None:
            waited.append(store.get(KIND, KEY) is None)
            holder.say()

        with store.staging(KIND, KEY, on_wait=on_wait):
            found = store.get(KIND, KEY)
            assert found is not None
            assert read(found) == {"half": b"half"}
        assert waited == [True]
        assert holder.read() == "committed"
    assert not staged(store).exists()  # the hit left no scratch folder behind
    assert list(store.leftovers()) == []


def test_a_wait_has_an_end(tmp_path: Path) -> None:
    with helper(HOLD, tmp_path) as holder:
        holder.read()
        with (
            pytest.raises(ResourceError, match="another run has held compress c0ffee") as caught,
            Store(tmp_path).staging(KIND, KEY, wait_seconds=0.1),
        ):
            pass
        assert "end the other run" in caught.value.hint


def test_a_lock_dies_with_its_killed_holder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with helper(HOLD, tmp_path) as holder:
        child = int(holder.read())
        assert list(store.leftovers()) == []  # it lives
        holder.kill()
        assert alive(child)  # and has inherited no lock
        assert list(store.leftovers()) == [staged(store)]
        with store.staging(KIND, KEY, wait_seconds=0) as staging:
            assert list(staging.files.iterdir()) == []
            assert (staging.work / "progress").read_text() == "layer 3"
            assert list(store.leftovers()) == []


def test_a_leftover_cannot_be_taken_up_while_it_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with helper(HOLD, tmp_path) as holder:
        holder.read()
        holder.kill()
    found = store.leftovers()
    assert next(found) == staged(store)
    with pytest.raises(ResourceError), store.staging(KIND, KEY, wait_seconds=0):
        pass
    assert list(found) == []
    with store.staging(KIND, KEY, wait_seconds=0):
        pass


def test_garbage_is_collected_but_not_from_under_a_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = make(store, key="kept")
    make(store, key="damaged")
    aside = store.set_aside(KIND, "damaged")
    with helper(HOLD, tmp_path) as holder:
        holder.read()
        assert [path for path, _ in collect_garbage(tmp_path, (), dry_run=True)] == [aside]
        assert aside.exists()
        assert [path for path, _ in collect_garbage(tmp_path, (), dry_run=False)] == [aside]
        assert (staged(store) / "work" / "progress").exists()
        holder.kill()
    ((path, size),) = collect_garbage(tmp_path, (), dry_run=False)
    assert (path, size) == (staged(store), len("half") + len("layer 3"))
    assert not path.exists()
    assert not aside.exists()
    assert [artifact.path for artifact in store.artifacts()] == [kept.path]


RACE = """
import sys
from pathlib import Path
from quantize.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for key in "abcdefgh":
    with store.staging("compress", key) as staging:
        if store.get("compress", key) is None:
            (staging.files / "by").write_text(sys.argv[2])
            print(key, flush=True)
            store.commit(staging, key_inputs={}, recipe="r", seconds={}, versions={})
print("done", flush=True)
"""


def test_each_artifact_is_made_once_by_racing_processes(tmp_path: Path) -> None:
    with helper(RACE, tmp_path, 0) as one, helper(RACE, tmp_path, 1) as two:
        racers = (one, two)
        for racer in racers:
            assert racer.read() == "ready"
        for racer in racers:
            racer.say()
        made = {}
        for number, racer in enumerate(racers):
            while (line := racer.read()) != "done":
                assert line not in made
                made[line] = number
    assert sorted(made) == list("abcdefgh")
    store = Store(tmp_path)
    for artifact in store.artifacts():
        assert artifact.damage(hash_files=True) == []
        assert artifact.file("by").read_text() == str(made[artifact.manifest.key])
    wait_until(lambda: not list(store.leftovers()), "the scratch folders to go")


def test_gc_keeps_the_newest_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(KEEP_RUNS + 2):
        folder = tmp_path / ".runs" / f"run-{number}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        os.utime(folder, (number, number))
    removed = [path.name for path, _ in collect_garbage(tmp_path, (), dry_run=False)]
    assert removed == ["run-0", "run-1"]
    assert len(list((tmp_path / ".runs").iterdir())) == KEEP_RUNS
    assert store.old_runs() == []
