"""A tag for the commit, a collection for the repository."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hub_fixture import CONTENTS, TARGET, hub_server, messages, online, publish, repository

from quantize.errors import ConflictError, CredentialsError, UsageError
from tests.hub_server import Fault
from tests.hub_server.repos import File

TAGGED = replace(TARGET, tag="v1")


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


def test_the_commit_is_tagged_once(tmp_path: Path) -> None:
    with hub_server() as server:
        pushed = publish(server, tmp_path, target=TAGGED)
        assert repository(server).tags == {"v1": pushed.commit}
        server.seen.clear()
        assert not publish(server, tmp_path, target=TAGGED).changed
        assert server.count("^(PUT|POST) ") == 0


def test_a_tag_is_added_to_what_was_published_without_one(tmp_path: Path) -> None:
    with hub_server() as server:
        commit = publish(server, tmp_path).commit
        assert not publish(server, tmp_path, target=TAGGED).changed
        assert repository(server).tags == {"v1": commit}
        assert server.count("POST .*/commit/") == 1


@pytest.mark.parametrize("fault", [{"drop": "after"}, {"drop": "before"}, {"status": 500}])
def test_a_lost_answer_to_the_tag(tmp_path: Path, fault: dict) -> None:
    with hub_server(Fault("POST .*/tag/", **fault)) as server:
        commit = publish(server, tmp_path, target=TAGGED).commit
        assert repository(server).tags == {"v1": commit}


def test_a_tag_on_another_version_is_a_conflict_before_anything_is_sent(tmp_path: Path) -> None:
    with hub_server() as server:
        first = publish(server, tmp_path / "first", target=TAGGED).commit
        server.seen.clear()
        with pytest.raises(ConflictError, match=f"tag v1 of ann/tiny-awq is on {first}") as caught:
            publish(server, tmp_path / "later", {"config.json": b"[]"}, TAGGED)
        assert caught.value.exit_code == 6
        assert server.count("^(PUT|POST) ") == 0
        assert repository(server).tags == {"v1": first}


def test_a_conflict_that_appears_meanwhile_names_both_commits(tmp_path: Path) -> None:
    with hub_server() as server:

        def somebody_tags() -> None:
            repo = repository(server)
            repo.tags["v1"] = repo.branches["main"]

        server.faults.append(Fault("POST .*/commit/", before=somebody_tags))
        with pytest.raises(ConflictError) as caught:
            publish(server, tmp_path, target=TAGGED)
        repo = repository(server)
        assert repo.tags["v1"] in caught.value.message
        assert repo.branches["main"] in caught.value.message


def test_a_tag_whose_commit_holds_the_same_files_is_right(tmp_path: Path) -> None:
    with hub_server() as server:
        first = publish(server, tmp_path, target=TAGGED).commit
        repo = repository(server)
        repo.commit("main", {**repo.tree("main"), "plot.png": File(b"png", lfs=True)}, "theirs")
        assert not publish(server, tmp_path, target=TAGGED).changed
        assert repo.tags == {"v1": first}


def test_a_collection_gets_the_repository_once(tmp_path: Path) -> None:
    with hub_server(Fault("POST .*/items", drop="after")) as server:
        collection = server.hub.create_collection("Small models", "ann")
        target = replace(TARGET, collection=collection.slug)
        publish(server, tmp_path, target=target)
        assert collection.items == [("model", TARGET.repo, None)]
        server.seen.clear()
        publish(server, tmp_path, target=target)
        assert server.count("^(PUT|POST) ") == 0
        assert len(collection.items) == 1


def test_a_collection_that_is_not_there(tmp_path: Path) -> None:
    with hub_server() as server:
        target = replace(TARGET, collection="ann/nothing-0123456789abcdef01234567")
        with pytest.raises(UsageError, match="there is no collection ann/nothing"):
            publish(server, tmp_path, target=target)
        assert server.count("POST .*/commit/") == 1  # the files themselves are there


def test_a_collection_of_somebody_else(tmp_path: Path) -> None:
    with hub_server() as server:
        collection = server.hub.create_collection("Theirs", "press")
        target = replace(TARGET, collection=collection.slug)
        with pytest.raises(CredentialsError, match="403"):
            publish(server, tmp_path, CONTENTS, target)
        assert messages(server) == ["initial commit", "Publish tiny-awq"]
