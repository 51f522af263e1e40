"""The protocol over HTTP: routes, request log, planned faults."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server.state import Account, File, Hub, Refused, Repo, front_matter

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = r"/api/(?P<type>models|datasets)/" + REPO


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose ``METHOD path`` matches `pattern`.

    Either an answer with `status` (and `headers`), or the connection is closed: `drop="before"` the
    request takes effect, or `drop="after"`. `before` is called first, e.g. to move a branch.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Literal["before", "after"] | None = None
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    method: str
    path: str
    body_bytes: int


@dataclass(frozen=True)
class Answer:
    """What goes back."""

    value: Any = None  # sent as JSON, unless `content` is given
    content: bytes | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A request, read completely."""

    match: re.Match[str]
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None
    server: HubServer

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def json(self) -> Any:
        return json.loads(self.body)

    def part(self, name: str) -> str:
        return unquote(self.match[name])

    @property
    def type(self) -> str:
        return (self.match.groupdict().get("type") or "models").removesuffix("s")

    def readable(self) -> Repo:
        return self.hub.readable(self.type, self.part("repo"), self.account)

    def writable(self) -> Repo:
        return self.hub.writable(self.type, self.part("repo"), self.account)


def whoami(asked: Asked) -> Answer:
    if asked.account is None:
        raise Refused(401, "Invalid username or password.")
    return Answer(asked.account.whoami())


def create_repo(asked: Asked) -> Answer:
    body = asked.json()
    if asked.account is None:
        raise Refused(401, "Invalid username or password.")
    repo_id = f"{body.get('organization') or asked.account.name}/{body['name']}"
    if not asked.account.may_write(repo_id):
        raise Refused(403, f"You don't have the rights to create a model under {repo_id}")
    private = body.get("private") or body.get("visibility") == "private"
    try:
        asked.hub.create(body.get("type") or "model", repo_id, bool(private))
        status = 200
    except Refused as refused:
        status = refused.status
    url = f"{asked.server.endpoint}/{repo_id}"
    return Answer({"url": url, "name": repo_id}, status=status)


def repo_info(asked: Asked) -> Answer:
    repo = asked.readable()
    commit = repo.resolve(unquote(asked.match["revision"] or "main"))
    return Answer(
        {
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit,
            "private": repo.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "cardData": repo.card(commit),
            "siblings": [{"rfilename": name} for name in sorted(repo.tree(commit))],
        }
    )


def refs(asked: Asked) -> Answer:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
        for name, commit in asked.readable().branches.items()
    ]
    return Answer({"branches": branches, "converts": [], "tags": []})


def create_branch(asked: Asked) -> Answer:
    repo, branch = asked.writable(), asked.part("branch")
    if branch in repo.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    start = (asked.json() if asked.body else {}).get("startingPoint", "main")
    repo.branches[branch] = repo.resolve(start)
    return Answer({})


def validate_yaml(asked: Asked) -> Answer:
    try:
        front_matter(asked.json()["content"])
    except Refused as refused:
        return Answer({"errors": [{"message": refused.message}], "warnings": []}, status=400)
    return Answer({"errors": [], "warnings": []})


def preupload(asked: Asked) -> Answer:
    repo = asked.writable()
    tree = repo.tree(asked.part("revision"))
    files = []
    for file in asked.json()["files"]:
        mode = asked.hub.upload_mode(file["path"], file["size"], base64.b64decode(file["sample"]))
        there = tree.get(file["path"])
        entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        files.append(entry | ({"oid": there.etag} if there else {}))
    return Answer({"files": files})


def lfs_batch(asked: Asked) -> Answer:
    repo = asked.writable()
    objects = []
    for item in asked.json()["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in repo.objects:
            base = f"{asked.server.endpoint}/_lfs/{repo.id}"
            entry["actions"] = {
                "upload": {"href": f"{base}/{item['oid']}?signature=secret"},
                "verify": {"href": f"{base}/verify"},
            }
        objects.append(entry)
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(asked: Asked) -> Answer:
    repo = asked.hub.repos["model", asked.part("repo")]
    if asked.query.get("signature") != ["secret"]:
        raise Refused(403, "SignatureDoesNotMatch")
    file = File(asked.body, lfs=True)
    if file.sha256 != asked.part("oid"):
        raise Refused(400, "the bytes have another sha256 than their address")
    repo.objects[file.sha256] = file.content
    return Answer({})


def lfs_verify(asked: Asked) -> Answer:
    item = asked.json()
    if len(asked.writable().objects.get(item["oid"], b"")) != item["size"]:
        raise Refused(404, "object not found")
    return Answer({})


def commit(asked: Asked) -> Answer:
    lines = [json.loads(line) for line in asked.body.splitlines()]
    repo = asked.writable()
    oid = asked.hub.apply(repo, asked.part("revision"), lines)
    url = f"{asked.server.endpoint}/{repo.id}/commit/{oid}"
    return Answer({"success": True, "commitOid": oid, "commitUrl": url})


def describe(name: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": file.blob_id}
    entry["size"] = len(file.content)
    if file.lfs:
        pointer = len(file.pointer)
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": pointer}
    return entry


def tree(asked: Asked) -> Answer:
    """A page of the tree; the `Link` header leads to the next, as the Hub's does."""
    files = asked.readable().tree(asked.part("revision"))
    if asked.query.get("recursive") not in (["true"], ["True"]):
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


def resolve(asked: Asked) -> Answer:
    """A file's bytes, whole or from a `Range`; the client asks with HEAD first."""
    repo = asked.readable()
    oid = repo.resolve(asked.part("revision"))
    file = repo.tree(oid).get(asked.part("path"))
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    start = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("Range") or "")
    if start is None:
        return Answer(content=file.content, headers=headers)
    first, size = int(start[1]), len(file.content)
    headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
    return Answer(content=file.content[first:], status=206, headers=headers)


ROUTES: list[tuple[str, str, Callable[[Asked], Answer]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", repo_info),
    ("GET", API + r"/refs", refs),
    ("POST", API + r"/branch/(?P<branch>[^/]+)", create_branch),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", commit),
    ("GET", API + r"/tree/(?P<revision>[^/]+)", tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", paths_info),
    ("POST", "/" + REPO + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", r"/_lfs/" + REPO + r"/verify", lfs_verify),
    ("PUT", r"/_lfs/" + REPO + r"/(?P<oid>[0-9a-f]{64})", lfs_put),
    (
        "GET",
        r"/(?:(?P<type>datasets)/)?" + REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        resolve,
    ),
]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the fault plan, then the routes."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        """The request log is in `HubServer.seen`."""

    def _handle(self, method: str) -> None:
        hub_server = self.server.hub_server
        body = self._body()
        path = urlsplit(self.path).path
        hub_server.note(Seen(self.command, path, len(body)))
        fault = hub_server.next_fault(f"{self.command} {path}")
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.drop == "before":
            return self._drop()
        if fault is not None and fault.status is not None:
            answer = Answer({"error": "planned"}, status=fault.status, headers=fault.headers)
        else:
            answer = self._answer(method, path, body)
        if fault is not None and fault.drop == "after":
            return self._drop()
        return self._send(answer)

    def _answer(self, method: str, path: str, body: bytes) -> Answer:
        hub_server = self.server.hub_server
        try:
            account = hub_server.hub.account(self.headers.get("Authorization"))
            for wanted, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if wanted == method and match is not None:
                    query = parse_qs(urlsplit(self.path).query)
                    headers = {key.title(): value for key, value in self.headers.items()}
                    asked = Asked(match, query, headers, body, account, hub_server)
                    with hub_server.hub.lock:
                        return route(asked)
            raise Refused(404, f"no route for {method} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message.splitlines()[0]}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            return Answer({"error": refused.message}, status=refused.status, headers=headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: Answer) -> None:
        content = answer.content
        if content is None:
            content = json.dumps(answer.value).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        kind = "application/json" if answer.content is None else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub_server: HubServer


class HubServer:
    """A running server; a context manager. `seen` is every request, `faults` the plan."""

    def __init__(
        self, hub: Hub, *, port: int = 0, faults: tuple[Fault, ...] = (), page_size: int = 1000
    ) -> None:
        self.hub, self.page_size = hub, page_size
        self.faults = list(faults)
        self.seen: list[Seen] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.hub_server = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def next_fault(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        """Requests whose ``METHOD path`` matches."""
        return sum(1 for seen in self.seen if re.search(pattern, f"{seen.method} {seen.path}"))

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
