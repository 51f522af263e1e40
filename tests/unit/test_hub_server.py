"""The loopback Hub speaks the protocol to the real client, and its faults are what they say."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import lz4.frame
import pytest
from hub_fixture import ACCOUNTS, TOKEN, online
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from tests.hub_server import Fault, Hub, HubServer, Limits, Refused
from tests.hub_server.xet import chunks_of

REPO = "ann/model"
WEIGHTS = os.urandom(150_000)


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def server() -> HubServer:
    limits = Limits(multipart_bytes=100_000, part_bytes=40_000)
    with HubServer(Hub(ACCOUNTS, limits), keep_bodies=True) as server:
        server.hub.create("model", REPO, private=True)
        yield server


@pytest.fixture
def api(server: HubServer) -> HfApi:
    return HfApi(endpoint=server.endpoint, token=TOKEN)


def add(name: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(name, content)


def commit(api: HfApi, *operations: CommitOperationAdd, **options):  # type: ignore[no-untyped-def]
    return api.create_commit(REPO, operations, commit_message="More", **options)


def test_a_large_object_comes_in_parts_and_is_there_afterwards(
    server: HubServer, api: HfApi
) -> None:
    commit(api, add("model.safetensors", WEIGHTS))
    parts = [seen.body_bytes for seen in server.seen if seen.method == "PUT"]
    assert parts == [40_000, 40_000, 40_000, 30_000]
    repo = server.hub.repos["model", REPO]
    assert repo.tree("main")["model.safetensors"].content == WEIGHTS
    commit(api, add("copy.safetensors", WEIGHTS))
    assert server.count("PUT ") == 4


def test_objects_of_a_killed_client_are_not_sent_again(server: HubServer, api: HfApi) -> None:
    operation = add("a.safetensors", WEIGHTS[:1000])
    api.preupload_lfs_files(REPO, [operation])
    assert "a.safetensors" not in server.hub.repos["model", REPO].tree("main")
    commit(api, add("a.safetensors", WEIGHTS[:1000]))
    assert server.count("PUT ") == 1


def test_a_part_with_other_bytes_is_refused_at_the_end(server: HubServer, api: HfApi) -> None:
    server.faults.append(Fault(r"PUT .*/2$", corrupt="request"))
    with pytest.raises(RuntimeError) as caught:
        commit(api, add("model.safetensors", WEIGHTS))
    assert "another sha256" in str(caught.value.__cause__)
    assert server.count("/commit/") == 0
    commit(api, add("model.safetensors", WEIGHTS))


def test_pull_requests_from_draft_to_merge(server: HubServer, api: HfApi) -> None:
    head = api.model_info(REPO).sha
    pull = api.create_pull_request(REPO, "Publish", description="all of it")
    assert (pull.status, pull.git_reference, pull.target_branch) == (
        "draft",
        "refs/pr/1",
        "refs/heads/main",
    )
    made = commit(api, add("config.json", b"{}"), revision="refs/pr/1", parent_commit=head)
    assert api.model_info(REPO).sha == head
    assert api.model_info(REPO, revision="refs/pr/1").sha == made.oid
    names = [entry.path for entry in api.list_repo_tree(REPO, revision="refs/pr/1", recursive=True)]
    assert names == [".gitattributes", "config.json"]
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.pull_requests] == [
        ("1", "refs/pr/1", made.oid)
    ]
    api.change_discussion_status(REPO, 1, "open")
    assert api.get_discussion_details(REPO, 1).status == "open"
    merged = server.hub.repos["model", REPO].merge(1)
    assert api.model_info(REPO).sha == merged
    assert api.get_discussion_details(REPO, 1).status == "merged"


def test_a_commit_with_create_pr_needs_only_to_read(server: HubServer) -> None:
    server.hub.repos["model", REPO].private = False
    guest = HfApi(endpoint=server.endpoint, token="hf_read")
    for _ in range(3):
        made = guest.create_commit(
            REPO, [add("a.safetensors", b"\0" * 99)], commit_message="Publish", create_pr=True
        )
    assert (made.pr_num, made.pr_revision) == (3, "refs/pr/3")
    assert [pull.num for pull in guest.get_repo_discussions(REPO)] == [3, 2, 1]
    assert {pull.status for pull in guest.get_repo_discussions(REPO)} == {"open"}
    with pytest.raises(HfHubHTTPError, match="403"):
        guest.create_commit(REPO, [add("b.json", b"{}")], commit_message="Publish")


def test_another_parent_is_refused(server: HubServer, api: HfApi) -> None:
    head = api.model_info(REPO).sha
    server.faults.append(Fault("POST .*/commit/main", move_head=True))
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("config.json", b"{}"), parent_commit=head)
    assert server.hub.repos["model", REPO].messages[-1] == "faster"


def test_branches_and_tags_that_exist_are_conflicts(server: HubServer, api: HfApi) -> None:
    api.create_branch(REPO, branch="next")
    api.create_tag(REPO, tag="v1", revision="next")
    for again in (
        lambda: api.create_branch(REPO, branch="next"),
        lambda: api.create_tag(REPO, tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError, match="409"):
            again()
    api.create_tag(REPO, tag="v1", exist_ok=True)
    assert [tag.name for tag in api.list_repo_refs(REPO).tags] == ["v1"]
    assert api.model_info(REPO, revision="v1").sha == api.model_info(REPO).sha


def test_collections(server: HubServer, api: HfApi) -> None:
    made = api.create_collection("My models", namespace="ann")
    api.add_collection_item(made.slug, REPO, "model", note="the best")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(made.slug, REPO, "model")
    found = api.get_collection(made.slug)
    assert [(item.item_id, item.note) for item in found.items] == [(REPO, "the best")]
    assert api.create_collection("My models", namespace="ann", exists_ok=True).slug == made.slug
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_collection("ann/none-1")


def test_visibility_and_gates(server: HubServer, api: HfApi) -> None:
    api.update_repo_settings(REPO, private=False, gated="auto")
    info = HfApi(endpoint=server.endpoint, token=False).model_info(REPO)
    assert (info.private, info.gated) == (False, "auto")


def test_a_gitignore_leaves_files_out(server: HubServer, api: HfApi) -> None:
    repo = server.hub.repos["model", REPO]
    commit(api, add(".gitignore", b"*.json\n!keep.json\n"))
    commit(api, add("a.json", b"{}"), add("keep.json", b"{}"), add("b.txt", b"b"))
    assert set(repo.tree("main")) == {".gitattributes", ".gitignore", "keep.json", "b.txt"}


def test_ranges_of_small_and_large_files(server: HubServer, api: HfApi) -> None:
    commit(api, add("model.safetensors", WEIGHTS), add("a.txt", b"0123456789"))
    headers = build_hf_headers(token=TOKEN)
    for name, content in (("model.safetensors", WEIGHTS), ("a.txt", b"0123456789")):
        url = f"{server.endpoint}/{REPO}/resolve/main/{name}"
        for asked, wanted in (("2-5", content[2:6]), ("7-", content[7:]), ("-3", content[-3:])):
            found = get_session().get(url, headers={**headers, "Range": f"bytes={asked}"})
            assert (found.status_code, found.content) == (206, wanted)
        beyond = get_session().get(url, headers={**headers, "Range": "bytes=999999-"})
        assert beyond.status_code == 416
    [head] = [api.get_paths_info(REPO, "model.safetensors")[0]]
    assert head.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    signed = [seen for seen in server.seen if seen.path.startswith(("/_cdn/", "/_lfs/"))]
    puts = [seen for seen in signed if seen.path.startswith("/_cdn/") or seen.method == "PUT"]
    assert not any("authorization" in seen.headers for seen in puts)


def test_storage_that_is_used_up(server: HubServer, api: HfApi) -> None:
    server.hub.limits.private_bytes = {"ann": 1000}
    with pytest.raises(HfHubHTTPError, match="403") as caught:
        commit(api, add("model.safetensors", WEIGHTS))
    assert "storage limit" in str(caught.value)
    server.hub.limits.payment_required = frozenset({"ann"})
    with pytest.raises(HfHubHTTPError, match="402"):
        commit(api, add("model.safetensors", WEIGHTS))
    server.hub.limits.commit_bytes = 100
    with pytest.raises(HfHubHTTPError, match="413"):
        commit(api, add("config.json", b" " * 200))


def test_a_token_that_expires(server: HubServer, api: HfApi) -> None:
    server.faults.append(Fault("POST .*/preupload/", expire_token=True))
    with pytest.raises(HfHubHTTPError, match="401"):
        commit(api, add("config.json", b"{}"))
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()


@pytest.mark.parametrize("cut", ["request", "answer"])
def test_transfers_that_are_cut_and_slow(server: HubServer, api: HfApi, cut: str) -> None:
    slow = Fault("PUT ", skip=1, bytes_per_second=1e6)
    server.faults += [Fault("PUT ", cut=cut), slow]
    commit(api, add("a.safetensors", WEIGHTS[:1000]))
    sent = [seen.body_bytes for seen in server.seen if seen.method == "PUT"]
    assert sent == [500 if cut == "request" else 1000, 1000]


def test_answers_that_lie(server: HubServer, api: HfApi) -> None:
    commit(api, add("a.safetensors", WEIGHTS[:1000]))
    server.faults += [Fault("GET .*/tree/", corrupt="answer"), Fault("GET /_cdn", corrupt="answer")]
    [entry] = [e for e in api.list_repo_tree(REPO, recursive=True) if e.path == "a.safetensors"]
    assert entry.lfs.sha256 != hashlib.sha256(WEIGHTS[:1000]).hexdigest()
    url = f"{server.endpoint}/{REPO}/resolve/main/a.safetensors"
    found = get_session().get(url, headers=build_hf_headers(token=TOKEN))
    assert found.content != WEIGHTS[:1000]


def test_a_client_can_be_killed_while_its_request_waits(server: HubServer, tmp_path: Path) -> None:
    code = "import sys; from huggingface_hub import HfApi; HfApi().create_tag(sys.argv[1], tag='v')"
    variables = {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    for at, tags in (("before", set()), ("after", {"v"})):
        with server.gate("POST .*/tag/", at=at) as gate:  # type: ignore[arg-type]
            child = subprocess.Popen(
                [sys.executable, "-c", code, REPO], env={**os.environ, **variables}
            )
            gate.wait()
            assert set(server.hub.repos["model", REPO].tags) == tags
            child.kill()
            assert child.wait() == -signal.SIGKILL
        server.hub.repos["model", REPO].tags.clear()


def test_the_log_has_all_but_the_token(server: HubServer, api: HfApi) -> None:
    commit(api, add("a.safetensors", b"\0" + TOKEN.encode()), add("b.json", b'{"b": 1}'))
    assert all(seen.headers.get("host") for seen in server.seen)
    [sent] = [seen for seen in server.seen if TOKEN.encode() in seen.searchable()]
    assert sent.method == "PUT"
    [lines] = [seen.searchable() for seen in server.seen if "/commit/" in seen.path]
    assert b"parentCommit" not in lines
    assert b'"b.json"' in lines


def test_bytes_grouped_by_four_come_back_for_every_length() -> None:
    for length in range(12):
        content = bytes(range(length))
        grouped = b"".join(content[offset::4] for offset in range(4))
        xorb = lz4.frame.compress(grouped)
        header = bytes([0, *len(xorb).to_bytes(3, "little"), 2, *length.to_bytes(3, "little")])
        assert chunks_of(header + xorb) == [content]


def test_a_chunk_that_is_damaged_is_refused() -> None:
    with pytest.raises(Refused, match="another size"):
        chunks_of(bytes([0, 2, 0, 0, 0, 3, 0, 0]) + b"ab")
    with pytest.raises(Refused, match="cannot be decompressed"):
        chunks_of(bytes([0, 2, 0, 0, 1, 3, 0, 0]) + b"ab")
