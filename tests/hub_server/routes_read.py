"""Reading: listings, and files whole or in part.

An LFS file is answered with a redirect to a signed address under another host name (`localhost`
for `127.0.0.1`), as the Hub redirects to its CDN; that address refuses a token.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from tests.hub_server.accounts import Refused
from tests.hub_server.messages import API, REPO, Answer, Asked
from tests.hub_server.repos import File, Repo

SIGNATURE = "cdn-secret"


def tree(asked: Asked) -> Answer:
    """A page of the tree; the `Link` header leads to the next, as the Hub's does."""
    files = asked.readable().tree(asked.part("revision"))
    if not asked.asks("recursive"):
        raise Refused(400, "only recursive listings are supported here")
    folders = sorted({name.rpartition("/")[0] for name in files} - {""})
    entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    entries += [describe(name, files[name]) for name in sorted(files)]
    start = int(asked.query.get("cursor", ["0"])[0])
    end = start + asked.server.page_size
    headers = {}
    if end < len(entries):
        path = urlsplit(asked.match.string).path
        following = f"{asked.server.endpoint}{path}?recursive=true&cursor={end}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer(entries[start:end], headers=headers)


def paths_info(asked: Asked) -> Answer:
    files = asked.readable().tree(asked.part("revision"))
    body = asked.json() if asked.body.startswith(b"{") else parse_qs(asked.body.decode())
    return Answer([describe(name, files[name]) for name in body["paths"] if name in files])


def describe(name: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": file.blob_id}
    entry["size"] = len(file.content)
    if file.lfs:
        pointer = len(file.pointer)
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": pointer}
    return entry


def resolve(asked: Asked) -> Answer:
    """A file of a commit; the client asks with HEAD first."""
    repo = asked.readable()
    _refuse_without_terms(repo, asked)
    oid, path = repo.resolve(asked.part("revision")), asked.part("path")
    file = repo.tree(oid).get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    if not file.lfs:
        return _whole_or_part(file.content, asked, headers)
    place = f"{repo.type}/{repo.id}/{oid}/{quote(path)}?signature={SIGNATURE}"
    headers |= {
        "X-Linked-ETag": f'"{file.sha256}"',
        "X-Linked-Size": str(len(file.content)),
        "Location": f"{asked.server.cdn}/_cdn/{place}",
    }
    return Answer(content=b"", status=302, headers=headers)


def _refuse_without_terms(repo: Repo, asked: Asked) -> None:
    """Files of a gated repository are for its owners and for those who accepted its terms."""
    account = asked.account
    if not repo.gated or (account and (account.may_read(repo.id) or repo.id in account.accepted)):
        return
    status, who = (401, "log in") if account is None else (403, "ask for access")
    message = f"Access to model {repo.id} is restricted: you must {who}."
    raise Refused(status, message, "GatedRepo")


def cdn(asked: Asked) -> Answer:
    if asked.query.get("signature") != [SIGNATURE]:
        raise Refused(403, "SignatureDoesNotMatch")
    if "Authorization" in asked.headers:
        raise Refused(400, "InvalidArgument: only one auth mechanism allowed")
    repo = asked.hub.repos[asked.match["kind"], asked.part("repo")]
    file = repo.tree(asked.part("commit"))[asked.part("path")]
    headers = {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes"}
    return _whole_or_part(file.content, asked, headers)


def _whole_or_part(content: bytes, asked: Asked, headers: dict[str, str]) -> Answer:
    """All, or the one range that is asked for: ``a-b``, ``a-`` or ``-length`` (RFC 9110)."""
    asked_range = asked.headers.get("Range") or ""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked_range)
    if found is None or asked_range == "bytes=-":
        return Answer(content=content, headers=headers)
    size = len(content)
    if found[1]:
        first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
    else:
        first, last = max(size - int(found[2]), 0), size - 1
    if first > last:
        return Answer(content=b"", status=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(content=content[first : last + 1], status=206, headers=headers)


ROUTES = [
    ("GET", API + r"/tree/(?P<revision>[^/]+)", tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", paths_info),
    (
        "GET",
        r"/(?:(?P<type>datasets)/)?" + REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        resolve,
    ),
    ("GET", r"/_cdn/(?P<kind>\w+)/" + REPO + r"/(?P<commit>[0-9a-f]{40})/(?P<path>.+)", cdn),
]
