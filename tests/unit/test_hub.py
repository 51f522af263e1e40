"""The Hub through the real client, against the loopback server: revisions, downloads, tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_fixture import (
    CONTENTS,
    PATTERNS,
    READ_TOKEN,
    SCOPED_TOKEN,
    TARGET,
    TOKEN,
    WEIGHTS,
    access,
    hub_server,
    messages,
    online,
    publish,
)
from huggingface_hub import constants

from quantize.errors import (
    CredentialsError,
    Interrupted,
    QuantizeError,
    ResourceError,
    SourceError,
    ToolError,
    TransientError,
)
from quantize.hub import repository as hub
from quantize.hub.client import call, translate
from tests.hub_server import Fault
from tests.hub_server.state import File


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    online(monkeypatch)


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
        server.seen.clear()
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


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (402, "Payment required", ResourceError),
        (507, "Insufficient storage", ResourceError),
        (403, "Private repository storage limit reached, please upgrade", ResourceError),
        (403, "Your storage patterns tripped our internal systems!", ResourceError),
        (403, "You don't have the rights to write", CredentialsError),
        (401, "Invalid credentials in Authorization header", CredentialsError),
        (429, "Too many requests", TransientError),
    ],
)
def test_what_an_answer_to_an_upload_means(
    tmp_path: Path, status: int, said: str, kind: type[QuantizeError]
) -> None:
    fault = Fault("POST .*/objects/batch", times=99, status=status, message=said)
    fault.headers = {"Retry-After": "0"}
    with hub_server(fault) as server:
        with pytest.raises(kind) as caught:
            publish(server, tmp_path)
        assert said.split(",")[0] in caught.value.message
        assert messages(server) == ["initial commit"]
        server.faults.clear()
        assert publish(server, tmp_path).changed


@pytest.mark.parametrize(
    ("said", "kind"), [("storage quota exceeded", ResourceError), ("bad object", ToolError)]
)
def test_an_object_that_is_refused(said: str, kind: type[QuantizeError]) -> None:
    error = ValueError(f"LFS batch API returned errors:\nEncountered error for file: `{said}")
    found = translate(hub.Access("http://127.0.0.1:9"), "uploading a", error)
    assert type(found) is kind
    assert said in found.message


def test_a_signal_in_the_client_is_no_failure_of_the_hub() -> None:
    def upload() -> None:
        calls.append(1)
        try:
            raise Interrupted("stopped by SIGTERM")
        except Interrupted as stop:
            raise RuntimeError("Error while uploading 'a' to the Hub.") from stop

    calls: list[int] = []
    with pytest.raises(Interrupted, match="SIGTERM"):
        call(hub.Access("http://127.0.0.1:9", retry_seconds=(0.0,)), "uploading a", upload)
    assert calls == [1]
