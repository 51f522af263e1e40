"""The Hub through the real client, against the loopback server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_fixture import (
    READ_TOKEN,
    SCOPED_TOKEN,
    TOKEN,
    access,
    hub_server,
    online,
    write_files,
)
from huggingface_hub import constants

from quantize import hub
from quantize.errors import (
    ConflictError,
    CredentialsError,
    ResourceError,
    SourceError,
    ToolError,
    TransientError,
)
from quantize.hub_push import Pushed, Target, push
from quantize.listing import LISTING
from tests.hub_server import Fault, HubServer
from tests.hub_server.state import File

WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: acme/base\n---\n# A model\n"
CONTENTS = {
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "config.json": b'{"hidden_size": 64}\n',
    "empty.txt": b"",
    "README.md": CARD,
}
TARGET = Target("ann/tiny-awq")
PATTERNS = ("*.safetensors", "*.json", "README.md")


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


def publish(
    server: HubServer,
    folder: Path,
    contents: dict[str, bytes] | None = None,
    target: Target = TARGET,
    token: str | None = TOKEN,
) -> Pushed:
    entries, paths = write_files(folder, contents or CONTENTS)
    return push(access(server, token), target, entries, paths, "Publish tiny-awq")


def remote(server: HubServer, target: Target = TARGET) -> dict[str, bytes]:
    tree = server.hub.repos["model", target.repo].tree(target.branch)
    return {name: file.content for name, file in tree.items() if name != ".gitattributes"}


def messages(server: HubServer) -> list[str]:
    return server.hub.repos["model", TARGET.repo].messages


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
    big = b"\1" * (9 << 20)
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
    assert reported[0] == (len(big), total)
    assert reported[-1] == (total, total)


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


def test_no_server_at_all_is_transient(tmp_path: Path) -> None:
    with hub_server() as server:
        nobody = access(server)
    with pytest.raises(TransientError, match=r"127\.0\.0\.1.* failed while looking up"):
        hub.resolve_revision(nobody, "ann/tiny")


def test_offline_mode_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_server() as server:
        with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
            hub.resolve_revision(access(server), "ann/tiny")
        commit = "0" * 40
        with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
            hub.download_snapshot(access(server), "ann/t", commit, tmp_path, patterns=PATTERNS)
        assert server.seen == []


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


@pytest.mark.parametrize(
    ("token", "repo", "reason"),
    [
        (None, "ann/x", "needs a token"),
        ("hf_wrong", "ann/x", "401"),
        (READ_TOKEN, "ann/x", "only read"),
        (SCOPED_TOKEN, "ann/x", "fine-grained"),
        (TOKEN, "press/x", "may not write to press"),
        (TOKEN, "elsewhere/x", "may not write to elsewhere"),
    ],
)
def test_preflight_refuses(token: str | None, repo: str, reason: str) -> None:
    with hub_server() as server, pytest.raises(CredentialsError, match=reason) as caught:
        hub.require_write(access(server, token), repo)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("token", "repo"), [(TOKEN, "ann/x"), (TOKEN, "lab/x"), (SCOPED_TOKEN, "lab/x")]
)
def test_preflight_accepts(token: str, repo: str) -> None:
    with hub_server() as server:
        assert hub.require_write(access(server, token), repo) == "ann"


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


def test_a_snapshot_comes_back_byte_for_byte(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    with hub_server(page_size=2) as server:
        pushed = publish(server, tmp_path / "local")
        assert hub.resolve_revision(access(server), TARGET.repo) == pushed.commit
        assert hub.resolve_revision(access(server), TARGET.repo, "main") == pushed.commit
        entries = hub.download_snapshot(
            access(server),
            TARGET.repo,
            pushed.commit,
            tmp_path / "copy",
            patterns=PATTERNS,
            ignore=("*-00002-*",),
            on_progress=lambda *step: reported.append(step),
        )
    wanted = {"model-00001-of-00002.safetensors", "config.json", "README.md"}
    copied = {p.name: p.read_bytes() for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert copied == {name: CONTENTS[name] for name in wanted}
    sizes = {entry.name: entry.bytes for entry in entries}
    assert sizes == {name: len(CONTENTS[name]) for name in wanted}
    assert reported[-1] == (sum(sizes.values()), sum(sizes.values()))


def test_a_download_that_was_cut_off_is_continued(tmp_path: Path) -> None:
    with hub_server() as server:
        commit = publish(server, tmp_path / "local").commit
        name = "model-00001-of-00002.safetensors"
        gets = f"GET .*/{name}"
        server.faults.append(Fault("GET .*00002-of", times=99, status=500))

        def download() -> None:
            hub.download_snapshot(
                access(server), TARGET.repo, commit, tmp_path / "copy", patterns=PATTERNS
            )

        with pytest.raises(TransientError, match="500"):
            download()
        assert server.count(gets) == 1
        server.faults.clear()
        download()
        assert server.count(gets) == 1  # what had arrived is not fetched again
    assert (tmp_path / "copy" / "model-00002-of-00002.safetensors").read_bytes() == WEIGHTS[::-1]


def test_a_damaged_download_is_not_kept(tmp_path: Path) -> None:
    with hub_server() as server:
        commit = publish(server, tmp_path / "local").commit
        copy = tmp_path / "copy"
        hub.download_snapshot(access(server), TARGET.repo, commit, copy, patterns=PATTERNS)
        broken = File(b'{"hidden_size": 63}\n', lfs=False)
        listed = server.hub.repos["model", TARGET.repo].commits[commit]
        good = hub.list_files(access(server), TARGET.repo, commit)
        listed["config.json"] = broken
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hub, "list_files", lambda *_: good)
            with pytest.raises(TransientError, match=r"config\.json .* another checksum"):
                hub.download_snapshot(
                    access(server), TARGET.repo, commit, tmp_path / "again", patterns=PATTERNS
                )
    assert not (tmp_path / "again" / "config.json").exists()


def test_revisions_and_repositories_that_do_not_exist(tmp_path: Path) -> None:
    with hub_server() as server:
        publish(server, tmp_path)
        with pytest.raises(SourceError, match="no such revision"):
            hub.resolve_revision(access(server), TARGET.repo, "v9")
        with pytest.raises(SourceError, match="no such repository, or a private one"):
            hub.resolve_revision(access(server), "ann/nothing")
        with pytest.raises(SourceError, match="private"):
            hub.resolve_revision(access(server, None), TARGET.repo)  # created private
        with pytest.raises(SourceError, match=r"has none of \*\.gguf"):
            commit = hub.resolve_revision(access(server), TARGET.repo)
            hub.download_snapshot(
                access(server), TARGET.repo, commit, tmp_path / "no", patterns=("*.gguf",)
            )


def test_a_commit_needs_no_server() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert hub.resolve_revision(hub.Access("http://127.0.0.1:9"), "a/b", commit) == commit


def test_the_environment_names_endpoint_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:pw@127.0.0.1:1/")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = hub.access_from_environment()
    assert (found.endpoint, found.token) == ("http://me:pw@127.0.0.1:1", TOKEN)
    assert found.host == "http://127.0.0.1:1"
    assert TOKEN not in repr(found)


def test_the_token_is_in_no_message_and_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    echo = {"X-Error-Message": f"token {TOKEN} is tired"}
    with hub_server(Fault("PUT ", times=99, status=403, headers=echo)) as server:
        with pytest.raises(CredentialsError) as caught:
            publish(server, tmp_path)
        message = str(caught.value) + caught.value.hint + repr(access(server))
        assert "is tired" in message
        server.faults.clear()
        pushed = publish(server, tmp_path)
        hub.download_snapshot(
            access(server), TARGET.repo, pushed.commit, tmp_path / "copy", patterns=PATTERNS
        )
    captured = capfd.readouterr()
    logged = "".join(record.getMessage() for record in caplog.records)
    for text in (message, captured.out, captured.err, repr(pushed), logged):
        assert TOKEN not in text
        assert "signature=secret" not in message
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            assert TOKEN.encode() not in Path(folder, name).read_bytes()
