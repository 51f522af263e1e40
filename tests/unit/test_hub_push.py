"""Publishing to the Hub: one commit, nothing twice, nothing of others touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_fixture import (
    CARD,
    CONTENTS,
    READ_TOKEN,
    TARGET,
    TOKEN,
    WEIGHTS,
    access,
    hub_server,
    messages,
    online,
    publish,
    remote,
    write_files,
)
from huggingface_hub import constants

from quantize.errors import ConflictError, CredentialsError, SourceError, ToolError, TransientError
from quantize.hub.push import Pushed, Target, push
from quantize.listing import LISTING
from tests.hub_server import Fault
from tests.hub_server.state import File


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


def test_a_new_repository_gets_everything_in_one_commit(tmp_path: Path) -> None:
    with hub_server() as server:
        pushed = publish(server, tmp_path)
        repo = server.hub.repos["model", TARGET.repo]
        assert repo.private
        assert repo.messages == ["initial commit", "Publish tiny-awq"]
        assert pushed.changed
        assert pushed.commit == repo.branches["main"]
        assert pushed.url == f"{server.endpoint}/ann/tiny-awq/tree/{pushed.commit}"
        files = remote(server)
        assert files.pop(LISTING) == (tmp_path / LISTING).read_bytes()
        assert files == CONTENTS


def test_the_second_publish_sends_no_byte(tmp_path: Path) -> None:
    with hub_server() as server:
        first = publish(server, tmp_path)
        server.seen.clear()
        second = publish(server, tmp_path)
        assert second == Pushed(first.commit, first.url, changed=False)
        assert server.count("^(PUT|POST) ") == 0


def test_a_change_is_one_commit_that_also_deletes_what_is_gone(tmp_path: Path) -> None:
    later = {"model.safetensors": WEIGHTS[:700], "config.json": b"{}", "README.md": CARD}
    with hub_server() as server:
        publish(server, tmp_path / "first")
        repo = server.hub.repos["model", TARGET.repo]
        image = File(b"\0png", lfs=True)
        repo.commit("main", {**repo.tree("main"), "plot.png": image}, "an image of somebody's")
        server.seen.clear()
        assert publish(server, tmp_path / "later", later).changed
        assert messages(server)[-2:] == ["an image of somebody's", "Publish tiny-awq"]
        assert server.count("PUT ") == 1  # only the one new large file travels
        files = remote(server)
        assert files.pop(LISTING) == (tmp_path / "later" / LISTING).read_bytes()
        assert files == {**later, "plot.png": image.content}
        assert ".gitattributes" in repo.tree("main")


def test_a_large_file_is_uploaded_before_the_commit_with_progress(tmp_path: Path) -> None:
    big = b"\1" * (11 << 20)
    entries, paths = write_files(tmp_path, {"model.safetensors": big, "config.json": b"{}"})
    reported: list[tuple[int, int]] = []
    with hub_server() as server:
        push(access(server), TARGET, entries, paths, "Big", lambda *step: reported.append(step))
        order = [seen.path.split("/")[1] for seen in server.seen if seen.method == "PUT"]
        assert order == ["_lfs"]
        uploads = [index for index, seen in enumerate(server.seen) if seen.method == "PUT"]
        commits = [i for i, seen in enumerate(server.seen) if "/commit/" in seen.path]
        assert len(commits) == 1
        assert max(uploads) < commits[0]
    total = sum(entry.bytes for entry in entries)
    assert reported == [(total - len(big), total), (total, total)]


def test_another_branch_is_created_and_main_stays(tmp_path: Path) -> None:
    target = Target("lab/tiny-awq", branch="quantized", private=False)
    with hub_server() as server:
        assert publish(server, tmp_path, target=target).changed
        repo = server.hub.repos["model", "lab/tiny-awq"]
        assert not repo.private
        assert set(repo.tree("main")) == {".gitattributes"}
        assert set(repo.tree("quantized")) == {".gitattributes", LISTING, *CONTENTS}
        assert not publish(server, tmp_path, target=target).changed


def test_a_commit_whose_answer_was_lost_is_found_done(tmp_path: Path) -> None:
    with hub_server(Fault("POST .*/commit/", drop="after")) as server:
        assert publish(server, tmp_path).changed
        assert messages(server) == ["initial commit", "Publish tiny-awq"]
        assert server.count("POST .*/commit/") == 1


@pytest.mark.parametrize(
    "fault", [{"drop": "before"}, {"status": 500}, {"status": 429, "headers": {"Retry-After": "0"}}]
)
def test_a_commit_that_did_not_take_effect_is_sent_again(tmp_path: Path, fault: dict) -> None:
    with hub_server(Fault("POST .*/commit/", times=2, **fault)) as server:
        assert publish(server, tmp_path).changed
        assert messages(server) == ["initial commit", "Publish tiny-awq"]
        assert server.count("POST .*/commit/") == 3


def test_a_head_that_moved_meanwhile_is_a_conflict_naming_both(tmp_path: Path) -> None:
    with hub_server() as server:
        before = publish(server, tmp_path / "first").commit

        def somebody_commits() -> None:
            repo = server.hub.repos["model", TARGET.repo]
            repo.commit("main", {**repo.tree("main"), "x": File(b"x", lfs=False)}, "faster")

        server.faults.append(Fault("POST .*/commit/", before=somebody_commits))
        with pytest.raises(ConflictError) as caught:
            publish(server, tmp_path / "later", {"config.json": b"[]"})
        repo = server.hub.repos["model", TARGET.repo]
        assert caught.value.exit_code == 6
        assert before in caught.value.message
        assert repo.branches["main"] in caught.value.message
        assert repo.messages[-1] == "faster"


def test_a_repository_with_files_of_others_is_left_alone(tmp_path: Path) -> None:
    with hub_server() as server:
        repo = server.hub.create("model", TARGET.repo, private=False)
        theirs = {"model.safetensors": File(b"bf16", lfs=True), "README.md": File(CARD, lfs=False)}
        repo.commit("main", theirs, "the fine-tuned checkpoint")
        with pytest.raises(ConflictError, match=r"model\.safetensors"):
            publish(server, tmp_path, {"model.safetensors": b"int4", "README.md": CARD})
        assert remote(server) == {"model.safetensors": b"bf16", "README.md": CARD}
        assert server.count("PUT|commit") == 0


def test_servers_errors_pass_when_they_end_in_time(tmp_path: Path) -> None:
    faults = [
        Fault("GET /api/models/ann/tiny-awq/revision/main", times=2, status=503),
        Fault("POST /api/repos/create", status=500),
        Fault("GET .*/tree/", status=500),
    ]
    with hub_server(*faults) as server:
        assert publish(server, tmp_path).changed
        assert all(fault.times == 0 for fault in server.faults)


def test_servers_errors_that_stay_say_run_again(tmp_path: Path) -> None:
    with hub_server(Fault("GET /api/models/", times=99, status=503)) as server:
        with pytest.raises(TransientError, match="503") as caught:
            publish(server, tmp_path)
        assert caught.value.exit_code == 75
        assert caught.value.hint == "run the same command again"


@pytest.mark.parametrize(
    ("token", "repo"),
    [("hf_wrong", "ann/tiny-awq"), (READ_TOKEN, "ann/tiny-awq"), (TOKEN, "press/tiny-awq")],
)
def test_tokens_that_may_not_write(tmp_path: Path, token: str, repo: str) -> None:
    with hub_server() as server:
        with pytest.raises(CredentialsError) as caught:
            publish(server, tmp_path, target=Target(repo), token=token)
        assert caught.value.exit_code == 5
        assert token not in str(caught.value) + caught.value.hint
        assert server.hub.repos == {}


def test_a_local_file_that_changed_stops_everything(tmp_path: Path) -> None:
    entries, paths = write_files(tmp_path, CONTENTS)
    weights = paths["model-00002-of-00002.safetensors"]
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with hub_server() as server:
        with pytest.raises(SourceError, match=r"00002\.safetensors was changed"):
            push(access(server), TARGET, entries, paths, "Damaged")
        assert server.hub.repos == {}


def test_the_commit_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that stores other bytes than it was sent is noticed."""
    with hub_server() as server:
        # huggingface_hub 1.x reads the commit's address with the process's endpoint.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        commit = server.hub.apply

        def corrupting(repo, branch, lines):  # type: ignore[no-untyped-def]
            oid = commit(repo, branch, lines)
            repo.commits[oid]["config.json"] = File(b'{"hidden_size": 65}\n', lfs=False)
            return oid

        server.hub.apply = corrupting  # type: ignore[method-assign]
        with pytest.raises(ToolError, match=r"does not hold what was sent: config\.json"):
            publish(server, tmp_path)
