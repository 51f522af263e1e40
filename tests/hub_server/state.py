"""Repositories, commits, blobs and accounts in memory; no HTTP here."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_BYTES = 10 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")


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


@dataclass(frozen=True)
class File:
    """A file of a commit; `lfs` decides which checksum the protocol shows."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {len(self.content)}\n"
        ).encode()

    @property
    def blob_id(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


Tree = dict[str, File]


@dataclass
class Repo:
    """One repository: commits by id, branches, and large objects that no commit names yet."""

    id: str
    type: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def tree(self, revision: str) -> Tree:
        return self.commits[self.resolve(revision)]

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        parent = self.branches.get(branch, "")
        text = repr(
            (len(self.commits), parent, message, sorted((n, f.etag) for n, f in tree.items()))
        )
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = tree
        self.branches[branch] = commit
        self.messages.append(message)
        return commit

    def card(self, revision: str) -> dict[str, Any] | None:
        readme = self.tree(revision).get("README.md")
        return front_matter(readme.content.decode()) if readme else None


class Hub:
    """Everything the server knows. Methods raise :class:`Refused`."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        self.accounts = dict(accounts)  # by token
        self.repos: dict[tuple[str, str], Repo] = {}  # by (type, id)
        self.lock = threading.RLock()

    def account(self, authorization: str | None) -> Account | None:
        """Whose token this is; None without one."""
        if authorization is None:
            return None
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account

    def create(self, repo_type: str, repo_id: str, private: bool) -> Repo:
        if (repo_type, repo_id) in self.repos:
            raise Refused(409, f"You already created this {repo_type} repo")
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private)
        repo.commit("main", {".gitattributes": File(GITATTRIBUTES, lfs=False)}, "initial commit")
        return repo

    def readable(self, repo_type: str, repo_id: str, account: Account | None) -> Repo:
        repo = self.repos.get((repo_type, repo_id))
        hidden = repo is None or (repo.private and not (account and account.may_read(repo_id)))
        if repo is None or hidden:
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_type: str, repo_id: str, account: Account | None) -> Repo:
        repo = self.readable(repo_type, repo_id, account)
        if account is None or not account.may_write(repo_id):
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def upload_mode(self, name: str, size: int, sample: bytes) -> str:
        large = name.endswith(".safetensors") or size > LFS_BYTES or b"\0" in sample
        return "lfs" if large else "regular"

    def apply(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> str:
        """One commit from the lines of the request, or Refused and nothing changed."""
        header = lines[0]["value"]
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = header.get("parentCommit")
        if parent is not None and parent != repo.branches[branch]:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.tree(branch))
        for line in lines[1:]:
            value = line["value"]
            name = value["path"]
            if line["key"] == "file":
                tree[name] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                tree[name] = File(repo.objects[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                if tree.pop(name, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"{line['key']} is not supported here")
        if "README.md" in tree:
            front_matter(tree["README.md"].content.decode())
        return repo.commit(branch, tree, header["summary"])


def front_matter(text: str) -> dict[str, Any] | None:
    """The YAML between the first two ``---`` lines, or None; Refused if it is not a mapping."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return None
    try:
        value = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise Refused(400, f"Invalid YAML metadata: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "YAML metadata is not a mapping")
    return value
