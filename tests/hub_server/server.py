"""The running server: the request log, the fault plan, and what tests do with both."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import unquote

from tests.hub_server.faults import NONE, Fault, Gate
from tests.hub_server.handler import Handler
from tests.hub_server.messages import API, Seen
from tests.hub_server.repos import File
from tests.hub_server.state import Hub


class Listener(ThreadingHTTPServer):
    """The socket; a thread for each connection."""

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
        self._server = Listener(("127.0.0.1", port), Handler)
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
