"""After the commit: the Hub is asked for what it holds, and a part of each shard is read back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from quantize.errors import ToolError
from quantize.hub.client import TRY_AGAIN, Access, call
from quantize.hub.repository import list_files
from quantize.hub.target import Local, Target
from quantize.store import FileEntry

RANGE_BYTES = 64 << 10
"""Length of the random range that is compared of each shard."""

LONGEST_HEADER_BYTES = 8 << 20
"""What is compared of a header at most."""


def verify_tree(
    access: Access, target: Target, commit: str, deleted: Sequence[str], local: Local
) -> None:
    """Every path, size and checksum of the commit is the manifest's; ToolError if not."""
    remote = list_files(access, target.repo, commit)
    wrong = [entry.name for entry in local.missing(remote)]
    wrong += sorted(set(deleted) & remote.keys())
    if wrong:
        raise _differs(access, target, commit, wrong)


def verify_shards(access: Access, target: Target, commit: str, local: Local) -> bool:
    """Read the header and a random range of each file of weights back, and compare.

    The range follows from commit and name, so that it can be repeated. False when the Hub answers
    with whole files instead of ranges: then only their beginnings were compared, and no file is
    downloaded. ToolError for bytes that differ.
    """
    wrong, in_ranges = [], True
    for entry in local.entries:
        if not entry.name.endswith((".safetensors", ".gguf")) or entry.bytes == 0:
            continue
        path = local.paths[entry.name]
        for start, count in (_header(path, entry), _random_range(commit, entry)):
            found = read_range(access, target.repo, commit, entry.name, start, count)
            in_ranges = in_ranges and found is not None
            if found is not None and found != _read(path, start, count):
                wrong.append(f"{entry.name} (bytes {start} to {start + count - 1})")
    if wrong:
        raise _differs(access, target, commit, wrong)
    return in_ranges


def read_range(
    access: Access, repo: str, commit: str, name: str, start: int, count: int
) -> bytes | None:
    """`count` bytes of a file from `start` on, or fewer at its end.

    None when the Hub ignores the range and `start` is not at the file's beginning. No more than
    was asked for is read, whatever is sent.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(repo, name, revision=commit, endpoint=access.endpoint)
    headers = build_hf_headers(token=access.token or False)
    headers |= {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}

    def read() -> bytes | None:
        with get_session().stream("GET", url, headers=headers) as response:
            if response.status_code >= 400:
                response.read()  # the message is in the body
                hf_raise_for_status(response)
            if response.status_code != 206 and start > 0:
                return None
            found = bytearray()
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= count:
                    break
            return bytes(found[:count])

    return call(access, f"reading {name} of {repo} back", read)


def _header(path: Path, entry: FileEntry) -> tuple[int, int]:
    """(0, bytes of the header and of its length), as the local file states them.

    GGUF's has no length: its beginning is in the first range, most often all of it.
    """
    if entry.name.endswith(".gguf"):
        return 0, min(LONGEST_HEADER_BYTES, entry.bytes)
    length = int.from_bytes(_read(path, 0, 8), "little")
    return 0, min(8 + length, LONGEST_HEADER_BYTES, entry.bytes)


def _random_range(commit: str, entry: FileEntry) -> tuple[int, int]:
    count = min(RANGE_BYTES, entry.bytes)
    return random.Random(f"{commit} {entry.name}").randint(0, entry.bytes - count), count


def _read(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _differs(access: Access, target: Target, commit: str, wrong: Sequence[str]) -> ToolError:
    shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
    return ToolError(
        f"{target.repo} at {commit} does not hold what was sent: {shown}",
        f"do not use that commit; {TRY_AGAIN}, and tell the Hub's operators if it stays",
    )
