"""What is sent is what was checked: sha256, symlinks, hidden files, a remote .gitignore."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_fixture import (
    CONTENTS,
    MESSAGE,
    TARGET,
    access,
    hub_server,
    messages,
    online,
    publish,
    remote,
    repository,
    write_files,
)

from quantize.errors import ConflictError, SourceError, ToolError
from quantize.hub.push import push
from quantize.listing import LISTING
from tests.hub_server import Fault, Hub
from tests.hub_server.repos import File

BIG = b"\1\2\3" * (4 << 20)  # 12 MiB: larger than what is sent from memory


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_what_the_manifest_says_stops_everything(
    tmp_path: Path, name: str
) -> None:
    entries, paths = write_files(tmp_path, {"model.safetensors": BIG, "config.json": b"{}"})
    paths[name].write_bytes(paths[name].read_bytes()[:-1] + b"!")
    with hub_server() as server:
        with pytest.raises(SourceError, match=f"{name} was changed since it was made"):
            push(access(server), TARGET, entries, paths, MESSAGE)
        assert server.hub.repos == {}
        assert server.count("PUT|POST") == 0


def test_a_large_file_that_changes_during_its_upload_is_not_committed(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, {"model.safetensors": BIG, "config.json": b"{}"})

    def somebody_writes() -> None:
        with paths["model.safetensors"].open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")

    with hub_server(Fault("PUT ", after=somebody_writes)) as server:
        with pytest.raises(SourceError, match=r"model\.safetensors was changed while it was"):
            push(access(server), TARGET, entries, paths, MESSAGE)
        assert messages(server) == ["initial commit"]


def test_a_small_file_that_changes_after_the_check_is_sent_as_it_was(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, CONTENTS)

    def somebody_writes() -> None:
        paths["config.json"].write_bytes(b"[]")

    with hub_server(Fault("POST .*/preupload/", before=somebody_writes)) as server:
        assert push(access(server), TARGET, entries, paths, MESSAGE).changed
        assert remote(server)["config.json"] == CONTENTS["config.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_symlink_is_not_followed(tmp_path: Path, name: str) -> None:
    entries, paths = write_files(tmp_path, {"model.safetensors": BIG, "config.json": b"{}"})
    elsewhere = tmp_path / "elsewhere"
    paths[name].rename(elsewhere)
    paths[name].symlink_to(elsewhere)
    with hub_server() as server:
        with pytest.raises(SourceError, match=f"{name} is a symlink"):
            push(access(server), TARGET, entries, paths, MESSAGE)
        assert server.hub.repos == {}


@pytest.mark.parametrize("name", [".env", ".cache/x.json", "quantize/.x", "a//b"])
def test_a_hidden_file_is_refused(tmp_path: Path, name: str) -> None:
    with hub_server() as server:
        with pytest.raises(ToolError, match="hidden files never are"):
            publish(server, tmp_path, {**CONTENTS, name: b"secret"})
        assert server.hub.repos == {}


def test_results_for_the_hub_are_the_one_hidden_folder(tmp_path: Path) -> None:
    with hub_server() as server:
        publish(server, tmp_path, {**CONTENTS, ".eval_results/gsm8k.yaml": b"- x: 1\n"})
        assert remote(server)[".eval_results/gsm8k.yaml"] == b"- x: 1\n"


def with_gitignore(server_hub: Hub, text: bytes) -> None:
    repo = server_hub.create("model", TARGET.repo, private=True)
    repo.commit("main", {**repo.tree("main"), ".gitignore": File(text, lfs=False)}, "ignore")


def test_a_remote_gitignore_leaves_nothing_out(tmp_path: Path) -> None:
    with hub_server() as server:
        with_gitignore(server.hub, b"*.safetensors\nquantize/\n*.json\n")
        publish(server, tmp_path)
        files = remote(server)
        assert files.keys() == {*CONTENTS, LISTING, ".gitignore"}
        assert {name: files[name] for name in CONTENTS} == CONTENTS


def test_a_hub_that_ignores_all_the_same_is_noticed_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not look at the rules that come with the request."""
    ignored = Hub.ignored

    def own_rules_alone(hub: Hub, repo, revision, names, own):  # type: ignore[no-untyped-def]
        return ignored(hub, repo, revision, names, None)

    monkeypatch.setattr(Hub, "ignored", own_rules_alone)
    with hub_server() as server:
        with_gitignore(server.hub, b"config.json\n")
        with pytest.raises(ConflictError, match=r"\.gitignore .* leave out config\.json"):
            publish(server, tmp_path)
        assert messages(server) == ["initial commit", "ignore"]
        assert server.count("POST .*/commit/") == 0


def test_what_was_uploaded_before_a_failure_is_not_sent_again(tmp_path: Path) -> None:
    contents = {"1.safetensors": BIG, "2.safetensors": BIG[::-1], "config.json": b"{}"}
    entries, paths = write_files(tmp_path, contents)
    with hub_server(Fault("PUT ", skip=1, status=403)) as server:
        with pytest.raises(Exception, match="403"):
            push(access(server), TARGET, entries, paths, MESSAGE)
        assert len(repository(server).objects) == 1
        server.seen.clear()
        assert push(access(server), TARGET, entries, paths, MESSAGE).changed
        assert server.count("PUT ") == 1
        assert messages(server) == ["initial commit", MESSAGE]


def test_a_card_that_the_hub_refuses_is_found_before_anything_is_uploaded(tmp_path: Path) -> None:
    card = b"---\nlicense: no-such-license\n---\n"
    with hub_server() as server:
        with pytest.raises(SourceError, match=r"front matter: .*no-such-license"):
            publish(server, tmp_path, {**CONTENTS, "README.md": card})
        assert server.hub.repos == {}
        assert server.count("PUT ") == 0
