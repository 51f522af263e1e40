"""A repository on the Hub as a target: what it holds, which files are ours, who may see it.

`quantize/manifest.json` in the repository says which files are ours. Ours are replaced, and deleted
when they are gone; files of others are neither overwritten nor deleted.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantize.errors import ConflictError, QuantizeError, SourceError, ToolError
from quantize.hub.client import TRY_AGAIN, Access, call, client
from quantize.hub.repository import COMMIT, RemoteFile, git_blob_id, list_files
from quantize.listing import LISTING, not_as_made, parse_listing
from quantize.store import FileEntry

Visibility = Literal["private", "gated", "public"]
VISIBILITIES: tuple[Visibility, ...] = ("private", "gated", "public")
"""The least open first. Of a gated repository everybody sees the card, and asks for the files."""

MADE_BY_THE_HUB = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE"})
"""What a new repository may hold before our first commit."""


@dataclass(frozen=True)
class Limit:
    """How open a target may be, and why no more: completes "may not be more open, because ..."."""

    visibility: Visibility
    reason: str


@dataclass(frozen=True)
class Target:
    """Where a publish goes: a branch of a model repository, and what else is to be done there."""

    repo: str
    branch: str = "main"
    private: bool = True  # only when the repository is created
    pull_request: bool = False  # against the branch, instead of a commit to it
    tag: str | None = None
    collection: str | None = None
    limit: Limit | None = None


@dataclass(frozen=True)
class Branch:
    """What a commit is built on: a ref as it was read, its head commit and that commit's files."""

    ref: str  # a branch, or refs/pr/N
    head: str
    files: Mapping[str, RemoteFile]
    ours: frozenset[str]  # names that an earlier publish left here, LISTING included
    visibility: Visibility


@dataclass(frozen=True)
class Change:
    """What must happen to a branch so that it holds our files."""

    add: tuple[FileEntry, ...]
    delete: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


class Local:
    """The files to publish: their entries, and where their bytes are, by published name."""

    def __init__(self, entries: Sequence[FileEntry], paths: Mapping[str, Path]) -> None:
        self.entries, self.paths = tuple(entries), paths
        self._blob_ids: dict[str, str] = {}

    def blob_id(self, entry: FileEntry) -> str:
        """The git blob id of the bytes that the entry names; SourceError if the file has others."""
        if entry.name not in self._blob_ids:
            path = self.paths[entry.name]
            content = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise not_as_made(path, "was changed since it was made (sha256 differs)")
            self.remember(entry, content)
        return self._blob_ids[entry.name]

    def remember(self, entry: FileEntry, content: bytes) -> None:
        """The entry's bytes, compared with its sha256: they are sent, whatever the file becomes."""
        self._blob_ids[entry.name] = git_blob_id(content)

    def is_held(self, entry: FileEntry, remote: Mapping[str, RemoteFile]) -> bool:
        """Whether a commit has the entry's bytes under its name."""
        file = remote.get(entry.name)
        if file is None or file.bytes != entry.bytes:
            return False
        if file.sha256 is not None:
            return file.sha256 == entry.sha256
        return file.blob_id == self.blob_id(entry)

    def missing(self, remote: Mapping[str, RemoteFile]) -> tuple[FileEntry, ...]:
        """The entries that a commit does not have, or has with other bytes."""
        return tuple(entry for entry in self.entries if not self.is_held(entry, remote))


def read_branch(access: Access, target: Target, ref: str | None = None) -> Branch | None:
    """The target's branch, or another ref; None when the repository or the ref does not exist.

    A branch whose name looks like a commit is still a branch.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    ref = ref or target.branch
    try:
        info = _info(access, target.repo, ref)
    except SourceError as error:
        if isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
            return None
        raise
    head = _commit_of(access, target, ref, info)
    files = list_files(access, target.repo, head)
    ours = read_listing(access, target.repo, head) if LISTING in files else frozenset()
    return Branch(ref, head, files, ours, _visibility_of(info))


def read_head(access: Access, target: Target, ref: str) -> str:
    """The commit that a ref stands for now."""
    return _commit_of(access, target, ref, _info(access, target.repo, ref))


def read_visibility(access: Access, repo: str) -> Visibility | None:
    """Who may see a repository; None if it does not exist, or not for this token."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return _visibility_of(_info(access, repo, None))
    except QuantizeError as error:
        if isinstance(error.__cause__, GatedRepoError):
            return "gated"
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return None
        raise


def _info(access: Access, repo: str, ref: str | None) -> Any:
    """The client's ModelInfo."""
    api = client(access)
    what = f"reading {repo} at {ref}" if ref else f"reading {repo}"
    return call(access, what, lambda: api.model_info(repo, revision=ref, timeout=60))


def _commit_of(access: Access, target: Target, ref: str, info: Any) -> str:
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ToolError(f"{access.host} named no commit for {ref} of {target.repo}", TRY_AGAIN)
    return str(info.sha)


def _visibility_of(info: Any) -> Visibility:
    if info.private:
        return "private"
    return "gated" if info.gated else "public"


def read_listing(access: Access, repo: str, commit: str) -> frozenset[str]:
    """The names in the listing that an earlier publish left, and its own."""
    text = read_small_file(access, repo, commit, LISTING)
    return frozenset(parse_listing(text, f"{LISTING} of {repo}")) | {LISTING}


def read_small_file(access: Access, repo: str, commit: str, name: str) -> str:
    """A text file of a commit."""
    api = client(access)
    with tempfile.TemporaryDirectory() as folder:
        return call(
            access,
            f"reading {name} of {repo}",
            lambda: Path(
                api.hf_hub_download(repo, name, revision=commit, local_dir=folder)
            ).read_text(encoding="utf-8", errors="replace"),
        )


def create(access: Access, target: Target) -> None:
    """Create what is missing of repository and branch; both may appear meanwhile.

    ConflictError, before anything is created, if that would be more open than the target's limit.
    """
    api = client(access)
    check_visibility(target, read_visibility(access, target.repo))
    call(
        access,
        f"creating {target.repo}",
        lambda: api.create_repo(target.repo, private=target.private, exist_ok=True),
    )
    if target.branch != "main":
        call(
            access,
            f"creating branch {target.branch} of {target.repo}",
            lambda: api.create_branch(target.repo, branch=target.branch, exist_ok=True),
        )


def check_visibility(target: Target, visibility: Visibility | None) -> None:
    """ConflictError if the repository is more open than the target's limit allows.

    `visibility` is None for a repository that does not exist: then, if it would be.
    """
    limit, is_or_would_be = target.limit, "is"
    if visibility is None:
        visibility, is_or_would_be = "private" if target.private else "public", "would be"
    if limit is None or VISIBILITIES.index(visibility) <= VISIBILITIES.index(limit.visibility):
        return
    raise ConflictError(
        f"{target.repo} {is_or_would_be} {visibility}, but {limit.reason}",
        "publish to a private repository (publish.hub.private: true makes one); if everybody is "
        "meant to see it, set publish.hub.allow_public: true",
    )


def refuse_files_of_others(target: Target, branch: Branch, names: frozenset[str]) -> None:
    """ConflictError where writing `names` would touch files that we did not publish.

    A branch without a listing of ours must hold nothing but what the Hub itself put there.
    """
    foreign = (names & branch.files.keys()) if branch.ours else frozenset(branch.files)
    foreign = foreign - branch.ours - MADE_BY_THE_HUB
    if foreign:
        shown = ", ".join(sorted(foreign)[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConflictError(
            f"{target.repo} at {branch.ref} holds files that this pipeline did not publish: "
            f"{shown}",
            "publish to another repository or branch, or delete these files there",
        )


def change_of(target: Target, branch: Branch, local: Local) -> Change:
    """From the branch to our files; ConflictError where that would touch files of others."""
    add = local.missing(branch.files)
    refuse_files_of_others(target, branch, frozenset(entry.name for entry in add))
    names = {entry.name for entry in local.entries}
    return Change(add, tuple(sorted((branch.ours & branch.files.keys()) - names)))
