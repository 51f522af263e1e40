"""The protocol over HTTP: reads a request, asks the fault plan, then the routes."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.hub_server import (
    routes_community,
    routes_read,
    routes_repo,
    routes_upload,
    routes_xet,
)
from tests.hub_server.accounts import Refused
from tests.hub_server.faults import Fault, corrupt_answer, corrupt_request, pieces
from tests.hub_server.messages import Answer, Asked, Seen

if TYPE_CHECKING:
    from tests.hub_server.server import Listener

ROUTES: list[tuple[str, str, Callable[[Asked], Answer]]] = [
    *routes_repo.ROUTES,
    *routes_upload.ROUTES,
    *routes_community.ROUTES,
    *routes_read.ROUTES,
    *routes_xet.ROUTES,
]


class _Cut(Exception):
    """The connection ends in the middle of the request's body; `received` bytes came."""

    def __init__(self, received: int) -> None:
        super().__init__(received)
        self.received = received


class Handler(BaseHTTPRequestHandler):
    """One connection; its requests are answered one after another."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 << 10
    server: Listener

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
        token = self.headers.get("Authorization")
        account = None
        if not path.startswith(routes_xet.WITHOUT_ACCOUNT):
            account = hub_server.hub.account(token)
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
