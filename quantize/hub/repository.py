"""Reading the Hub: revisions, files, downloads, permissions.

Pushing is in :mod:`quantize.hub.push`; the client and its errors are in :mod:`quantize.hub.client`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from quantize.errors import CredentialsError, SourceError, ToolError, TransientError
from quantize.hub.client import (
    TRY_AGAIN,
    Access,
    access_from_environment,
    call,
    client,
    endpoint,
)
from quantize.keys import file_sha256
from quantize.store import FileEntry

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "Access",
    "RemoteFile",
    "access_from_environment",
    "download_file",
    "download_files",
    "download_snapshot",
    "endpoint",
    "git_blob_id",
    "list_files",
    "require_write",
    "resolve_revision",
]

RepoType = Literal["model", "dataset"]
OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; may be called from another thread."""

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit: `sha256` for large (LFS) files, the git blob id for the others."""

    bytes: int
    blob_id: str
    sha256: str | None

    def holds(self, path: Path) -> bool:
        """Whether the local file has exactly these bytes."""
        if path.stat().st_size != self.bytes:
            return False
        if self.sha256 is not None:
            return file_sha256(path) == self.sha256
        return git_blob_id(path.read_bytes()) == self.blob_id


def resolve_revision(
    access: Access, repo: str, revision: str | None = None, repo_type: RepoType = "model"
) -> str:
    """The commit (40 hex digits) that a branch, a tag or nothing (`main`) stands for now."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    api = client(access)
    name = f"{repo} at {revision}" if revision else repo
    info = call(
        access,
        f"looking up {name}",
        lambda: api.repo_info(repo, revision=revision, repo_type=repo_type, timeout=60),
    )
    if info.sha is None:
        raise ToolError(f"{access.host} named no commit for {name}", TRY_AGAIN)
    return str(info.sha)


def list_files(
    access: Access, repo: str, commit: str, repo_type: RepoType = "model"
) -> dict[str, RemoteFile]:
    """Every file of a commit by its path."""
    from huggingface_hub.hf_api import RepoFile

    api = client(access)
    entries = call(
        access,
        f"listing {repo} at {commit[:12]}",
        lambda: list(
            api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type)
        ),
    )
    return {
        entry.path: RemoteFile(
            entry.lfs.size if entry.lfs else entry.size,
            entry.blob_id,
            entry.lfs.sha256 if entry.lfs else None,
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def download_snapshot(
    access: Access,
    repo: str,
    commit: str,
    folder: Path,
    *,
    patterns: Sequence[str],
    ignore: Sequence[str] = (),
    repo_type: RepoType = "model",
    on_progress: OnProgress | None = None,
) -> list[FileEntry]:
    """Bring the files of `commit` that fit `patterns` and not `ignore` into `folder`, verified.

    A pattern without a slash is for files at the root. A download that was killed is continued when
    `folder` is the same. Files arrive one by one (the client itself downloads one in parallel), and
    each is compared with the checksum that the Hub lists for it.
    """
    names = {
        name: file
        for name, file in list_files(access, repo, commit, repo_type).items()
        if _fits(name, patterns) and not _fits(name, ignore)
    }
    if not names:
        raise SourceError(
            f"{repo} at {commit[:12]} has none of {', '.join(patterns)}",
            "name a repository that holds a checkpoint in safetensors",
        )
    api = client(access)
    total = sum(file.bytes for file in names.values())
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    with _Watch(folder, total, on_progress):
        for name in sorted(names):
            _fetch(access, api, repo, commit, name, names[name], folder, repo_type)
            entries.append(FileEntry(name, names[name].bytes, file_sha256(folder / name)))
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on partial downloads
    return entries


def download_files(
    access: Access, repo: str, commit: str, files: Mapping[str, RemoteFile], folder: Path
) -> None:
    """Bring some of a model's files, as :func:`list_files` gives them, into `folder`, verified."""
    api = client(access)
    for name in sorted(files):
        _fetch(access, api, repo, commit, name, files[name], folder, "model")


def download_file(access: Access, repo: str, revision: str, name: str, folder: Path) -> bool:
    """Bring one file of a model into `folder`; False where there is no such file, or nothing."""
    try:
        commit = resolve_revision(access, repo, revision)
        files = list_files(access, repo, commit)
    except SourceError:
        return False
    if name in files:
        download_files(access, repo, commit, {name: files[name]}, folder)
    return name in files


def require_write(access: Access, repo: str, *, pull_request: bool = False) -> str:
    """The user's name, when the token may write to `repo`'s namespace; else CredentialsError.

    For a pull request it need not be able to write there, only to take part in discussions.
    Answers what the Hub says of a token beforehand (role, scopes, organisations). Rules that it
    does not tell, such as resource groups, are met at the push.
    """
    login = "set HF_TOKEN, or run `hf auth login`, with a token that may write"
    if access.token is None:
        raise CredentialsError(f"publishing to {repo} needs a token for {access.host}", login)
    api = client(access)
    who: dict[str, Any] = call(access, "checking the token", api.whoami)
    namespace = repo.partition("/")[0]
    token = (who.get("auth") or {}).get("accessToken") or {}
    fine_grained = token.get("role") == "fineGrained"
    if token.get("role") == "read":
        raise CredentialsError(f"the token may only read, not write to {repo}", login)
    needed = ("repo.write", "discussion.write") if pull_request else ("repo.write",)
    if fine_grained and not _grants(token.get("fineGrained"), repo, needed):
        raise CredentialsError(
            f"the fine-grained token has no permission {' or '.join(needed)} for {repo}",
            f"give it write access to repositories of {namespace}, or to {repo}",
        )
    roles = {who["name"]: "admin"} | {
        org["name"]: org.get("roleInOrg") or "write" for org in who.get("orgs") or []
    }
    if not (fine_grained or pull_request) and roles.get(namespace, "read") == "read":
        raise CredentialsError(
            f"{who['name']} may not write to {namespace}: neither that user nor a writing member",
            f"publish to {who['name']}/{repo.partition('/')[2]}, or use another token",
        )
    return str(who["name"])


def _grants(scopes: Any, repo: str, needed: Sequence[str]) -> bool:
    """Whether a fine-grained token has one of the permissions, everywhere or for `repo`."""
    if not isinstance(scopes, dict) or "scoped" not in scopes:
        return True  # the Hub did not say: the push will
    names = {repo, repo.partition("/")[0]}
    granted = set(scopes.get("global") or [])
    for scope in scopes["scoped"]:
        if scope["entity"].get("name") in names:
            granted |= set(scope["permissions"])
    return bool(granted & set(needed))


def git_blob_id(content: bytes) -> str:
    r"""The id git gives a file's content: sha1 of ``blob <size>\0`` and the bytes."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _fetch(
    access: Access,
    api: HfApi,
    repo: str,
    commit: str,
    name: str,
    file: RemoteFile,
    folder: Path,
    repo_type: RepoType,
) -> None:
    """Bring one file into `folder`; a TransientError where its checksum is not the listed one."""
    call(
        access,
        f"downloading {name} of {repo}",
        _download(api, repo, commit, name, folder, repo_type),
    )
    if not file.holds(folder / name):
        (folder / name).unlink()
        raise TransientError(
            f"{name} of {repo} arrived with another checksum than the Hub lists", TRY_AGAIN
        )


def _download(
    api: HfApi, repo: str, commit: str, name: str, folder: Path, repo_type: RepoType
) -> Callable[[], str]:
    return lambda: api.hf_hub_download(
        repo, name, revision=commit, local_dir=folder, repo_type=repo_type
    )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


class _Watch:
    """Reports the bytes below a folder twice a second, whatever the client downloads with."""

    def __init__(self, folder: Path, total: int, on_progress: OnProgress | None) -> None:
        self._folder, self._total, self._on_progress = folder, total, on_progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> None:
        if self._on_progress is not None:
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._on_progress is None:
            return
        self._done.set()
        self._thread.join()
        if kind is None:
            self._on_progress(self._total, self._total)

    def _report(self) -> None:
        assert self._on_progress is not None
        while not self._done.wait(0.5):
            present = 0
            for parent, _, files in os.walk(self._folder):
                for file in files:
                    try:
                        present += Path(parent, file).stat().st_size
                    except FileNotFoundError:  # renamed by the client meanwhile
                        continue
            self._on_progress(min(present, self._total), self._total)
