"""Publishing to the Hub: all files in exactly one commit, then read back and compared.

Large files are uploaded first and become visible only through the commit. The commit names its
parent, so that nothing is built on a head that we have not seen. When its answer is lost or an
error, the branch is read again: it shows whether the commit took effect, whether it may be sent
again, or whether somebody else was faster.

`quantize/manifest.json` in the repository says which files are ours. Ours are replaced, and deleted
when they are gone; files of others are neither overwritten nor deleted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import ConflictError, QuantizeError, SourceError, ToolError, TransientError
from quantize.hub import COMMIT, OnProgress, RemoteFile, list_files
from quantize.hub_client import TRY_AGAIN, Access, call, client, retry_after_seconds, translate
from quantize.keys import file_sha256
from quantize.listing import LISTING, not_as_made, parse_listing
from quantize.store import FileEntry

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MADE_BY_THE_HUB = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE"})
"""What a new repository may hold before our first commit."""

UPLOADED_ALONE_BYTES = 8 << 20
"""Files from this size on are uploaded one by one before the commit, which gives progress."""


@dataclass(frozen=True)
class Target:
    """A branch of a model repository."""

    repo: str
    branch: str = "main"
    private: bool = True  # only when the repository is created


@dataclass(frozen=True)
class Pushed:
    """Where the files are now; `changed` is False when they were there already."""

    commit: str
    url: str
    changed: bool


@dataclass(frozen=True)
class _Branch:
    """A branch as it was read: its head commit and that commit's files."""

    head: str
    files: Mapping[str, RemoteFile]
    ours: frozenset[str]  # names that an earlier publish left here, LISTING included


@dataclass(frozen=True)
class _Change:
    """What must happen to a branch so that it holds our files."""

    add: tuple[FileEntry, ...]
    delete: tuple[str, ...]


def push(
    access: Access,
    target: Target,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    message: str,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Make the branch hold `files` (local bytes in `paths`, by name), with one commit or none.

    `files` must contain the listing. Raises SourceError when a local file is not what `files`
    says, ConflictError when the branch moved meanwhile or holds files of others under our names,
    CredentialsError, TransientError (nothing is half published; the same call continues).
    """
    branch = _read(access, target)
    if branch is not None:
        change = _change(target, branch, files, paths)
        if not (change.add or change.delete):
            return Pushed(branch.head, _url(access, target, branch.head), changed=False)
    else:
        change = _Change(tuple(files), ())
    _check_local(change.add, paths)
    if branch is None:
        branch = _create(access, target)
        change = _change(target, branch, files, paths)
    operations = _upload(access, target, change.add, paths, on_progress)
    commit = _commit(access, target, branch, change, operations, files, paths, message)
    _verify(access, target, commit, change, files, paths)
    return Pushed(commit, _url(access, target, commit), changed=True)


def _check_local(files: Sequence[FileEntry], paths: Mapping[str, Path]) -> None:
    """Before a byte leaves: every file is what it was when it was made."""
    for entry in files:
        path = paths[entry.name]
        if not path.is_file():
            raise not_as_made(path, "is missing")
        if path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
            raise not_as_made(path, "was changed since it was made (sha256 differs)")


def _read(access: Access, target: Target) -> _Branch | None:
    """The branch, or None when the repository or the branch does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        head = _head(access, target)
    except SourceError as error:
        if isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
            return None
        raise
    files = list_files(access, target.repo, head)
    return _Branch(head, files, _ours(access, target, head) if LISTING in files else frozenset())


def _head(access: Access, target: Target) -> str:
    """The branch's head commit; a branch whose name looks like a commit is still a branch."""
    api = client(access)
    info = call(
        access,
        f"reading {target.repo} at {target.branch}",
        lambda: api.model_info(target.repo, revision=target.branch, timeout=60),
    )
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ToolError(f"{access.host} named no commit for {target.branch} of {target.repo}")
    return info.sha


def _ours(access: Access, target: Target, head: str) -> frozenset[str]:
    """The names in the listing that an earlier publish left."""
    api = client(access)
    with tempfile.TemporaryDirectory() as folder:
        text = call(
            access,
            f"reading {LISTING} of {target.repo}",
            lambda: Path(
                api.hf_hub_download(target.repo, LISTING, revision=head, local_dir=folder)
            ).read_text(encoding="utf-8"),
        )
    return frozenset(parse_listing(text, f"{LISTING} of {target.repo}")) | {LISTING}


def _create(access: Access, target: Target) -> _Branch:
    """Create what is missing of repository and branch; both may appear meanwhile."""
    api = client(access)
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
    branch = _read(access, target)
    if branch is None:
        raise TransientError(f"{target.repo} was created but cannot be read yet", TRY_AGAIN)
    return branch


def _change(
    target: Target, branch: _Branch, files: Sequence[FileEntry], paths: Mapping[str, Path]
) -> _Change:
    """Compare the branch with our files; ConflictError where that would touch files of others."""
    names = {entry.name for entry in files}
    add = tuple(entry for entry in files if not _holds(branch.files, entry, paths))
    replaced = {entry.name for entry in add} & branch.files.keys()
    foreign = (replaced if branch.ours else set(branch.files)) - branch.ours - MADE_BY_THE_HUB
    if foreign:
        shown = ", ".join(sorted(foreign)[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConflictError(
            f"{target.repo} at {target.branch} holds files that this pipeline did not publish: "
            f"{shown}",
            "publish to another repository or branch, or delete these files there",
        )
    return _Change(add, tuple(sorted((branch.ours & branch.files.keys()) - names)))


def _holds(remote: Mapping[str, RemoteFile], entry: FileEntry, paths: Mapping[str, Path]) -> bool:
    """Whether a commit has these bytes under this name."""
    file = remote.get(entry.name)
    if file is None or file.bytes != entry.bytes:
        return False
    return file.sha256 == entry.sha256 if file.sha256 else file.holds(paths[entry.name])


def _upload(
    access: Access,
    target: Target,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    on_progress: OnProgress | None,
) -> list[CommitOperationAdd]:
    """The commit's operations, the large files' bytes already on the Hub."""
    from huggingface_hub import CommitOperationAdd

    api = client(access)
    total, done = sum(entry.bytes for entry in files), 0
    operations = []
    for entry in files:
        operation = CommitOperationAdd(entry.name, str(paths[entry.name]))
        if entry.bytes >= UPLOADED_ALONE_BYTES:
            call(access, f"uploading {entry.name}", _preupload(api, target, operation))
        operations.append(operation)
        done += entry.bytes
        if on_progress is not None:
            on_progress(done, total)
    return operations


def _commit(
    access: Access,
    target: Target,
    branch: _Branch,
    change: _Change,
    operations: Sequence[CommitOperationAdd],
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    message: str,
) -> str:
    """Send the one commit; after a failure the branch itself says what happened."""
    from huggingface_hub import CommitOperationDelete

    api = client(access)
    deletions = [CommitOperationDelete(name, is_folder=False) for name in change.delete]
    for delay in (*access.retry_seconds, None):
        try:
            info = api.create_commit(
                target.repo,
                [*operations, *deletions],
                commit_message=message,
                revision=target.branch,
                parent_commit=branch.head,
            )
            return info.oid
        except QuantizeError:  # an interruption
            raise
        except Exception as error:
            problem = translate(access, f"committing to {target.repo}", error)
            head = _head(access, target)
            if head != branch.head:
                if _complete(list_files(access, target.repo, head), change, files, paths):
                    return head  # it took effect, only its answer was lost
                raise ConflictError(
                    f"{target.repo} at {target.branch} moved from {branch.head} to {head} while "
                    "we published; nothing was changed there",
                    "look at that commit, then run the same command again to publish on top of it",
                ) from error
            if delay is None or not isinstance(problem, TransientError):
                raise problem from error
            time.sleep(max(delay, retry_after_seconds(error)))
    raise AssertionError("unreachable")


def _complete(
    remote: Mapping[str, RemoteFile],
    change: _Change,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
) -> bool:
    """Whether a commit has every file of ours and none of those that are gone."""
    return all(_holds(remote, entry, paths) for entry in files) and not (
        set(change.delete) & remote.keys()
    )


def _verify(
    access: Access,
    target: Target,
    commit: str,
    change: _Change,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
) -> None:
    """Read the commit back: paths, sizes and checksums are the manifest's."""
    remote = list_files(access, target.repo, commit)
    wrong = [entry.name for entry in files if not _holds(remote, entry, paths)]
    wrong += sorted(set(change.delete) & remote.keys())
    if wrong:
        raise ToolError(
            f"{target.repo} at {commit} does not hold what was sent: {', '.join(wrong)}",
            "a .gitignore in the repository leaves files out; otherwise run the command again",
        )


def _preupload(api: HfApi, target: Target, operation: CommitOperationAdd) -> Callable[[], None]:
    return lambda: api.preupload_lfs_files(
        target.repo, additions=[operation], revision=target.branch, free_memory=False
    )


def _url(access: Access, target: Target, commit: str) -> str:
    return f"{access.host}/{target.repo}/tree/{commit}"
