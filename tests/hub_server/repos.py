"""A repository: files, commits, branches, tags, pull requests, and objects without a commit."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from tests.hub_server.accounts import Refused
from tests.hub_server.cards import front_matter


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


@dataclass(frozen=True)
class PullRequest:
    """A pull request; its commits are those of `refs/pr/<number>`."""

    number: int
    title: str
    description: str
    author: str
    base: str = "main"
    status: str = "draft"  # draft, open, closed, merged
    merge_commit: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass
class Repo:
    """One repository: commits by id, what points to them, and objects that no commit names yet."""

    id: str
    type: str
    private: bool
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)
    pull_heads: dict[str, str] = field(default_factory=dict)  # refs/pr/N → commit
    commits: dict[str, Tree] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # by sha256; complete and checked
    unverified: dict[str, bytes] = field(default_factory=dict)  # bytes with another sha256
    parts: dict[tuple[str, str], dict[int, bytes]] = field(default_factory=dict)  # (oid, upload)

    def copy(self) -> Repo:
        """Another repository with the same state; files are immutable and shared."""
        return replace(
            self,
            branches=dict(self.branches),
            tags=dict(self.tags),
            pulls=dict(self.pulls),
            pull_heads=dict(self.pull_heads),
            commits={commit: dict(tree) for commit, tree in self.commits.items()},
            messages=list(self.messages),
            objects=dict(self.objects),
            unverified=dict(self.unverified),
            parts={key: dict(parts) for key, parts in self.parts.items()},
        )

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag, pull request or commit id."""
        for names in (self.branches, self.tags, self.pull_heads):
            revision = names.get(revision, revision)
        if revision not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision

    def tree(self, revision: str) -> Tree:
        return self.commits[self.resolve(revision)]

    def commit(self, ref: str, tree: Tree, message: str) -> str:
        """Move a branch or ``refs/pr/N`` to a new commit."""
        heads = self.pull_heads if ref in self.pull_heads else self.branches
        parent = heads.get(ref, "")
        text = repr(
            (len(self.commits), parent, message, sorted((n, f.etag) for n, f in tree.items()))
        )
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = tree
        heads[ref] = commit
        self.messages.append(message)
        return commit

    def apply(self, ref: str, lines: list[dict[str, Any]]) -> str:
        """One commit from the lines of the request, or Refused and nothing changed."""
        header = lines[0]["value"]
        if ref not in self.branches and ref not in self.pull_heads:
            raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        self._expect_parent(ref, header)
        return self.commit(ref, self._changed(self.tree(ref), lines[1:]), header["summary"])

    def propose(self, base: str, lines: list[dict[str, Any]], author: str) -> PullRequest:
        """A new open pull request that holds one commit, as ``create_pr=1`` makes it."""
        header = lines[0]["value"]
        self._expect_parent(base, header)
        tree = self._changed(self.tree(base), lines[1:])
        pull = self.open_pull(header["summary"], header.get("description", ""), author, base)
        self.pulls[pull.number] = pull = replace(pull, status="open")
        self.commit(pull.ref, tree, header["summary"])
        return pull

    def open_pull(self, title: str, description: str, author: str, base: str) -> PullRequest:
        """A draft without a commit of its own; its ref is at the base's head."""
        head = self.resolve(base)
        pull = PullRequest(max(self.pulls, default=0) + 1, title, description, author, base)
        self.pulls[pull.number] = pull
        self.pull_heads[pull.ref] = head
        return pull

    def merge(self, number: int) -> str:
        """Merge a pull request, as its button on the Hub does: one commit on the base."""
        pull = self.pulls[number]
        if pull.status not in ("open", "draft"):
            raise Refused(409, f"This pull request is {pull.status}")
        commit = self.commit(pull.base, self.tree(pull.ref), f"{pull.title} (#{number})")
        self.pulls[number] = replace(pull, status="merged", merge_commit=commit)
        return commit

    def card(self, revision: str) -> dict[str, Any] | None:
        readme = self.tree(revision).get("README.md")
        return front_matter(readme.content.decode()) if readme else None

    def _expect_parent(self, ref: str, header: dict[str, Any]) -> None:
        parent = header.get("parentCommit")
        if parent is not None and parent != self.resolve(ref):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")

    def _changed(self, before: Tree, lines: list[dict[str, Any]]) -> Tree:
        tree = dict(before)
        for line in lines:
            value = line["value"]
            name = value["path"]
            match line["key"]:
                case "file":
                    tree[name] = File(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                    tree[name] = File(self.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    if tree.pop(name, None) is None:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    inside = [path for path in tree if path.startswith(name.rstrip("/") + "/")]
                    if not inside:
                        raise Refused(404, "A folder with this name doesn't exist", "EntryNotFound")
                    for path in inside:
                        del tree[path]
                case key:
                    raise Refused(400, f"{key} is not supported here")
        if "README.md" in tree:
            front_matter(tree["README.md"].content.decode())
        return tree
