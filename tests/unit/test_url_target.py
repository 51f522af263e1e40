"""Publishing to a URL: a real S3 server on this machine, local folders; a kill at each request."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moto.s3.models
import pytest
from botocore.exceptions import ClientError
from hub_fixture import write_files

from quantize.bucket.client import Place, endpoint, etag_of, open_place
from quantize.bucket.errors import clean, translate
from quantize.bucket.target import PUBLISHING, check_url, publish_url
from quantize.errors import (
    ConflictError,
    CredentialsError,
    QuantizeError,
    ResourceError,
    SourceError,
    ToolError,
    TransientError,
    UsageError,
)
from quantize.listing import LISTING
from tests.s3_server import BUCKET, KEY_ID, SECRET, S3Server, credentials, s3_server

URL = f"s3://{BUCKET}/acme/tiny"
PREFIX = "acme/tiny/"
PART = 64 << 10
OLD = {
    "README.md": b"# old\n",
    "config.json": b'{"version": "old"}',
    "model-1.safetensors": b"same in both" * 100,
    "model-2.safetensors": b"o" * 5000,
    "gone.json": b"{}",
}
NEW = {
    "README.md": b"# new\n",
    "config.json": b'{"version": "new"}',
    "model-1.safetensors": OLD["model-1.safetensors"],
    "model-2.safetensors": b"n" * 5000,
    "model-3.safetensors": bytes(range(256)) * (3 * PART // 256) + b"end",
}


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as server:
        patch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Without objects, and with the variables that lead there; backends do not try again."""
    for name in (key for key in os.environ if key.startswith("AWS_")):
        monkeypatch.delenv(name)
    for name, value in credentials(running).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    running.forget()
    put(running, {}, "")
    running.forget()
    return running


def put(server: S3Server, contents: Mapping[str, bytes], prefix: str) -> None:
    """Make the bucket hold these below the prefix, and nothing else there."""
    client = server.client
    for name in server.contents(prefix):
        client.delete_object(Bucket=BUCKET, Key=prefix + name)
    for name, content in contents.items():
        client.put_object(Bucket=BUCKET, Key=prefix + name, Body=content)


def opened(url: str) -> Place:
    """As `open_place`, with one S3 client a server: making one takes most of a test's time."""
    if not url.startswith("s3:"):
        return open_place(url, PART)
    key = os.environ["AWS_ENDPOINT_URL"]
    if key not in CLIENTS:
        CLIENTS[key] = open_place(url, PART)
    return replace(CLIENTS[key], url=url, root=url.removeprefix("s3://"))


CLIENTS: dict[str, Place] = {}


@dataclass(frozen=True)
class Made:
    """Files on disk with their listing."""

    folder: Path
    contents: Mapping[str, bytes]

    def publish(self, url: str = URL) -> bool:
        entries, paths = write_files(self.folder, self.contents)
        place = opened(url)
        seen: list[tuple[int, int]] = []
        changed = publish_url(
            place,
            entries,
            paths,
            self.folder / "locks" / "lock",
            lambda done, total: seen.append((done, total)),
        )
        assert seen == sorted(seen) and (not seen or seen[-1][0] == seen[-1][1])
        return changed

    @property
    def published(self) -> dict[str, bytes]:
        """What the place must hold, the listing included."""
        write_files(self.folder, self.contents)
        return {**self.contents, LISTING: (self.folder / LISTING).read_bytes()}


@pytest.fixture
def old(tmp_path: Path) -> Made:
    return Made(tmp_path / "old", OLD)


@pytest.fixture
def new(tmp_path: Path) -> Made:
    return Made(tmp_path / "new", NEW)


def is_listed_truly(contents: Mapping[str, bytes]) -> bool:
    """What a reader sees: whether there is a listing, and then every file that it names as told."""
    if LISTING not in contents:
        return False
    for entry in json.loads(contents[LISTING])["files"]:
        content = contents[entry["name"]]
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    return True


def test_a_bucket_gets_exactly_the_files(server: S3Server, new: Made) -> None:
    assert new.publish() is True
    assert server.contents(PREFIX) == new.published
    assert is_listed_truly(server.contents(PREFIX))


def test_publishing_the_same_again_sends_nothing(server: S3Server, new: Made) -> None:
    new.publish()
    server.forget()
    assert new.publish() is False
    assert server.count("PUT|POST|DELETE") == 0
    assert server.body_bytes == 0


def test_a_later_publish_replaces_an_earlier_one(server: S3Server, old: Made, new: Made) -> None:
    old.publish()
    server.forget()
    assert new.publish() is True
    assert server.contents(PREFIX) == new.published
    assert server.count(r"PUT .*model-1") == 0  # the same in both
    assert server.count(r"PUT .*model-2") == 1  # of the same size


@pytest.mark.parametrize("url", ["s3://models/acme", f"s3://{BUCKET}"])
@pytest.mark.parametrize("also_published", [False, True])
def test_files_of_others_are_not_touched(
    server: S3Server, old: Made, new: Made, url: str, also_published: bool
) -> None:
    if also_published:
        old.publish(url)
    put(server, {"acme/mine/notes.txt": b"mine"}, "acme/mine/")
    before = server.contents()
    server.forget()
    with pytest.raises(ConflictError, match=r"mine/notes\.txt") as caught:
        new.publish(url)
    assert caught.value.exit_code == 6
    with pytest.raises(ConflictError, match=r"mine/notes\.txt"):
        check_url(url)
    assert server.contents() == before
    assert server.count("PUT|POST|DELETE") == 0


def test_a_neighbour_with_the_same_beginning_is_no_part_of_it(server: S3Server, new: Made) -> None:
    put(server, {"x": b"another model"}, "acme/tiny-2/")
    client = server.client
    client.put_object(Bucket=BUCKET, Key=PREFIX, Body=b"")  # what consoles make of a new folder
    new.publish()
    assert server.contents("acme/tiny-2/") == {"x": b"another model"}
    assert server.contents(PREFIX) == {**new.published, "": b""}


def test_a_listing_that_is_none_of_ours(server: S3Server, new: Made) -> None:
    put(server, {LISTING: b'{"bom": []}'}, PREFIX)
    with pytest.raises(ConflictError, match="not a listing that we wrote"):
        new.publish()


def test_what_somebody_changed_is_sent_again(server: S3Server, new: Made) -> None:
    new.publish()
    middle = bytearray(NEW["model-3.safetensors"])
    middle[len(middle) // 2] ^= 1
    server.client.put_object(Bucket=BUCKET, Key=PREFIX + "model-3.safetensors", Body=bytes(middle))
    server.client.delete_object(Bucket=BUCKET, Key=PREFIX + "README.md")
    assert new.publish() is True
    assert server.contents(PREFIX) == new.published


def test_a_damaged_artifact_is_not_published(server: S3Server, old: Made, new: Made) -> None:
    old.publish()
    entries, paths = write_files(new.folder, NEW)
    paths["model-3.safetensors"].write_bytes(NEW["model-3.safetensors"][:-1] + b"!")
    server.forget()
    with pytest.raises(SourceError, match="sha256 differs") as caught:
        publish_url(open_place(URL), entries, paths, new.folder / "lock", lambda *_: None)
    assert caught.value.exit_code == 3
    assert server.count("PUT|POST|DELETE") == 0
    assert server.contents(PREFIX) == old.published


# kills


def _publish_in_a_child(made: Made, url: str, variables: Mapping[str, str]) -> None:
    os.environ.update(variables)
    made.publish(url)


class Killer:
    """Ends a publishing process when the server gets its n-th request, or has obeyed it."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["s3fs", "quantize.bucket.target", "test_url_target"])

    def run(self, made: Made, url: str, number: int, pattern: str = "") -> str | None:
        """The request at which the process was killed; None if it finished before.

        That is the n-th one that matches, before it is obeyed. The state is also that of a kill
        after the request before it.
        """
        server = self.server
        variables = {**credentials(server), "AWS_MAX_ATTEMPTS": "1"}
        child = self.context.Process(target=_publish_in_a_child, args=(made, url, variables))
        hit: list[str] = []
        counter = itertools.count(1)

        def kill(_: int, request: str) -> int | None:
            if not hit and re.match(pattern, request) and next(counter) == number:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                hit.append(request)
            return 503 if hit else None

        server.forget()
        server.before = kill
        child.start()
        child.join()
        assert child.exitcode == (-signal.SIGKILL if hit else 0)
        log = server.requests
        server.forget()
        server.requests = log
        return hit[0] if hit else None


def check_reader(contents: Mapping[str, bytes], *versions: Made) -> None:
    """A listing tells the truth; a config.json stands beside one whole version, never a mixture."""
    if is_listed_truly(contents):
        assert any(contents.items() >= made.published.items() for made in versions)
    if "config.json" in contents:
        assert any(contents.items() >= made.contents.items() for made in versions)


@pytest.mark.parametrize("pattern", ["", "PUT|POST|DELETE"], ids=["replaces", "first"])
def test_a_kill_at_each_request(server: S3Server, old: Made, new: Made, pattern: str) -> None:
    """At every request where a publish replaces another; at every write where it is the first."""
    killer = Killer(server)
    schedules = 0
    for number in range(1, 60):
        prefix = f"run-{number}/"
        url = f"s3://{BUCKET}/run-{number}"
        put(server, {} if pattern else old.published, prefix)
        request = killer.run(new, url, number, pattern)
        contents = server.contents(prefix)
        if request is None:
            assert contents == new.published
            break
        schedules += 1
        check_reader(contents, old, new)
        new.publish(url)
        assert server.contents(prefix) == new.published, request
        for name in NEW.keys() - {"config.json"}:
            times = server.count(f"PUT /{BUCKET}/{prefix}{name}$")
            assert times <= 1 + (f"/{name}" in request), (request, name)
        uploads = server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        assert not uploads, request
    assert schedules >= (10 if pattern else 20), schedules


def test_a_kill_and_then_another_model(server: S3Server, old: Made, new: Made) -> None:
    killer = Killer(server)
    assert killer.run(old, URL, 8) is not None
    assert PUBLISHING in server.contents(PREFIX)
    new.publish()
    assert server.contents(PREFIX) == new.published


# answers that are errors


def failing(server: S3Server, pattern: str, status: int) -> None:
    """Every request that matches is answered with this status."""
    server.before = lambda _, request: status if re.match(pattern, request) else None


def test_a_server_that_fails_once(server: S3Server, old: Made, new: Made) -> None:
    put(server, old.published, PREFIX)
    server.forget()
    new.publish()
    for number in range(1, len(server.requests) + 1):
        put(server, old.published, PREFIX)
        server.forget()
        server.before = lambda count, _, number=number: 500 if count == number else None
        with pytest.raises(TransientError) as caught:
            new.publish()
        assert caught.value.exit_code == 75
        server.forget()
        check_reader(server.contents(PREFIX), old, new)
        new.publish()
        assert server.contents(PREFIX) == new.published


@pytest.mark.parametrize(
    ("pattern", "status", "error"),
    [
        ("PUT .*publishing", 403, CredentialsError),
        ("GET", 403, CredentialsError),
        ("PUT .*model-2", 507, ResourceError),
        ("PUT .*model-2", 503, TransientError),
        ("PUT .*model-2", 429, TransientError),
        ("PUT .*model-2", 501, ToolError),
    ],
)
def test_answers_become_our_errors(
    server: S3Server, new: Made, pattern: str, status: int, error: type[QuantizeError]
) -> None:
    failing(server, pattern, status)
    with pytest.raises(error) as caught:
        new.publish()
    assert type(caught.value) is error
    assert str(status) in caught.value.message and caught.value.hint
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (301, "PermanentRedirect", UsageError),
        (400, "AuthorizationHeaderMalformed", UsageError),
        (400, "ExpiredToken", CredentialsError),
        (403, "RequestTimeTooSkewed", CredentialsError),
        (403, "QuotaExceeded", ResourceError),
        (400, "BadDigest", TransientError),
        (400, "MalformedXML", ToolError),
    ],
)
def test_codes_become_our_errors(status: int, code: str, error: type[QuantizeError]) -> None:
    answer: Any = {
        "Error": {"Code": code, "Message": "said"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    raised = OSError(22, "as s3fs wraps it")
    raised.__cause__ = ClientError(answer, "PutObject")
    made = translate(URL, "sending it", raised)
    assert type(made) is error
    assert made.message == f"S3 answered {status} {code} while sending it: said"
    assert made.hint


def test_no_such_bucket(server: S3Server, new: Made) -> None:
    for action in (lambda: check_url("s3://absent/x"), lambda: new.publish("s3://absent/x")):
        with pytest.raises(UsageError, match="no bucket absent") as caught:
            action()
        assert caught.value.exit_code == 2
    assert server.count("PUT") == 0


def test_no_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(CredentialsError, match="no permission") as caught:
        check_url(URL)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    assert server.requests == []


def test_a_server_that_is_not_there(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="the connection failed while listing"):
        check_url(URL)


def test_preflight_may_write_and_leaves_nothing(server: S3Server) -> None:
    check_url(URL)
    assert server.contents() == {}
    assert not server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    failing(server, r"POST .*\?uploads", 403)
    with pytest.raises(CredentialsError, match="asking whether"):
        check_url(URL)


def test_another_run_at_the_same_time(server: S3Server, old: Made, new: Made) -> None:
    def meanwhile(_: int, request: str) -> None:
        if request.startswith("PUT") and "model-2" in request:
            server.after = lambda number, request: None
            server.client.put_object(Bucket=BUCKET, Key=PREFIX + PUBLISHING, Body=b"{}")

    server.after = meanwhile
    with pytest.raises(ConflictError, match="another run is publishing"):
        new.publish()
    assert LISTING not in server.contents(PREFIX)


def test_files_that_appear_meanwhile(server: S3Server, new: Made) -> None:
    def meanwhile(_: int, request: str) -> None:
        if request.startswith("PUT") and "model-2" in request:
            server.after = lambda number, request: None
            server.client.put_object(Bucket=BUCKET, Key=PREFIX + "model-9.safetensors", Body=b"")

    server.after = meanwhile
    with pytest.raises(ConflictError, match="got files of others"):
        new.publish()
    assert LISTING not in server.contents(PREFIX)


def test_a_store_that_loses_a_byte(server: S3Server, new: Made) -> None:
    def meanwhile(_: int, request: str) -> None:
        if request.startswith("PUT") and "model-2" in request:
            server.after = lambda number, request: None
            body = NEW["model-2.safetensors"][:-1] + b"!"
            server.client.put_object(Bucket=BUCKET, Key=PREFIX + "model-2.safetensors", Body=body)

    server.after = meanwhile
    with pytest.raises(ToolError, match=r"does not hold what was sent: model-2\.safetensors"):
        new.publish()
    assert LISTING not in server.contents(PREFIX)
    new.publish()
    assert server.contents(PREFIX) == new.published


@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART - 1, 2 * PART, 2 * PART + 1, 3 * PART])
def test_an_etag_is_what_the_server_says(server: S3Server, tmp_path: Path, size: int) -> None:
    made = Made(tmp_path / "made", {"a": os.urandom(size)})
    made.publish()
    found = server.client.head_object(Bucket=BUCKET, Key=PREFIX + "a")["ETag"]
    assert etag_of(made.folder / "a", PART) == found.strip('"')


def test_a_bucket_that_tells_no_md5(
    server: S3Server, new: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is encrypted with a key of KMS: files are read back whole instead."""
    monkeypatch.setattr("quantize.bucket.target.etag_of", lambda path, part_bytes: "0" * 32)
    new.publish()
    assert server.count("GET .*model-3") == 1
    assert new.publish() is False


# other places


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_url(old: Made, new: Made, tmp_path: Path) -> None:
    target = tmp_path / "mnt" / "models"
    url = f"file://{target}"
    check_url(url)
    assert not target.parent.exists()
    assert old.publish(url) and not old.publish(url)
    assert folder_contents(target) == old.published
    assert new.publish(url)
    assert folder_contents(target) == new.published
    (target / "model-2.safetensors").write_bytes(b"changed")
    assert new.publish(url)
    assert folder_contents(target) == new.published
    (target / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ConflictError, match=r"thesis\.tex"):
        new.publish(url)


def test_half_a_file_and_half_a_note(old: Made, new: Made, tmp_path: Path) -> None:
    """A local disk writes a file bit by bit: a kill leaves the beginning under its name."""
    target = tmp_path / "models"
    url = f"file://{target}"
    old.publish(url)
    (target / PUBLISHING).write_bytes(b'{"schema": "quantize.publ')
    assert new.publish(url)
    assert folder_contents(target) == new.published
    (target / LISTING).unlink()
    (target / PUBLISHING).write_text(
        json.dumps({"schema": "quantize.publishing/1", "files": [], "changing": sorted(NEW)})
    )
    (target / "model-2.safetensors").write_bytes(b"n" * 4999 + b"?")
    (target / LISTING).write_bytes(b'{"schema"')
    assert new.publish(url)
    assert folder_contents(target) == new.published


def test_a_disk_that_refuses(new: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match="no such place"):
        new.publish(f"file://{tmp_path}/file/models")
    with pytest.raises(ConflictError, match="it is a file"):
        new.publish(f"file://{tmp_path}/file")


def test_memory(new: Made) -> None:
    """A backend without checksums and without a disk."""
    import fsspec

    assert new.publish("memory://models/tiny") is True
    assert new.publish("memory://models/tiny") is False
    found = fsspec.filesystem("memory").find("/models/tiny")
    assert {path.removeprefix("/models/tiny/") for path in found} == new.published.keys()


def test_backends_that_are_missing() -> None:
    with pytest.raises(ResourceError, match="the backend of gs:// is not installed") as caught:
        open_place("gs://bucket/x")
    assert caught.value.hint == "pip install 'gcsfs'"
    with pytest.raises(UsageError, match="fsspec knows no nonsense://"):
        open_place("nonsense://bucket/x")


def test_messages_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_KEY", "canary-of-the-environment")
    said: Any = "GET https://ann:pw@host/x?X-Amz-Signature=abc with canary-of-the-environment"
    assert clean(said) == "GET https://host/x?… with …"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://ann:pw@host:9000/")
    assert endpoint(URL) == "http://host:9000"
    assert endpoint("file:///x") is None
    assert KEY_ID not in clean(f"key {KEY_ID}") or "AWS_ACCESS_KEY_ID" not in os.environ
