"""Tags, pull requests, collections: each is looked for before it is made, so none is made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from quantize.errors import ConflictError, SourceError, TransientError, UsageError
from quantize.hub.client import TRY_AGAIN, Access, call, client


@dataclass(frozen=True)
class PullRequest:
    """An open pull request."""

    number: int
    url: str

    @classmethod
    def of(cls, access: Access, repo: str, number: int) -> PullRequest:
        """With its address."""
        return cls(number, f"{access.host}/{repo}/discussions/{number}")

    @property
    def ref(self) -> str:
        """What a commit to it names as its revision."""
        return f"refs/pr/{self.number}"


def find_tag(access: Access, repo: str, tag: str) -> str | None:
    """The commit that the tag names; None without such a tag."""
    api = client(access)
    refs = call(access, f"reading the tags of {repo}", lambda: api.list_repo_refs(repo))
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def check_tag(
    access: Access, repo: str, tag: str, commit: str | None, holds: Callable[[str], bool]
) -> bool:
    """Whether the tag is there, on `commit` or on another that `holds` the same files.

    ConflictError if it is on a commit that does not. `commit` is None when it is not made yet.
    """
    found = find_tag(access, repo, tag)
    if found is None:
        return False
    if found != commit and not holds(found):
        raise ConflictError(
            f"tag {tag} of {repo} is on {found}, which holds other files than "
            + (f"{commit}" if commit else "this publish would"),
            "set another publish.hub.tag, or delete the tag there",
        )
    return True


def put_tag(access: Access, repo: str, tag: str, commit: str, holds: Callable[[str], bool]) -> None:
    """Make the tag name `commit`; errors as for :func:`check_tag`."""
    if check_tag(access, repo, tag, commit, holds):
        return
    api = client(access)
    call(
        access,
        f"tagging {repo} with {tag}",
        lambda: api.create_tag(repo, tag=tag, revision=commit, exist_ok=True),
    )
    if not check_tag(access, repo, tag, commit, holds):
        raise TransientError(f"tag {tag} of {repo} was created but is not there yet", TRY_AGAIN)


def find_pull_request(access: Access, repo: str, title: str) -> PullRequest | None:
    """The oldest open (or draft) pull request of ours with this title; None without one."""
    return next(iter(our_pull_requests(access, repo, title)), None)


def our_pull_requests(access: Access, repo: str, title: str) -> list[PullRequest]:
    """The open (or draft) pull requests of ours with this title, the oldest first."""
    api = client(access)

    def search() -> list[PullRequest]:
        me = str(api.whoami()["name"])
        found = api.get_repo_discussions(
            repo, author=me, discussion_type="pull_request", discussion_status="open"
        )
        return [
            PullRequest.of(access, repo, item.num)
            for item in found
            if item.is_pull_request
            and item.status in ("open", "draft")
            and item.title == title
            and item.author == me
        ]

    found = call(access, f"looking for a pull request to {repo}", search)
    return sorted(found, key=lambda item: item.number)


def close_others(access: Access, repo: str, ours: Sequence[PullRequest], kept: PullRequest) -> None:
    """Close all of `ours` but one.

    There are others only when a request to open one took effect after we had stopped waiting for
    it, and sent it again.
    """
    api = client(access)
    for other in ours:
        if other.number != kept.number:
            call(
                access,
                f"closing {other.url}",
                partial(
                    api.change_discussion_status,
                    repo,
                    other.number,
                    "closed",
                    comment=f"The same as #{kept.number}.",
                ),
            )


def check_collection(access: Access, slug: str, repo: str) -> bool:
    """Whether the collection has the repository; UsageError if there is no such collection."""
    api = client(access)
    try:
        found = call(access, f"reading collection {slug}", lambda: api.get_collection(slug))
    except SourceError as error:
        raise UsageError(
            f"there is no collection {slug}, or the token may not read it",
            "copy the slug from the collection's address: owner/title-id",
        ) from error
    return any(item.item_type == "model" and item.item_id == repo for item in found.items)


def put_in_collection(access: Access, slug: str, repo: str) -> None:
    """Add the repository to the collection, if it is not there."""
    if check_collection(access, slug, repo):
        return
    api = client(access)
    call(
        access,
        f"adding {repo} to collection {slug}",
        lambda: api.add_collection_item(slug, repo, "model", exists_ok=True),
    )
