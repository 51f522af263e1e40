"""The protocol over HTTP: one handler for all routes, the request log, the planned faults."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server import routes_community, routes_read, routes_repo, routes_upload
from tests.hub_server.accounts import Refused
from tests.hub_server.faults import (
    NONE,
    Fault,
    Gate,
    corrupt_answer,
    corrupt_request,
    pieces,
)
from tests.hub_server.messages import API, Answer, Asked, Seen
from tests.hub_server.repos import File
from tests.hub_server.state import Hub

ROUTES: list[tuple[str, str, Callable[[Asked], Answer]]] = [
    *routes_repo.ROUTES,
    *routes_upload.ROUTES,
    *routes_community.ROUTES,
    *routes_read.ROUTES,
]


class _Cut(Exception):
    """The connection ends in the middle of the request's body; `received` bytes came."""

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.received = received


class Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the fault plan, then the routes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 << 10
    server: _Server

    def do_GET(self) -> None:
        self._guarded("GET")

    def do_HEAD(self) -> None:
        self._guarded("GET")

    def do_POST(self) -> None:
        self._guarded("POST")

    def do_PUT(self) -> None:
        self._guarded("PUT")

    def do_DELETE(self) -> None:
        self._guarded("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        """The request log is in `HubServer.seen`."""

    def handle(self) -> None:
        with (
            self.server.hub_server.connected(),
            contextlib.suppress(ConnectionError),  # the client was killed
        ):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()

    def _guarded(self, method: str) -> None:
        try:
            self._handle(method)
        except ConnectionError:
            self.close_connection = True

    def _handle(self, method: str) -> None:
        hub_server = self.server.hub_server
        path = urlsplit(self.path).path
        fault = hub_server.next_fault(f"{self.command} {path}")
        if fault.expire_token:
            hub_server.expire(self.headers.get("Authorization"))
        if fault.private_bytes is not None:
            hub_server.limit_storage(path, fault.private_bytes)
        try:
            body = self._body(fault)
        except _Cut as cut:
            hub_server.note(self._seen(path, None, cut.received))
            return self._drop()
        hub_server.note(self._seen(path, body, len(body)))
        if fault.corrupt == "request":
            body = corrupt_request(body)
        if fault.move_head:
            hub_server.move_head(path)
        if fault.before is not None:
            fault.before()
        if fault.drop == "before":
            return self._drop()
        if fault.status is not None:
            headers = {"X-Error-Message": fault.message, **fault.headers}
            answer = Answer({"error": fault.message}, status=fault.status, headers=headers)
        else:
            answer = self._answer(method, path, body)
        if fault.after is not None:
            fault.after()
        if fault.drop == "after":
            return self._drop()
        if fault.corrupt == "answer":
            answer = corrupt_answer(answer)
        return self._send(answer, fault)

    def _answer(self, method: str, path: str, body: bytes) -> Answer:
        hub_server = self.server.hub_server
        with hub_server.hub.lock:
            try:
                return self._routed(method, path, body)
            except Refused as refused:
                headers = {"X-Error-Message": refused.message.splitlines()[0]}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                return Answer({"error": refused.message}, status=refused.status, headers=headers)
            finally:
                hub_server.observe(f"{self.command} {path}")

    def _routed(self, method: str, path: str, body: bytes) -> Answer:
        hub_server = self.server.hub_server
        account = hub_server.hub.account(self.headers.get("Authorization"))
        for wanted, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match is not None:
                query = parse_qs(urlsplit(self.path).query)
                headers = {key.title(): value for key, value in self.headers.items()}
                return route(Asked(match, query, headers, body, account, hub_server))
        raise Refused(404, f"no route for {method} {path}")

    def _body(self, fault: Fault) -> bytes:
        """The whole body, at the fault's speed; `_Cut` at its half where the fault says so."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
            if fault.during is not None:
                fault.during()
            if fault.cut == "request":
                raise _Cut(len(body) // 2)
            return body
        size = int(self.headers.get("Content-Length") or 0)
        first = self._read(size // 2, fault)
        if fault.during is not None:
            fault.during()
        if fault.cut == "request":
            raise _Cut(len(first))
        return first + self._read(size - len(first), fault)

    def _read(self, size: int, fault: Fault) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise _Cut(len(content))
        for _ in pieces(content, fault.bytes_per_second):
            pass
        return content

    def _seen(self, path: str, body: bytes | None, received: int) -> Seen:
        keeps = self.server.hub_server.keep_bodies
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = urlsplit(self.path).query
        return Seen(self.command, path, received, query, headers, body if keeps else None)

    def _send(self, answer: Answer, fault: Fault) -> None:
        content = answer.payload()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        kind = "application/json" if answer.content is None else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        sent = content[: len(content) // 2] if fault.cut == "answer" else content
        if self.command != "HEAD":
            for piece in pieces(sent, fault.bytes_per_second):
                self.wfile.write(piece)
                self.wfile.flush()
        self.wfile.flush()
        if fault.cut == "answer":
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub_server: HubServer


class HubServer:
    """A running server; a context manager. `seen` is every request, `faults` the plan.

    `observers` are called with ``METHOD path`` after each request took its effect, while nothing
    else can change the state.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        port: int = 0,
        faults: tuple[Fault, ...] = (),
        page_size: int = 1000,
        keep_bodies: bool = False,
    ) -> None:
        self.hub, self.page_size, self.keep_bodies = hub, page_size, keep_bodies
        self.faults = list(faults)
        self.seen: list[Seen] = []
        self.observers: list[Callable[[str], object]] = []
        self._lock = threading.Lock()
        self._connections, self._settled = 0, threading.Condition(self._lock)
        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.hub_server = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def cdn(self) -> str:
        """The same server by a name that the client takes for another host."""
        return f"http://localhost:{self._server.server_address[1]}"

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        with self._lock:
            self._connections += 1
        try:
            yield
        finally:
            with self._settled:
                self._connections -= 1
                self._settled.notify_all()

    def settle(self, seconds: float = 30) -> None:
        """Wait until nobody is connected: all that clients sent before they ended took effect."""
        with self._settled:
            if not self._settled.wait_for(lambda: self._connections == 0, seconds):
                raise TimeoutError(f"{self._connections} connections are still open")

    def observe(self, request: str) -> None:
        for observer in self.observers:
            observer(request)

    def next_fault(self, request: str) -> Fault:
        with self._lock:
            return next((fault for fault in self.faults if fault.matches(request)), NONE)

    @contextlib.contextmanager
    def gate(self, pattern: str, at: Literal["before", "after"] = "before") -> Iterator[Gate]:
        """Hold the next such request around its effect; it goes on when the block ends."""
        gate = Gate()
        fault = Fault(pattern, before=gate) if at == "before" else Fault(pattern, after=gate)
        self.faults.append(fault)
        try:
            yield gate
        finally:
            gate.open()

    def expire(self, authorization: str | None) -> None:
        if authorization is not None:
            self.hub.expired.add(authorization.removeprefix("Bearer "))

    def limit_storage(self, path: str, private_bytes: int) -> None:
        namespace = path.removeprefix("/api/models").split("/")[1]
        limits = self.hub.limits
        limits.private_bytes = {**limits.private_bytes, namespace: private_bytes}

    def move_head(self, path: str) -> None:
        """A commit of somebody else's on the branch that a request names."""
        with self.hub.lock:
            match = re.match(API + r"/\w+/(?P<ref>[^/]+)", path)
            if match is None:
                return
            repo = self.hub.repos.get(("model", match["repo"]))
            ref = unquote(match["ref"])
            if repo is not None:
                ref = ref if ref in repo.branches or ref in repo.pull_heads else "main"
                theirs = File(f"{len(repo.messages)}\n".encode(), lfs=False)
                repo.commit(ref, {**repo.tree(ref), "theirs.txt": theirs}, "faster")

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
