"""The publish stage: to a folder, and to a loopback Hub through the real client."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_fixture import TOKEN, hub_server, online

from quantize.environments import Environments
from quantize.errors import ConflictError, CredentialsError, ResourceError, SourceError, ToolError
from quantize.execute import Outcome, places
from quantize.folder_target import publish_folder
from quantize.listing import LISTING, parse_listing
from quantize.plan import StageEntry
from quantize.progress import LineView, Progress
from quantize.quantization import Quantize
from quantize.recipe import Model, Recipe
from quantize.recipe_file import load_recipe
from quantize.runner import Runner
from quantize.stages import publish
from quantize.stages.base import Resolved, StageContext
from quantize.store import Artifact, FileEntry, Store
from quantize.targets import Hub, Publish

WEIGHTS = bytes(range(256)) * 40
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
MODEL = {
    "model/model.safetensors": WEIGHTS,
    "model/config.json": b"{}\n",
    "model/README.md": b"the source's card\n",
    "compress.json": b"{}\n",
}
PUBLISHED = {"model.safetensors": WEIGHTS, "config.json": b"{}\n", "README.md": CARD}


def recipe(folder: str | None = "out/tiny", hub: Hub | None = None) -> Recipe:
    return Recipe(
        version=1,
        name="tiny",
        model=Model(source="../checkpoints/tiny"),
        quantize=Quantize(method="rtn"),
        publish=Publish(folder=folder, hub=hub),
    )


def artifact(store: Store, kind: str, contents: Mapping[str, bytes]) -> Artifact:
    with store.staging(kind, "0" * 64) as staging:
        for name, content in contents.items():
            (staging.files / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.files / name).write_bytes(content)
        return store.commit(staging, key_inputs={}, recipe="tiny", seconds={}, versions={})


def card_record(values: Mapping[str, object]) -> bytes:
    """Of a card's record what publishing reads."""
    record = {
        "quantize": "1.0",
        "recipe": values,
        "source_name": "tiny",
        "source": {"kind": "folder", "files": []},
        "artifacts": {"fetch": "f" * 64},
        "key_inputs": {"fetch": {"code": 1, "locks": {}, "with": {"model": "a" * 64}}},
        "versions": {},
    }
    return json.dumps(record).encode()


class Stage:
    """Runs the stage as the executor does, on artifacts in a real store."""

    def __init__(self, root: Path, contents: Mapping[str, bytes] = MODEL) -> None:
        self.root, self.store = root, Store(root / "store")
        values = recipe().model_dump(mode="json", exclude={"publish", "environments", "machine"})
        record = card_record(values)
        self.compress = artifact(self.store, "compress", contents)
        self.card = artifact(self.store, "card", {"README.md": CARD, "record.json": record})
        self.lines: list[str] = []

    def resolved(self, made: Recipe) -> Resolved:
        paths = {"model": self.root / "checkpoints" / "tiny"}
        return Resolved(made, self.root, "cpu", digests={}, paths=paths)

    def run(self, made: Recipe, key: str = "1" * 64) -> Artifact:
        progress = Progress(LineView(self.lines.append))
        runner = Runner(Environments("cpu", self.root / "cache"), self.root / "logs", progress)
        with self.store.staging("publish", key) as staging:
            context = StageContext(
                entry=StageEntry("publish", "publish", key, {}),
                resolved=self.resolved(made),
                inputs={"compress": self.compress, "card": self.card},
                files=staging.files,
                work=staging.work,
                runner=runner,
                store=self.store,
            )
            publish.run(context)
            return self.store.commit(
                staging, key_inputs={}, recipe="tiny", seconds={}, versions=context.versions
            )


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    online(monkeypatch)
    return Stage(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def target_of(made: Artifact) -> dict[str, object]:
    [target] = made.json("receipt.json")["targets"]
    return dict(target)


def test_a_folder_gets_the_checkpoint_its_card_and_a_listing(stage: Stage) -> None:
    target = target_of(stage.run(recipe()))
    folder = Path("out/tiny").absolute()
    found = contents(folder)
    listing = parse_listing(found[LISTING].decode(), "it")
    assert listing.keys() == found.keys() - {LISTING}
    assert all(entry.bytes == len(found[name]) for name, entry in listing.items())
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert found["quantize/record.json"] == stage.card.file("record.json").read_bytes()
    total = sum(len(content) for content in found.values())
    assert target == {
        "kind": "folder",
        "path": str(folder),
        "files": len(found),
        "bytes": total,
        "changed": True,
    }
    assert os.listdir("out") == ["tiny"]


def test_the_published_recipe_loads_and_names_no_path(stage: Stage) -> None:
    stage.run(recipe())
    file = Path("out/tiny/quantize/recipe.yaml")
    found = load_recipe(file)
    assert found == recipe(folder=None).model_copy(update={"model": Model(source="tiny")})
    assert str(stage.root).encode() not in b"".join(contents(Path("out/tiny")).values())


def test_edits_in_the_folder_do_not_reach_the_store(stage: Stage) -> None:
    stage.run(recipe())
    Path("out/tiny/config.json").write_bytes(b"edited")
    assert stage.compress.damage(hash_files=True) == []


def test_publishing_the_same_again_writes_nothing(stage: Stage) -> None:
    stage.run(recipe())
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert target_of(stage.run(recipe(), key="2" * 64))["changed"] is False
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_a_later_publish_replaces_an_earlier_one(stage: Stage, tmp_path: Path) -> None:
    stage.run(recipe())
    later = Stage(tmp_path / "later", {"model/a.safetensors": b"a", "model/config.json": b"[]"})
    assert target_of(later.run(recipe()))["changed"] is True
    found = contents(Path("out/tiny"))
    assert found["a.safetensors"] == b"a"
    assert "model.safetensors" not in found
    assert os.listdir("out") == ["tiny"]


@pytest.mark.parametrize("also_published", [False, True])
def test_files_of_others_are_not_touched(stage: Stage, also_published: bool) -> None:
    if also_published:
        stage.run(recipe())
    thesis = Path("out/tiny/thesis.tex")
    thesis.parent.mkdir(parents=True, exist_ok=True)
    thesis.write_text("ten years of work")
    before = contents(Path("out/tiny"))
    stage.card = artifact(
        stage.store, "card", {"README.md": b"new", "record.json": card_record({})}
    )
    with pytest.raises(ConflictError, match=r"thesis\.tex") as caught:
        stage.run(recipe(), key="2" * 64)
    assert caught.value.exit_code == 6
    assert "move it away" in caught.value.hint
    assert contents(Path("out/tiny")) == before
    assert os.listdir("out") == ["tiny"]


def test_a_file_in_the_folders_place_is_a_conflict(stage: Stage) -> None:
    Path("out").mkdir()
    Path("out/tiny").write_text("a file")
    with pytest.raises(ConflictError, match="is not a folder"):
        stage.run(recipe())
    assert Path("out/tiny").read_text() == "a file"


def test_a_changed_publish_is_moved_aside_and_made_again(stage: Stage) -> None:
    made = stage.run(recipe())
    resolved = stage.resolved(recipe())
    assert publish.stale(resolved, "publish", made) is None
    weights = Path("out/tiny/model.safetensors")
    weights.write_bytes(WEIGHTS[:-1] + b"!")
    reason = publish.stale(resolved, "publish", made)
    assert reason == "out/tiny was changed: model.safetensors has other content (sha256 differs)"
    stage.run(recipe(), key="2" * 64)
    assert weights.read_bytes() == WEIGHTS
    assert Path("out/tiny.changed-1/model.safetensors").read_bytes() == WEIGHTS[:-1] + b"!"
    assert any("had been changed" in line for line in stage.lines)
    assert publish.stale(resolved, "publish", made) is None


def test_a_finished_publish_knows_when_it_is_not_there_any_more(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage.run(recipe())
    resolved = stage.resolved(recipe())
    Path("out/tiny/notes.txt").write_text("mine")  # no reason to publish again
    assert publish.stale(resolved, "publish", made) is None
    Path("out/tiny/config.json").unlink()
    assert (
        publish.stale(resolved, "publish", made) == "out/tiny was changed: config.json is missing"
    )
    Path("out/tiny/quantize/manifest.json").write_text("{}")
    assert publish.stale(resolved, "publish", made) == "out/tiny holds another publish"
    monkeypatch.chdir(tmp_path)
    assert publish.stale(resolved, "publish", made) == "out/tiny is not there any more"
    assert publish.stale(stage.resolved(recipe(folder=None)), "publish", made) is None


def test_a_damaged_artifact_is_not_published(stage: Stage) -> None:
    path = stage.compress.file("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(SourceError, match="sha256 differs"):
        stage.run(recipe())
    assert list(Path("out").iterdir()) == []


def test_a_folder_that_cannot_be_written(stage: Stage) -> None:
    Path("out").write_text("a file where the parent folder should be")
    with pytest.raises(ResourceError, match="cannot publish to"):
        stage.run(recipe())


def _publish_slowly(target: Path, source: Path, lock: Path, started: Path) -> None:
    def on_progress(done: int, total: int) -> None:
        started.touch()
        time.sleep(60)

    publish_folder(target, [FileEntry("a", 1, "0" * 64)], {"a": source}, lock, on_progress)


def test_what_a_killed_run_left_is_cleaned_up(stage: Stage, tmp_path: Path) -> None:
    stage.run(recipe())
    earlier = contents(Path("out/tiny"))
    source, started = tmp_path / "a", tmp_path / "started"
    source.write_bytes(b"a")
    target = Path("out/tiny").resolve()
    arguments = (target, source, tmp_path / "lock", started)
    child = multiprocessing.get_context("spawn").Process(target=_publish_slowly, args=arguments)
    child.start()
    while not started.exists():
        assert child.is_alive()
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert sorted(os.listdir("out")) == [".tiny.quantize-new", "tiny"]
    assert contents(Path("out/tiny")) == earlier
    assert target_of(stage.run(recipe(), key="2" * 64))["changed"] is False
    assert os.listdir("out") == ["tiny"]


def test_a_run_killed_between_the_two_renames_loses_nothing(stage: Stage) -> None:
    stage.run(recipe())
    earlier = contents(Path("out/tiny"))
    os.rename("out/tiny", "out/.tiny.quantize-old")
    path = stage.compress.file("model/model.safetensors")
    path.write_bytes(b"damaged")
    with pytest.raises(SourceError):
        # Even a run that fails puts the earlier publish back where it was.
        stage.card = artifact(
            stage.store, "card", {"README.md": b"new", "record.json": card_record({})}
        )
        stage.run(recipe(), key="2" * 64)
    assert contents(Path("out/tiny")) == earlier
    assert os.listdir("out") == ["tiny"]


def test_folder_and_hub_hold_the_same(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    both = recipe(hub=Hub(repo="ann/tiny"))
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        made = stage.run(both)
        repo = server.hub.repos["model", "ann/tiny"]
        tree = repo.tree("main")
        on_the_hub = {name: tree[name].content for name in tree if name != ".gitattributes"}
        assert on_the_hub == contents(Path("out/tiny"))
        assert repo.messages == ["initial commit", "Publish tiny"]
        target = made.json("receipt.json")["targets"][1]
        commit = repo.branches["main"]
        assert (target["kind"], target["commit"], target["changed"]) == ("hub", commit, True)
        again = stage.run(both, key="2" * 64).json("receipt.json")["targets"]
        assert [target["changed"] for target in again] == [False, False]
        assert server.count("POST .*/commit/") == 1
        other = publish.key_inputs(stage.resolved(both), "publish")["hub"]["endpoint"]
        assert other == server.endpoint
    for path in stage.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_url_holds_the_same_as_the_folder(stage: Stage) -> None:
    url = f"file://{stage.root}/mount/tiny"
    given = recipe().model_copy(update={"publish": Publish(folder="out/tiny", url=url)})
    made = stage.run(given)
    found = contents(Path("out/tiny"))
    assert contents(stage.root / "mount" / "tiny") == found
    target = made.json("receipt.json")["targets"][1]
    total = sum(len(content) for content in found.values())
    expected = {"kind": "url", "url": url, "files": len(found), "bytes": total, "changed": True}
    assert target == expected
    assert "fsspec" in made.manifest.versions
    again = stage.run(given, key="2" * 64).json("receipt.json")["targets"]
    assert [target["changed"] for target in again] == [False, False]
    shown = places(Outcome(artifacts={"publish": made}), stage.root)
    assert shown["published (url)"] == url


def test_pull_request_and_collection_are_in_the_receipt_and_notes_are_shown(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.hub.create("model", "ann/tiny", private=False)
        slug = server.hub.create_collection("Small", "ann").slug
        hub = Hub(repo="ann/tiny", allow_public=True, pull_request=True, collection=slug)
        target = target_of(stage.run(recipe(folder=None, hub=hub)))
        pull_request = f"{server.endpoint}/ann/tiny/discussions/1"
        assert (target["url"], target["pull_request"]) == (pull_request, pull_request)
        assert target["collection"] == slug
        assert "tag" not in target
        assert any("is public, the recipe says private: true" in line for line in stage.lines)
        server.hub.repos["model", "ann/tiny"].merge(1)
        hub = Hub(repo="ann/tiny", private=False, tag="v1")
        target = target_of(stage.run(recipe(folder=None, hub=hub), key="2" * 64))
        assert (target["changed"], target["tag"]) == (False, "v1")
        assert server.hub.repos["model", "ann/tiny"].tags == {"v1": target["commit"]}


def test_a_local_source_does_not_go_to_a_public_repository_unsaid(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.hub.create("model", "ann/tiny", private=False)
        with pytest.raises(ConflictError, match=r"but publish\.hub\.private is true"):
            stage.run(recipe(folder=None, hub=Hub(repo="ann/tiny")))
        assert server.hub.repos["model", "ann/tiny"].messages == ["initial commit"]


@pytest.mark.parametrize("name", ["model/.cache/x.json", "model/.env"])
def test_a_hidden_file_of_the_artifact_is_published_nowhere(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path, {**MODEL, name: b"secret"})
    with pytest.raises(ToolError, match="hidden files never are"):
        stage.run(recipe(folder=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_symlink_in_the_artifact_is_not_followed(stage: Stage) -> None:
    path = stage.compress.file("model/config.json")
    path.rename(stage.root / "elsewhere")
    path.symlink_to(stage.root / "elsewhere")
    with pytest.raises(SourceError, match=r"config\.json is a symlink"):
        stage.run(recipe())
    assert not Path("out").exists()


def test_the_hub_without_a_token(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stage.root / "no-token"))
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        with pytest.raises(CredentialsError, match="needs a token"):
            stage.run(recipe(folder=None, hub=Hub(repo="ann/tiny")))
        assert server.seen == []
