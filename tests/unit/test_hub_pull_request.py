"""Pull requests: opened by the one commit, found again, never opened twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hub_fixture import (
    CONTENTS,
    MESSAGE,
    TARGET,
    TOKEN,
    hub_server,
    online,
    publish,
    remote,
    repository,
)

from quantize.errors import ConflictError
from tests.hub_server import Account, Fault, HubServer
from tests.hub_server.repos import File

PROPOSED = replace(TARGET, pull_request=True)


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


def pulls(server: HubServer) -> list[tuple[int, str, str]]:
    return [(p.number, p.title, p.status) for p in repository(server).pulls.values()]


def test_one_commit_opens_it_and_main_stays(tmp_path: Path) -> None:
    with hub_server() as server:
        pushed = publish(server, tmp_path, target=PROPOSED)
        assert pushed.changed
        assert pushed.pull_request == f"{server.endpoint}/ann/tiny-awq/discussions/1"
        assert pulls(server) == [(1, MESSAGE, "open")]
        repo = repository(server)
        assert repo.messages == ["initial commit", MESSAGE]
        assert repo.pull_heads["refs/pr/1"] == pushed.commit
        assert remote(server) == {}
        assert CONTENTS.items() <= remote(server, ref="refs/pr/1").items()


def test_again_is_nothing_while_it_is_open_and_after_it_was_merged(tmp_path: Path) -> None:
    with hub_server() as server:
        first = publish(server, tmp_path, target=PROPOSED)
        server.seen.clear()
        second = publish(server, tmp_path, target=PROPOSED)
        assert (second.changed, second.commit) == (False, first.commit)
        assert second.pull_request == first.pull_request
        repository(server).merge(1)
        third = publish(server, tmp_path, target=PROPOSED)
        assert (third.changed, third.pull_request) == (False, None)
        assert third.commit == repository(server).branches["main"]
        assert server.count("^(PUT|POST) ") == 0


def test_the_open_one_is_continued(tmp_path: Path) -> None:
    later = {"config.json": b"{}", "README.md": CONTENTS["README.md"]}
    with hub_server() as server:
        publish(server, tmp_path / "first", target=PROPOSED)
        pushed = publish(server, tmp_path / "later", later, PROPOSED)
        assert pulls(server) == [(1, MESSAGE, "open")]
        files = remote(server, ref="refs/pr/1")
        del files["quantize/manifest.json"]
        assert files == later
        assert pushed.commit == repository(server).pull_heads["refs/pr/1"]


@pytest.mark.parametrize("fault", [{"drop": "after"}, {"drop": "before"}, {"status": 503}])
def test_it_is_not_opened_twice_when_the_answer_is_lost(tmp_path: Path, fault: dict) -> None:
    with hub_server(Fault("POST .*/commit/", **fault)) as server:
        pushed = publish(server, tmp_path, target=PROPOSED)
        assert pulls(server) == [(1, MESSAGE, "open")]
        assert pushed.pull_request == f"{server.endpoint}/ann/tiny-awq/discussions/1"
        assert repository(server).messages == ["initial commit", MESSAGE]


def test_one_that_was_opened_behind_our_back_is_closed(tmp_path: Path) -> None:
    """A request that timed out may take effect later, when it was sent again already."""
    with hub_server() as server:
        publish(server, tmp_path / "now", target=PROPOSED)
        server.hub.repos["model", TARGET.repo].open_pull(MESSAGE, "", "ann", "main")
        again = publish(server, tmp_path / "again", target=PROPOSED)
        assert not again.changed
        assert pulls(server) == [(1, MESSAGE, "open"), (2, MESSAGE, "closed")]


def test_those_of_others_and_closed_ones_are_left_alone(tmp_path: Path) -> None:
    with hub_server() as server:
        repo = server.hub.create("model", TARGET.repo, private=True)
        repo.open_pull(MESSAGE, "", "somebody", "main")
        closed = repo.open_pull(MESSAGE, "", "ann", "main")
        repo.pulls[closed.number] = replace(closed, status="closed")
        repo.open_pull("Another matter", "", "ann", "main")
        pushed = publish(server, tmp_path, target=PROPOSED)
        assert pushed.pull_request is not None
        assert pushed.pull_request.endswith("/discussions/4")


def test_a_draft_of_ours_is_continued(tmp_path: Path) -> None:
    with hub_server() as server:
        repo = server.hub.create("model", TARGET.repo, private=True)
        repo.open_pull(MESSAGE, "", "ann", "main")
        publish(server, tmp_path, target=PROPOSED)
        assert pulls(server) == [(1, MESSAGE, "draft")]
        assert CONTENTS.items() <= remote(server, ref="refs/pr/1").items()


def test_it_needs_no_permission_to_write(tmp_path: Path) -> None:
    with hub_server() as server:
        server.hub.accounts["hf_guest"] = Account("guest")
        server.hub.create("model", TARGET.repo, private=False)
        pushed = publish(server, tmp_path, target=PROPOSED, token="hf_guest")
        assert pushed.changed
        assert repository(server).pulls[1].author == "guest"
        assert TOKEN not in str(pushed)


def test_a_repository_with_files_of_others_gets_none(tmp_path: Path) -> None:
    with hub_server() as server:
        repo = server.hub.create("model", TARGET.repo, private=True)
        repo.commit("main", {"model.safetensors": File(b"bf16", lfs=True)}, "theirs")
        with pytest.raises(ConflictError, match=r"model\.safetensors"):
            publish(server, tmp_path, target=PROPOSED)
        assert repo.pulls == {}


def test_somebody_who_commits_to_it_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    with hub_server() as server:
        publish(server, tmp_path / "first", target=PROPOSED)
        server.faults.append(Fault("POST .*/commit/", move_head=True))
        with pytest.raises(ConflictError, match="refs/pr/1 moved from"):
            publish(server, tmp_path / "later", {"config.json": b"[]"}, PROPOSED)
