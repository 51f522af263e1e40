"""What goes over the wire: a request with who asks, an answer, and the log's entry."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.hub_server.accounts import Account, Refused
from tests.hub_server.repos import Repo
from tests.hub_server.state import Hub

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = r"/api/(?P<type>models|datasets)/" + REPO


@dataclass(frozen=True)
class Seen:
    """A request that arrived. `body_bytes` were received; `body` is kept only when asked for."""

    method: str
    path: str
    body_bytes: int
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case
    body: bytes | None = None

    def searchable(self) -> bytes:
        """All that was sent but the Authorization header, the one place for a token."""
        lines = [f"{self.method} {self.path}?{self.query}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        kept = [line for line in lines if not line.startswith("authorization:")]
        return "\n".join(kept).encode() + b"\n\n" + (self.body or b"")


@dataclass(frozen=True)
class Answer:
    """What goes back."""

    value: Any = None  # sent as JSON, unless `content` is given
    content: bytes | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def payload(self) -> bytes:
        return json.dumps(self.value).encode() if self.content is None else self.content


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
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refused(400, f"the body is not JSON: {error}") from error

    def part(self, name: str) -> str:
        return unquote(self.match[name])

    def asks(self, name: str) -> bool:
        """Whether a query parameter is on, as the client writes it."""
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    @property
    def type(self) -> str:
        return (self.match.groupdict().get("type") or "models").removesuffix("s")

    def someone(self) -> Account:
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        return self.account

    def readable(self) -> Repo:
        return self.hub.readable(self.type, self.part("repo"), self.account)

    def writable(self) -> Repo:
        return self.hub.writable(self.type, self.part("repo"), self.account)

    def proposable(self) -> Repo:
        """The repository that this request may change, or with `create_pr` only read."""
        if not self.asks("create_pr"):
            return self.writable()
        self.someone()
        return self.readable()
