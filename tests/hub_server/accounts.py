"""Who may do what: tokens, organisations, scopes; and the one way to say no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code, message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Account:
    """Who a token is. `role` is read, write or fineGrained; `scopes` is for the last."""

    name: str
    role: str = "write"
    organisations: Mapping[str, str] = field(default_factory=dict)  # name → role in it
    scopes: tuple[dict[str, Any], ...] = ()
    accepted: frozenset[str] = frozenset()  # gated repositories whose terms this account accepted

    def may_write(self, repo: str) -> bool:
        namespace = repo.partition("/")[0]
        if self.role == "read":
            return False
        if self.role == "fineGrained":
            return any(
                scope["entity"]["name"] in (namespace, repo)
                and "repo.write" in scope["permissions"]
                for scope in self.scopes
            )
        return namespace == self.name or self.organisations.get(namespace, "read") != "read"

    def may_read(self, repo: str) -> bool:
        namespace = repo.partition("/")[0]
        return namespace == self.name or namespace in self.organisations

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            token["fineGrained"] = {"global": [], "scoped": list(self.scopes)}
        return {
            "type": "user",
            "name": self.name,
            "orgs": [
                {"type": "org", "name": name, "roleInOrg": role}
                for name, role in self.organisations.items()
            ],
            "auth": {"type": "access_token", "accessToken": token},
        }
