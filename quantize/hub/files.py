"""From files on the disk to the operations of a commit: the bytes checked are the bytes sent.

Every file is compared with its sha256 before anything is sent. Small ones are read into memory for
that and sent from there. Large ones are hashed by the client, which reads them again to send them:
a file that was touched in between (inode, size, times) is noticed before the commit makes it
visible.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import ConflictError, SourceError
from quantize.hub.client import Access, call, clean, client
from quantize.hub.repository import OnProgress
from quantize.hub.target import Branch, Local, Target
from quantize.listing import not_as_made, refuse_hidden
from quantize.store import FileEntry

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

IN_MEMORY_BYTES = 10 << 20
"""Files up to this size are sent from memory, together. The Hub keeps no larger ones in git itself,
so that whatever is inside the commit's request comes from memory."""

IGNORE_NOTHING = "# every file of a publish is wanted\n"
"""Sent in place of the repository's .gitignore, which would make the Hub leave files out."""


@dataclass(frozen=True)
class Addition:
    """One file of the commit, checked; `seal` is what the file on the disk was at the check."""

    entry: FileEntry
    operation: CommitOperationAdd
    path: Path
    seal: tuple[int, ...] | None  # None when the bytes are in memory


def checked(local: Local, entries: Sequence[FileEntry]) -> list[Addition]:
    """The additions for `entries`, each compared with its sha256.

    Raises SourceError for a file that is missing, a symlink, or not what its entry says.
    """
    return [_checked(local, entry) for entry in entries]


def _checked(local: Local, entry: FileEntry) -> Addition:
    from huggingface_hub import CommitOperationAdd

    path, content = local.paths[entry.name], None
    refuse_hidden(entry.name)
    if path.is_symlink():
        raise not_as_made(path, "is a symlink")
    if not path.is_file():
        raise not_as_made(path, "is missing")
    if entry.bytes <= IN_MEMORY_BYTES:
        seal, content = None, path.read_bytes()
        operation = CommitOperationAdd(entry.name, content)
    else:
        seal, operation = _seal(path), CommitOperationAdd(entry.name, str(path))
    info = operation.upload_info  # computed from the bytes, by the client itself
    if (info.size, info.sha256.hex()) != (entry.bytes, entry.sha256):
        raise not_as_made(path, "was changed since it was made (sha256 differs)")
    if content is not None:
        local.remember(entry, content)
    return Addition(entry, operation, path, seal)


def check_card(access: Access, additions: Sequence[Addition]) -> None:
    """SourceError if the Hub refuses the card's front matter: it does so only with the commit."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    card = next((a.path for a in additions if a.entry.name == "README.md"), None)
    if card is None:
        return
    text = card.read_text(encoding="utf-8", errors="replace")

    def ask() -> None:
        response = get_session().post(
            f"{access.endpoint}/api/validate-yaml",
            json={"content": text, "repoType": "model"},
            headers=build_hf_headers(token=access.token or False),
        )
        if response.status_code == 400 and (errors := response.json().get("errors")):
            said = "; ".join(str(error.get("message")) for error in errors)
            raise SourceError(
                f"the Hub refuses the card's front matter: {clean(access, said)}",
                "correct what it is made from: model.license, model.base, the source's own card",
            )
        hf_raise_for_status(response)

    call(access, "having the card checked", ask)


def upload(
    access: Access,
    target: Target,
    branch: Branch,
    additions: Sequence[Addition],
    *,
    opens_pull_request: bool,
    on_progress: OnProgress | None,
) -> None:
    """Bring the large files' bytes to the Hub, where nothing shows them before the commit.

    The small files come first and together: the Hub's answer says of each whether it belongs into
    the commit's request or into the large files' storage. What the Hub has already is not sent.
    """
    api = client(access)
    total, done = sum(addition.entry.bytes for addition in additions), 0
    for group in _groups(additions):
        what = group[0].entry.name + (f" and {len(group) - 1} more" if group[1:] else "")

        def send(operations: list[CommitOperationAdd]) -> Callable[[], None]:
            return lambda: api.preupload_lfs_files(
                target.repo,
                additions=operations,
                revision=branch.ref,
                create_pr=opens_pull_request,
                free_memory=False,
                gitignore_content=IGNORE_NOTHING,
            )

        call(access, f"uploading {what}", send([addition.operation for addition in group]))
        _refuse_ignored(target, group)
        done += sum(addition.entry.bytes for addition in group)
        if on_progress is not None:
            on_progress(done, total)
    for addition in additions:
        if addition.seal is not None and addition.seal != _seal(addition.path):
            raise not_as_made(addition.path, "was changed while it was uploaded")


def _groups(additions: Sequence[Addition]) -> list[list[Addition]]:
    """The files in memory together, then each of the others alone."""
    small = [addition for addition in additions if addition.seal is None]
    large = [[addition] for addition in additions if addition.seal is not None]
    return ([small] if small else []) + large


def _refuse_ignored(target: Target, group: Sequence[Addition]) -> None:
    """The client leaves out, without a word, what the Hub calls ignored."""
    ignored = [a.entry.name for a in group if getattr(a.operation, "_should_ignore", False)]
    if ignored:
        raise ConflictError(
            f"the .gitignore of {target.repo} would leave out {', '.join(ignored)}; "
            "nothing was changed there",
            "correct or delete .gitignore there, then run the same command again",
        )


def _seal(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to a file or replaces it; () if it is gone."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
