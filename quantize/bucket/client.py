"""Any place that fsspec can write to, as a flat set of named files; its errors turned into ours.

Credentials are the backend's own: variables, `~/.aws` and the like; `AWS_ENDPOINT_URL` names an S3
other than Amazon's. fsspec and its backends are imported inside functions, because a plan that
publishes to no URL must not pay for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from quantize.bucket.errors import translate
from quantize.errors import CredentialsError, QuantizeError, ResourceError, UsageError

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
PART_BYTES = 50 << 20
"""S3: how large the parts of a large file are. A file below two of them is sent as one."""
PARTS_AT_ONCE = 4  # in memory together

S3 = frozenset({"s3", "s3a"})
OBJECT_STORES = S3 | {"gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "ocis"}
"""Without folders: making one would make a bucket."""
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")


@dataclass(frozen=True)
class Place:
    """A folder, or a bucket with a prefix, and the file system that reaches it."""

    url: str
    filesystem: Any  # an fsspec.AbstractFileSystem
    root: str  # how the file system itself calls it
    part_bytes: int = PART_BYTES

    @property
    def scheme(self) -> str:
        """What the URL begins with, without the colon."""
        return urlsplit(self.url).scheme

    @property
    def tells_md5(self) -> bool:
        """Whether :attr:`RemoteFile.etag` says something of a file's content."""
        return self.scheme in S3

    def path(self, name: str) -> str:
        """How the file system calls the file `name`."""
        return f"{self.root}/{name}"


@dataclass(frozen=True)
class RemoteFile:
    """A file as a listing shows it. `etag` is S3's: of one part its MD5, see :func:`etag_of`."""

    bytes: int
    etag: str | None = None


def endpoint(url: str) -> str | None:
    """S3: the address that variables name instead of Amazon's, without a password in it."""
    if urlsplit(url).scheme not in S3:
        return None
    named = next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    return re.sub(r"//[^/@]*@", "//", named.rstrip("/")) if named else None


def open_place(url: str, part_bytes: int = PART_BYTES) -> Place:
    """The place that `url` names; no request is sent yet.

    Raises UsageError for a scheme that fsspec does not know, ResourceError for one whose backend is
    not installed.
    """
    import fsspec
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = urlsplit(url).scheme
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None)
        missing = missing or known_implementations[scheme]["class"].partition(".")[0]
        package = "quantize[s3]" if missing == "s3fs" else missing.partition(".")[0]
        raise ResourceError(
            f"publish.url is {url}, and the backend of {scheme}:// is not installed",
            f"pip install '{package}'",
        ) from error
    except ValueError as error:
        raise UsageError(
            f"publish.url is {url}, and fsspec knows no {scheme}://",
            "use s3://, gs://, abfs://, sftp://, file:// or another one that it knows",
        ) from error
    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in OBJECT_STORES:  # others hand options that they do not know on, sftp to SSH
        options["use_listings_cache"] = False
    if scheme == "file":
        options["auto_mkdir"] = True
    try:
        filesystem, root = url_to_fs(url, **options)
    except Exception as error:
        raise translate(url, f"opening {url}", error) from error
    return Place(url, filesystem, root.rstrip("/"), part_bytes)


def list_files(place: Place) -> dict[str, RemoteFile]:
    """Every file below the place by its name there; none where there is nothing yet.

    Empty objects that stand for a folder (consoles make them) do not count.
    """
    filesystem = place.filesystem

    def find() -> dict[str, Any]:
        filesystem.invalidate_cache()
        if place.scheme in S3:  # an absent bucket and an empty one look alike in a search
            bucket, _, _ = filesystem.split_path(place.root)
            filesystem.call_s3("head_bucket", Bucket=bucket)
        found: dict[str, Any] = filesystem.find(place.root, detail=True)
        return found

    found = _call(place, f"listing {place.url}", find)
    files = {}
    for path, info in found.items():
        name = path.removeprefix(place.root).lstrip("/")
        if info["type"] == "directory" or (not info["size"] and path.endswith("/")):
            continue
        etag = info.get("ETag") if place.tells_md5 else None
        files[name] = RemoteFile(info["size"], etag.strip('"') if etag else None)
    return files


def read(place: Place, name: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file from `start` up to `end`."""
    path = place.path(name)

    def get() -> bytes:
        content: bytes = place.filesystem.cat_file(path, start=start, end=end)
        return content

    return _call(place, f"reading {place.url}/{name}", get)


def fetch(place: Place, name: str, target: Path) -> None:
    """Bring a file of any size here."""
    path = place.path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    _call(
        place,
        f"reading {place.url}/{name}",
        lambda: place.filesystem.get_file(path, str(target)),
    )


def fetch_if_there(place: Place, name: str, target: Path) -> bool:
    """As :func:`fetch`; False where there is no such file."""
    if name not in list_files(place):
        return False
    fetch(place, name, target)
    return True


def sha256(place: Place, name: str, size: int) -> str:
    """Of a file that is read back whole, in chunks."""
    digest = hashlib.sha256()
    step = 16 * CHUNK_BYTES
    for start in range(0, size, step):
        digest.update(read(place, name, start, min(start + step, size)))
    return digest.hexdigest()


def write(place: Place, name: str, content: bytes) -> None:
    """A small file, at once."""
    path = place.path(name)

    def pipe() -> None:
        _make_parent(place, path)
        place.filesystem.pipe_file(path, content)

    _call(place, f"writing {place.url}/{name}", pipe)


def send(place: Place, name: str, source: Path, advance: Callable[[int], None]) -> None:
    """A local file of any size, streamed; `advance` is told bytes as they are sent."""
    from fsspec.callbacks import Callback

    class Advance(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    path = place.path(name)
    options = (
        {"chunksize": place.part_bytes, "max_concurrency": PARTS_AT_ONCE}
        if place.scheme in S3
        else {}
    )

    def put() -> None:
        _make_parent(place, path)
        place.filesystem.put_file(str(source), path, callback=Advance(), **options)

    _call(place, f"sending {place.url}/{name}", put)


def delete(place: Place, name: str) -> None:
    """Delete a file; that it is gone already is as well."""

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            place.filesystem.rm_file(place.path(name))

    _call(place, f"deleting {place.url}/{name}", remove)


def discard_unfinished(place: Place) -> None:
    """S3: drop parts of files that a killed run left; they cost money and no listing shows them."""
    if place.scheme not in S3:
        return
    filesystem = place.filesystem
    bucket, prefix, _ = filesystem.split_path(place.path(""))
    with contextlib.suppress(OSError):  # not every S3 knows this request, or allows it
        found = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        for upload in found.get("Uploads", []):
            filesystem.abort_mpu(bucket, upload["Key"], upload["UploadId"])


def require_write(place: Place) -> None:
    """CredentialsError if writing is not allowed, as far as can be told without writing.

    S3: an upload of several parts is begun and given up, which needs the same permission and leaves
    nothing. A local folder's own permissions are read. Other places say it at the first write.
    """
    if place.scheme in S3:
        filesystem = place.filesystem
        bucket, key, _ = filesystem.split_path(place.path("quantize/manifest.json"))

        def begin() -> None:
            begun = filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
            filesystem.abort_mpu(bucket, key, begun["UploadId"])

        _call(place, f"asking whether {place.url} may be written", begin)
    elif place.scheme == "file":
        folders = (Path(place.root), *Path(place.root).parents)
        existing = next(folder for folder in folders if folder.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise CredentialsError(f"{existing} may not be written", "correct its permissions")


def etag_of(path: Path, part_bytes: int = PART_BYTES) -> str:
    """The ETag of a file that :func:`send` sent to S3.

    The MD5 of its content; from two parts on the MD5 of the parts' MD5s (binary, joined), a dash,
    and their number. Buckets encrypted with a key of KMS answer something else.
    """
    size = path.stat().st_size
    if size < 2 * part_bytes:
        return next(_md5s(path, size + 1)).hex()
    parts = list(_md5s(path, part_bytes))
    whole = hashlib.md5(b"".join(parts), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(parts)}"


def _md5s(path: Path, part_bytes: int) -> Iterator[bytes]:
    """The MD5 of each part."""
    with path.open("rb") as file:
        while True:
            digest, left = hashlib.md5(usedforsecurity=False), part_bytes
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                digest.update(chunk)
                left -= len(chunk)
            yield digest.digest()
            if left or not file.peek(1):
                return


def _make_parent(place: Place, path: str) -> None:
    if place.scheme not in OBJECT_STORES:
        place.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)


def _call(place: Place, what: str, action: Callable[[], T]) -> T:
    """`action()`; what it raises becomes an error of ours. Backends repeat requests themselves."""
    try:
        return action()
    except QuantizeError:
        raise
    except Exception as error:
        raise translate(place.url, what, error) from error
