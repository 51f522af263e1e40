"""Before anything is downloaded: can this token read what the recipe names on the Hub?"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from quantize.errors import QuantizeError, ResourceError, TransientError
from quantize.findings import Finding, Told
from quantize.hub.client import Access, access_from_environment, call, client
from quantize.hub.outline import bring_outline, remote_checkpoint_files
from quantize.hub.repository import RemoteFile, RepoType
from quantize.model_files import CHECKPOINT_FILES, any_match
from quantize.stages.base import Resolved

OPEN_FILES = ("README.md", ".gitattributes", "LICENSE*")
PAGE = 1000
"""Entries of a listing that come with one request."""


def check_sources(
    resolved: Resolved,
    kinds: Mapping[str, str],
    store: Path,
    to_run: Collection[str],
    outline: Path | None,
) -> Told:
    """Each input on the Hub by its pinned commit: listed, and one file of it readable.

    `kinds` names the inputs that are asked about (model, adapter, calibration, ...) and their kind
    of repository. Where `outline` is given, the checkpoint is brought there without its weights.
    A Hub that does not answer is not asked about the next.
    """
    from huggingface_hub import constants

    access = access_from_environment()
    told = Told()
    for name, kind in kinds.items():
        repo, _, commit = resolved.digests[name].rpartition("@")
        if kind == "dataset" and constants.HF_HUB_OFFLINE:  # it may be in that library's cache
            told.notes.append(f"{name}: HF_HUB_OFFLINE is set, so {repo} was not looked up")
            continue
        try:
            if name == "model" and outline is not None:
                _check_model(access, repo, commit, store, outline, told)
            else:
                _check_readable(access, repo, commit, "dataset" if kind == "dataset" else "model")
        except QuantizeError as error:
            told.findings.append(Finding.of(error))
            if isinstance(error, TransientError):
                break
        else:
            told.notes.append(f"{name}: {repo} at commit {commit[:12]}")
    return told


def _check_model(
    access: Access, repo: str, commit: str, store: Path, outline: Path, told: Told
) -> None:
    files = remote_checkpoint_files(access, repo, commit)
    _check_file(access, repo, commit, _behind_gate(files), "model")
    try:
        bring_outline(access, repo, commit, files, outline)
    except QuantizeError:  # half an outline would look like a broken checkpoint
        shutil.rmtree(outline)
        outline.mkdir()
        raise
    needed = _download_bytes(files)
    place = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        told.findings.append(
            Finding(
                f"{repo} takes {needed / 1e9:.1f} GB, the store {store} has {free / 1e9:.1f} free",
                "free some with `quantize store gc`, or name another place with --store",
                ResourceError,
            )
        )


def _download_bytes(files: Mapping[str, RemoteFile]) -> int:
    """Bytes that the fetch stage will download."""
    return sum(file.bytes for name, file in files.items() if any_match(name, CHECKPOINT_FILES))


def _check_readable(access: Access, repo: str, commit: str, kind: RepoType) -> None:
    """The commit is there, and its files may be read: a gate shows at a file alone."""
    _check_file(access, repo, commit, _some_file(access, repo, commit, kind), kind)


def _some_file(access: Access, repo: str, commit: str, kind: RepoType) -> str | None:
    """A file behind the gate, if there is one; of a large data set the first page is enough."""
    from huggingface_hub.hf_api import RepoFile

    api = client(access)

    def ask() -> str | None:
        entries = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
        page = itertools.islice((e.path for e in entries if isinstance(e, RepoFile)), PAGE)
        return _behind_gate(list(page))

    return call(access, f"listing {repo} at {commit[:12]}", ask)


def _behind_gate(names: Collection[str]) -> str | None:
    """A file that a gated repository may refuse: not its card, which everybody may read."""
    others = [name for name in names if not any_match(name, OPEN_FILES)]
    weights = [name for name in others if name.endswith(".safetensors")]
    return min(weights or others or names, default=None)


def _check_file(access: Access, repo: str, commit: str, name: str | None, kind: RepoType) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if name is None:
        return
    address = hf_hub_url(repo, name, repo_type=kind, revision=commit, endpoint=access.endpoint)
    call(
        access,
        f"asking for {name} of {repo}",
        lambda: get_hf_file_metadata(
            address, token=access.token or False, timeout=60, endpoint=access.endpoint
        ),
    )
