"""A checkpoint on the Hub without its weights: small files whole, of each shard the header alone.

The shards become sparse files of their full size, so that a folder results that every check of a
local checkpoint can read. A 70B checkpoint costs some MB and seconds, not 140 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantize.errors import SourceError
from quantize.hub.client import Access, call
from quantize.hub.repository import RemoteFile, download_files, list_files
from quantize.model_files import (
    CHECKPOINT_FILES,
    FOREIGN_WEIGHTS,
    PICKLED,
    any_match,
)
from quantize.tensors import HEADER_LIMIT_BYTES
from quantize.untrusted import JSON_LIMIT_BYTES

FIRST_BYTES = 256 << 10
"""Asked of each shard at first; nearly every header ends there."""

AT_ONCE = 8


def remote_checkpoint_files(access: Access, repo: str, commit: str) -> dict[str, RemoteFile]:
    """The files at a repository's root that belong to a checkpoint, or tell that it is none."""
    wanted = (*CHECKPOINT_FILES, *PICKLED, "*.py", "adapter_config.json", "*.gguf")
    return {
        name: file
        for name, file in list_files(access, repo, commit).items()
        if "/" not in name and any_match(name, wanted) and not any_match(name, FOREIGN_WEIGHTS)
    }


def bring_outline(
    access: Access, repo: str, commit: str, files: Mapping[str, RemoteFile], folder: Path
) -> None:
    """Fill `folder` with the files as far as the checks of a checkpoint read them.

    Files beside the weights that are larger than any should be become sparse, too.
    """
    shards = [name for name in files if name.endswith(".safetensors")]
    small = {
        name: file
        for name, file in files.items()
        if any_match(name, CHECKPOINT_FILES)
        and name not in shards
        and file.bytes <= JSON_LIMIT_BYTES
    }
    download_files(access, repo, commit, small, folder)
    for name in files.keys() - small.keys() - set(shards):
        _sparse(folder / name, b"", files[name].bytes)

    def bring(name: str) -> None:
        _sparse(
            folder / name, _header(access, repo, commit, name, files[name].bytes), files[name].bytes
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(bring, shards))


def _header(access: Access, repo: str, commit: str, name: str, size: int) -> bytes:
    """The first bytes of a shard: the length of its header, and the header."""
    if size == 0:
        return b""
    start = _range(access, repo, commit, name, 0, FIRST_BYTES)
    length = 8 + int.from_bytes(start[:8], "little")
    if length > min(size, HEADER_LIMIT_BYTES):
        return start  # the checks say what is wrong with it
    if length > len(start):
        start += _range(access, repo, commit, name, len(start), length)
    return start[:length]


def _range(access: Access, repo: str, commit: str, name: str, first: int, end: int) -> bytes:
    """Bytes `first` to `end` (without) of a file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    address = hf_hub_url(repo, name, revision=commit, endpoint=access.endpoint)
    headers = build_hf_headers(token=access.token or False)

    def ask() -> bytes:
        asked = {**headers, "Range": f"bytes={first}-{end - 1}"}
        with get_session().stream("GET", address, headers=asked) as answer:
            hf_raise_for_status(answer)
            content = b""
            for part in answer.iter_bytes():  # a server may send all of a file
                content += part
                if len(content) >= end - first:
                    break
            return content[: end - first]

    return call(access, f"reading the header of {name} of {repo}", ask)


def _sparse(path: Path, start: bytes, size: int) -> None:
    """A file of `size` bytes that begins with `start` and takes no room for the rest."""
    try:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(size)
    except OSError as error:
        raise SourceError(f"cannot outline {path.name} ({size} bytes): {error}") from error
