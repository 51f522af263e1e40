"""Everything that the server knows, in memory: accounts, repositories, collections; no HTTP."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pathspec

from tests.hub_server.accounts import Account, Refused
from tests.hub_server.cards import front_matter
from tests.hub_server.repos import File, PullRequest, Repo, Tree

__all__ = [
    "Account",
    "Collection",
    "File",
    "Hub",
    "Limits",
    "PullRequest",
    "Refused",
    "Repo",
    "Tree",
    "front_matter",
]

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Collection:
    """A collection; `items` are (type, id, note)."""

    slug: str
    title: str
    owner: str
    private: bool = False
    items: list[tuple[str, str, str | None]] = field(default_factory=list)


@dataclass
class Limits:
    """Sizes from which the Hub behaves in another way, and what it allows at most."""

    lfs_bytes: int = 10 << 20  # larger files are stored as LFS objects whatever their name
    multipart_bytes: int = 64 << 20  # larger objects are uploaded in parts of `part_bytes`
    part_bytes: int = 16 << 20
    commit_bytes: int = 100 << 20  # of the commit request's body
    private_bytes: Mapping[str, int] = field(default_factory=dict)  # storage by namespace
    payment_required: frozenset[str] = frozenset()  # namespaces


class Hub:
    """The state. Methods raise :class:`Refused`."""

    def __init__(self, accounts: Mapping[str, Account], limits: Limits | None = None) -> None:
        self.accounts = dict(accounts)  # by token
        self.expired: set[str] = set()  # tokens that were good once
        self.repos: dict[tuple[str, str], Repo] = {}  # by (type, id)
        self.collections: dict[str, Collection] = {}  # by slug
        self.limits = limits or Limits()
        self.lock = threading.RLock()

    def copy(self) -> Hub:
        """The same state again, to go back to it later."""
        copy = Hub(self.accounts, self.limits)
        copy.repos = {key: repo.copy() for key, repo in self.repos.items()}
        copy.collections = {
            slug: Collection(one.slug, one.title, one.owner, one.private, list(one.items))
            for slug, one in self.collections.items()
        }
        return copy

    def account(self, authorization: str | None) -> Account | None:
        """Whose token this is; None without one."""
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        account = self.accounts.get(token)
        if account is None or token in self.expired:
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
        large = name.endswith(".safetensors") or size > self.limits.lfs_bytes or b"\0" in sample
        return "lfs" if large else "regular"

    def ignored(self, repo: Repo, revision: str, names: list[str], own: str | None) -> set[str]:
        """The names that a .gitignore leaves out: the request's own, or the repository's."""
        there = repo.tree(revision).get(".gitignore")
        text = own if own is not None else there.content.decode() if there else ""
        return set(pathspec.GitIgnoreSpec.from_lines(text.splitlines()).match_files(names))

    def check_storage(self, repo: Repo, more_bytes: int) -> None:
        """Refuse what the namespace's storage has no place for."""
        namespace = repo.id.partition("/")[0]
        if namespace in self.limits.payment_required:
            raise Refused(402, "Payment required: add a payment method to store more")
        limit = self.limits.private_bytes.get(namespace)
        if limit is None or not repo.private:
            return
        used = sum(
            len(content)
            for other in self.repos.values()
            if other.private and other.id.partition("/")[0] == namespace
            for content in other.objects.values()
        )
        if used + more_bytes > limit:
            raise Refused(
                403,
                "Private repository storage limit reached, please upgrade your plan to increase "
                "your private storage limit.",
            )

    def apply(self, repo: Repo, ref: str, lines: list[dict[str, Any]]) -> str:
        """One commit from the lines of the request, or Refused and nothing changed."""
        return repo.apply(ref, lines)

    def collection(self, slug: str, account: Account | None) -> Collection:
        found = self.collections.get(slug)
        if found is None or (found.private and not (account and account.may_read(found.slug))):
            raise Refused(404, "Collection not found")
        return found

    def create_collection(self, title: str, owner: str, private: bool = False) -> Collection:
        """A collection; Refused with 409 if the owner has one of that title."""
        slug = f"{owner}/{'-'.join(title.lower().split())}-{len(self.collections):024x}"
        for other in self.collections.values():
            if (other.owner, other.title) == (owner, title):
                raise Refused(409, other.slug)
        self.collections[slug] = Collection(slug, title, owner, private)
        return self.collections[slug]
