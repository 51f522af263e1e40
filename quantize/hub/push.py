"""Publishing to the Hub: all files in exactly one commit, then read back and compared.

Large files are uploaded first and become visible only through the commit. The commit names its
parent, so that nothing is built on a head that we have not seen. When its answer is lost or an
error, the branch is read again: it shows whether the commit took effect, whether it may be sent
again, or whether somebody else was faster.

A pull request is opened by that one commit, from the branch's head. It is known by its title and
author: when there is an open one, the commit goes there. Tag and collection come after the commit.
Every step looks first whether it is done, so that a push may be ended anywhere and called again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import ConflictError, QuantizeError, TransientError
from quantize.hub.client import (
    TRY_AGAIN,
    Access,
    client,
    may_repeat,
    retry_after_seconds,
    translate,
)
from quantize.hub.files import Addition, check_card, checked, upload
from quantize.hub.readback import verify_shards, verify_tree
from quantize.hub.refs import (
    PullRequest,
    check_tag,
    close_others,
    find_pull_request,
    our_pull_requests,
    put_in_collection,
    put_tag,
)
from quantize.hub.repository import OnProgress, list_files
from quantize.hub.target import (
    Branch,
    Change,
    Limit,
    Local,
    Target,
    change_of,
    check_visibility,
    create,
    read_branch,
    read_head,
)
from quantize.store import FileEntry

__all__ = ["Limit", "Pushed", "Target", "push"]


@dataclass(frozen=True)
class Pushed:
    """Where the files are now; `changed` is False when they were there already."""

    commit: str
    url: str
    changed: bool
    pull_request: str | None = None  # its address
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Done:
    """The commit that holds our files, and the open pull request that it is in, if any."""

    commit: str
    pull_request: PullRequest | None = None


@dataclass(frozen=True)
class _Base:
    """What the commit is built on, and where it goes."""

    branch: Branch
    pull_request: PullRequest | None = None  # an open one of ours
    opens: bool = False  # the commit opens a pull request against the branch


def push(
    access: Access,
    target: Target,
    files: Sequence[FileEntry],
    paths: Mapping[str, Path],
    message: str,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Make the target hold `files` (local bytes in `paths`, by name), with one commit or none.

    `files` must contain the listing. Raises SourceError when a local file is not what `files`
    says, ConflictError when the branch moved meanwhile, holds files of others under our names, is
    open to more people than the target's limit, or the tag names something else; CredentialsError,
    ResourceError, TransientError (nothing is half published; the same call continues).
    """
    local = Local(files, paths)
    base = _read(access, target, message, local)
    changed = base is None or bool(change_of(target, base.branch, local))
    if base is None or changed:
        base, done = _change(access, target, base, local, message, on_progress)
    else:
        done = _Done(base.branch.head, base.pull_request)
    in_ranges = verify_shards(access, target, done.commit, local)
    if target.tag is not None:
        put_tag(access, target.repo, target.tag, done.commit, _holder(access, target, local))
    if target.collection is not None:
        put_in_collection(access, target.collection, target.repo)
    return Pushed(
        done.commit,
        f"{access.host}/{target.repo}/tree/{done.commit}",
        changed=changed,
        pull_request=done.pull_request.url if done.pull_request else None,
        notes=_notes(target, base.branch, in_ranges=in_ranges),
    )


def _change(
    access: Access,
    target: Target,
    base: _Base | None,
    local: Local,
    message: str,
    on_progress: OnProgress | None,
) -> tuple[_Base, _Done]:
    """Check, upload, commit, read the tree back; `base` is None when it must be created first."""
    wanted = local.entries if base is None else local.missing(base.branch.files)
    additions = checked(local, wanted)
    check_card(access, additions)
    if base is None:
        create(access, target)
        base = _read(access, target, message, local)
        if base is None:
            raise TransientError(f"{target.repo} was created but is not there yet", TRY_AGAIN)
    if target.tag is not None:
        check_tag(access, target.repo, target.tag, None, _holder(access, target, local))
    change = change_of(target, base.branch, local)
    additions = [addition for addition in additions if addition.entry in change.add]
    upload(
        access,
        target,
        base.branch,
        additions,
        opens_pull_request=base.opens,
        on_progress=on_progress,
    )
    done = _commit(access, target, base, change, additions, local, message)
    verify_tree(access, target, done.commit, change.delete, local)
    return base, done


def _read(access: Access, target: Target, title: str, local: Local) -> _Base | None:
    """What a commit would be built on; None when the repository or the branch does not exist.

    For a pull request that is the open one of ours, else the branch. A branch that holds the files
    (the pull request was merged) needs none.
    """
    branch = read_branch(access, target)
    if branch is None:
        return None
    check_visibility(target, branch.visibility)
    if not target.pull_request or not change_of(target, branch, local):
        return _Base(branch)
    ours = our_pull_requests(access, target.repo, title)
    if not ours:
        return _Base(branch, opens=True)
    found = ours[0]
    inside = read_branch(access, target, found.ref)
    if inside is None:
        raise TransientError(f"{found.url} is listed but cannot be read", TRY_AGAIN)
    close_others(access, target.repo, ours, found)
    return _Base(inside, found)


def _commit(
    access: Access,
    target: Target,
    base: _Base,
    change: Change,
    additions: Sequence[Addition],
    local: Local,
    message: str,
) -> _Done:
    """Send the one commit; after a failure the branch itself says what happened."""
    from huggingface_hub import CommitOperationDelete

    api = client(access)
    deletions = [CommitOperationDelete(name, is_folder=False) for name in change.delete]
    again = False
    for delay in (*access.retry_seconds, None):
        try:
            info = api.create_commit(
                target.repo,
                [*(addition.operation for addition in additions), *deletions],
                commit_message=message,
                revision=base.branch.ref,
                parent_commit=base.branch.head,
                create_pr=base.opens,
            )
            if base.opens and info.pr_num is not None:
                opened = PullRequest.of(access, target.repo, info.pr_num)
                if again:
                    ours = our_pull_requests(access, target.repo, message)
                    close_others(access, target.repo, ours, opened)
                return _Done(info.oid, opened)
            return _Done(info.oid, base.pull_request)
        except QuantizeError:
            raise
        except Exception as error:
            problem = translate(access, f"committing to {target.repo}", error)
            done = _took_effect(access, target, base, change, local, message, error)
            if done is not None:
                return done
            if delay is None or not may_repeat(problem):
                raise problem from error
            time.sleep(max(delay, retry_after_seconds(error)))
            again = True
    raise AssertionError("unreachable")


def _took_effect(
    access: Access,
    target: Target,
    base: _Base,
    change: Change,
    local: Local,
    title: str,
    error: Exception,
) -> _Done | None:
    """After a failed commit: what it did if only its answer was lost, None if it did nothing.

    ConflictError naming both heads when there is another commit now than the one we built on.
    """
    ref, pull_request = base.branch.ref, base.pull_request
    if base.opens:
        pull_request = find_pull_request(access, target.repo, title)
        if pull_request is None:
            return None
        ref = pull_request.ref
    head = read_head(access, target, ref)
    if head == base.branch.head:
        return None
    remote = list_files(access, target.repo, head)
    if not local.missing(remote) and not set(change.delete) & remote.keys():
        return _Done(head, pull_request)
    raise ConflictError(
        f"{target.repo} at {ref} moved from {base.branch.head} to {head} while we published; "
        "nothing of ours was changed there",
        "look at that commit, then run the same command again to publish on top of it",
    ) from error


def _holder(access: Access, target: Target, local: Local) -> Callable[[str], bool]:
    """Says of a commit whether it holds exactly these files."""
    return lambda commit: not local.missing(list_files(access, target.repo, commit))


def _notes(target: Target, branch: Branch, *, in_ranges: bool) -> tuple[str, ...]:
    """What a person should know of the target."""
    notes = []
    if (branch.visibility == "private") != target.private:
        asked = "private: true" if target.private else "private: false"
        notes.append(
            f"{target.repo} is {branch.visibility}, the recipe says {asked}: "
            "that is for new repositories alone, nothing was changed"
        )
    if not in_ranges:
        notes.append(
            f"the Hub answers no range requests: of {target.repo} only the beginning of "
            "each shard was read back"
        )
    return tuple(notes)
